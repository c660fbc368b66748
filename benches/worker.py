"""Workers: how soon they apply what was pushed, what they cost those who push, how fast they catch up. The control is a server that
does not preload the library, or a client that is woken by NOTIFY.

PGHOST_WORKERS is a server that preloads the library, with lockstep.databases = 'lockstep_bench, lockstep_bench_catchup' and a
max_worker_processes of 16; PGHOST_LATENCY another one, with track_commit_timestamp besides."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import cache

from bench import DATABASE, HERE, create_database, finish, psql
from projection import PYTHON
from push import single

CATCH_UP = f"{DATABASE}_catchup"

NOTIFYING_PUSH = "SELECT *, pg_notify('pushed', '') FROM lockstep.push_event('order', :aggregate, 'paid', :payload);"

FILL = """INSERT INTO lockstep.events
SELECT '', n, 'order', (n / 10)::text, n % 10 + 1, 'paid', NULL, jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), NULL, now()
FROM generate_series(1, {events}) AS n;
SELECT lockstep.ticket_resync()"""

# By the servers' own record of commits: until the commit record of what was applied, from that of the push, which is written before
# the push's flush. The first second is left out.
LATENCY = """WITH pair AS (
    SELECT e.created_at, pg_xact_commit_timestamp(a.xmin) - pg_xact_commit_timestamp(e.xmin) AS waited
    FROM bench.applied AS a JOIN lockstep.events AS e ON e.tenant = '' AND e.position = a.position
)
SELECT extract(epoch FROM percentile_disc({part}) WITHIN GROUP (ORDER BY waited)) * 1000 FROM pair
WHERE created_at > (SELECT min(created_at) FROM pair) + interval '1 second'"""


@contextmanager
def server(name):
    """Makes another server that of all clients."""
    plain = os.environ["PGHOST"]
    os.environ["PGHOST"] = os.environ[f"PGHOST_{name}"]
    try:
        prepare(name)
        yield
    finally:
        os.environ["PGHOST"] = plain


@cache
def prepare(name):
    if name:
        create_database(DATABASE)
        psql("-f", HERE / "setup.sql")
    psql("-f", HERE / "worker.sql")


def query(text, database=DATABASE):
    command = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", text]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def wait_for(condition, database=DATABASE):
    while query(f"SELECT {condition}", database) != "t":
        time.sleep(0.02)


@contextmanager
def following(owner):
    """A projection that applies what is pushed meanwhile."""
    psql("-c", f"CALL bench.follow('{owner}')")
    try:
        yield
    finally:
        psql("-c", "SELECT lockstep.projection_drop('follow')")


@contextmanager
def asynchronous():
    """Workers that begin now do not wait for the disk at COMMIT, and no others are left."""
    end = "SELECT pg_terminate_backend(pid, 10000) FROM lockstep.worker_status WHERE pid IS NOT NULL"
    psql("-c", "ALTER ROLE bench_worker SET synchronous_commit = off", "-c", end)
    try:
        yield
    finally:
        psql("-c", "ALTER ROLE bench_worker RESET synchronous_commit", "-c", end)


@contextmanager
def listener():
    process = subprocess.Popen([PYTHON, HERE / "listener.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    try:
        yield
    finally:
        if process.poll() is not None:
            sys.exit("the listener has ended")
        process.communicate()


def notifying():
    return single(True).replace("SELECT * FROM lockstep.push_event('order', :aggregate, 'paid', :payload);", NOTIFYING_PUSH)


def push_rate(bench, clients, how):
    """Pushes a second. how: "off"; "on" (workers, and a projection that applies all); "async" (the same, whose commits do not wait for the
    disk); "woken" (workers with nothing to apply); "notify"."""
    if how == "off":
        return bench.rate(single(True), clients=clients)
    if how == "notify":
        prepare("")
        with following("postgres"), listener():
            return bench.rate(notifying(), clients=clients)
    with server("WORKERS"):
        wait_for("lockstep.workers_are_on()")
        with nullcontext() if how == "woken" else following("bench_worker"), asynchronous() if how == "async" else nullcontext():
            return bench.rate(single(True), clients=clients)


def latency(bench, rate, part, workers):
    """Milliseconds from a push's commit until it was applied, at this part of the pushes."""
    with server("LATENCY"):
        wait_for("lockstep.workers_are_on()")
        psql("-c", "CHECKPOINT")
        with following("bench_worker" if workers else "postgres"), nullcontext() if workers else listener():
            script = single(True) if workers else notifying()
            finish(bench.start(script, clients=4, extra=("-R", rate)))
            wait_for("lockstep.projection_wait('follow', lockstep.horizon(), '1 minute')")
            return float(query(LATENCY.format(part=part)))


def catch_up(bench, workers):
    """Events a second, each counted for each of 16 projections."""
    with server("WORKERS"):
        fill(bench.large)
        psql("-c", f"ALTER SYSTEM SET lockstep.workers = {workers}", "-c", "SELECT pg_reload_conf()", "-c", "CHECKPOINT")
        wait_for("lockstep.workers_are_on()", CATCH_UP)
        psql("-d", CATCH_UP, "-c", "VACUUM ANALYZE", "-c", "CALL bench.follow_16()")
        begun = time.monotonic()
        wait_for("bool_and(lockstep.projection_wait(name, (SELECT max(position) FROM lockstep.events), '1 hour')) FROM lockstep.projections", CATCH_UP)
        seconds = time.monotonic() - begun
        psql("-c", "ALTER SYSTEM RESET lockstep.workers", "-c", "SELECT pg_reload_conf()")
        return 16 * bench.large / seconds


@cache
def fill(events):
    create_database(CATCH_UP)
    psql("-d", CATCH_UP, "-f", HERE / "setup.sql", "-f", HERE / "worker.sql", "-c", FILL.format(events=events))


def cells(bench):
    if "PGHOST_WORKERS" not in os.environ:
        return
    for rate in 100, 1000:
        for part, goal in (0.5, ("", "-")), (0.99, ("<", "5 ms")):
            yield (
                f"commit to applied, p{part * 100:.0f} at {rate:,} pushes/s, workers against NOTIFY", "ms", goal,
                lambda workers, rate=rate, part=part: latency(bench, rate, part, workers),
            )  # fmt: skip
    for how, words, goal in (
        ("on", "workers that apply all against none", (">=", 0.95)),
        ("async", "workers that apply all with synchronous_commit off against none", (">=", 0.95)),
        ("woken", "workers with nothing to apply against none", (">=", 0.95)),
        ("notify", "NOTIFY and a client that applies all against none", ("", "-")),
    ):
        for clients in 1, 8, 32:
            yield (
                f"push_event, {clients} clients, {words}", "tps", goal,
                lambda on, clients=clients, how=how: push_rate(bench, clients, how if on else "off"),
            )  # fmt: skip
    for workers, goal in (2, ("", "-")), (4, ("", "-")):
        yield (
            f"catch-up of 16 projections over {bench.large:,} events, {workers} workers against 1", "events/s", goal,
            lambda many, workers=workers: catch_up(bench, workers if many else 1),
        )  # fmt: skip
