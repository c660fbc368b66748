"""Holders that are killed, paused beyond their time and followed by others: with the guard, no update is lost and none is stale."""

import random
import threading
import time

import psycopg
from sessions import start

TTL = 0.1


def test_a_guarded_counter_loses_no_update_while_holders_pause_and_are_killed(db, stress_seconds):
    session = db.connect()
    session.execute(
        """CREATE TABLE counter (n int NOT NULL);
           INSERT INTO counter VALUES (0);
           CREATE TABLE written (n int PRIMARY KEY, token bigint NOT NULL)"""
    )
    until = time.monotonic() + stress_seconds
    lock = threading.Lock()
    counts = {"committed": 0, "unknown": 0, "refused": 0, "killed": 0, "tokens": 0}
    pids = {}

    def count(what):
        with lock:
            counts[what] += 1

    def work(number):
        choose = random.Random(number)
        connection, life = None, 0
        while time.monotonic() < until:
            try:
                if connection is None or connection.closed:
                    connection = db.connect()
                    connection.execute("SET lockstep.poll_interval = '5ms'")
                    pids[number] = connection.info.backend_pid
                    life += 1
                turn(connection, choose, f"worker-{number}-{life}")
            except psycopg.OperationalError:
                count("killed")
                connection = None

    def turn(connection, choose, holder):
        take = "CALL lockstep.lease_take('counter', %s, %s, '1 s')"
        acquired, token, *_ = connection.execute(take, (holder, f"{TTL} s")).fetchone()
        if not acquired:
            return
        count("tokens")
        for _ in range(choose.randint(1, 5)):
            if choose.random() < 0.3:
                time.sleep(choose.uniform(0, 2.5 * TTL))  # a pause, as of a collector of garbage
            if not write(connection, choose, token):
                return
        if choose.random() < 0.5:
            connection.execute("SELECT lockstep.lease_release('counter', %s)", (token,))

    def write(connection, choose, token):
        guard = choose.choice(["lease_guard", "lease_guard_at_commit"])
        committing = False
        try:
            connection.execute("BEGIN")
            connection.execute(f"SELECT lockstep.{guard}('counter', %s)", (token,))
            # A plain read, and a value computed from it: the guard alone protects the two.
            (n,) = connection.execute("SELECT n FROM counter").fetchone()
            if choose.random() < 0.2:
                time.sleep(choose.uniform(0, 2 * TTL))
            connection.execute("UPDATE counter SET n = %s", (n + 1,))
            connection.execute("INSERT INTO written VALUES (%s, %s)", (n + 1, token))
            committing = True
            connection.execute("COMMIT")
        except psycopg.OperationalError:
            if committing:
                count("unknown")
            raise
        except psycopg.Error as error:
            connection.execute("ROLLBACK")
            # Under the check at COMMIT two may write the same n: one of them waits for the other's row and is then refused.
            assert error.sqlstate in ("LS003", "23505"), error
            assert error.sqlstate == "LS003" or guard == "lease_guard_at_commit"
            count("refused")
            return False
        count("committed")
        return True

    def kill():
        choose = random.Random(1)
        killer = db.connect()
        while time.monotonic() < until:
            time.sleep(choose.uniform(0.02, 0.2))
            if pids:
                killer.execute("SELECT pg_terminate_backend(%s)", (choose.choice(list(pids.values())),))

    futures = [start(work, number) for number in range(8)] + [start(kill)]
    for future in futures:
        future.result(stress_seconds + 60)

    (n,) = session.execute("SELECT n FROM counter").fetchone()
    written = session.execute("SELECT n, token FROM written ORDER BY n").fetchall()
    print(counts, "counter", n)
    assert [row[0] for row in written] == list(range(1, n + 1)), "an update was lost"
    assert counts["committed"] <= n <= counts["committed"] + counts["unknown"]
    tokens = [row[1] for row in written]
    assert tokens == sorted(tokens), "a former holder wrote after a later one"
    for what in ("committed", "refused", "killed"):
        assert counts[what], f"no {what}: this run has shown little: {counts}"
