"""A worker that is killed at any time: job_worker.py CONNINFO HOLDER TTL.

Its work on a key is guarded, so it must be alone with the key: an advisory lock of the key tells. It ends when nothing is left."""

import sys
import threading

import psycopg

conninfo, holder, ttl = sys.argv[1:]


def heartbeat(claimed, lock):
    with psycopg.connect(conninfo, autocommit=True) as connection:
        while True:
            with lock:
                jobs = list(claimed)
            if jobs:
                ids, tokens = map(list, zip(*jobs, strict=True))
                connection.execute("SELECT lockstep.job_renew(%s, %s, %s)", (ids, tokens, ttl))
            threading.Event().wait(0.05)


def work(connection, job_id, token, key):
    with connection.transaction():
        connection.execute("SELECT lockstep.job_guard(%s, %s)", (job_id, token))
        (alone,) = connection.execute("SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))", (key,)).fetchone()
        if not alone:
            connection.execute("INSERT INTO violations VALUES (%s, %s)", (job_id, key))
        connection.execute("INSERT INTO done VALUES (%s, %s)", (job_id, key))
        if connection.execute("SELECT lockstep.job_complete(%s, %s)", (job_id, token)).fetchone() != ("completed",):
            raise psycopg.Rollback


claimed, lock = set(), threading.Lock()
threading.Thread(target=heartbeat, args=(claimed, lock), daemon=True).start()
with psycopg.connect(conninfo, autocommit=True) as connection:
    while True:
        jobs = connection.execute(
            "SELECT job_id, token, key FROM lockstep.job_claim('q', %s, 10, %s)", (holder, ttl)
        ).fetchall()
        with lock:
            claimed.update((job_id, token) for job_id, token, _ in jobs)
        for job_id, token, key in jobs:
            try:
                work(connection, job_id, token, key)
            except psycopg.Error as error:
                if error.sqlstate != "LS007":
                    raise
            with lock:
                claimed.discard((job_id, token))
        if not jobs:
            (ready,) = connection.execute("CALL lockstep.job_wait('q', '200 milliseconds')").fetchone()
            if not ready and connection.execute("SELECT NOT EXISTS (SELECT FROM lockstep.jobs)").fetchone()[0]:
                break
