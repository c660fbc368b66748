"""Workers in the server: what they cost those who push, and how fast they catch up together. The control does not preload the library."""

import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial

from load import HERE, Load
from logs import Log
from measure import Goal, Measurement
from peers import followed, listen_notify
from schedule import Cell, Subject

NONE = Log(followed.PEER, suffix="_none")
NOTIFYING = Log(replace(followed.PEER, append=listen_notify.APPEND), suffix="_notify")
WORKERS = Log(followed.PEER, "workers")
MANY = Log(followed.PEER, "workers", "_many")


def wait_until(log, condition, timeout=120):
    deadline = time.monotonic() + timeout
    while not log.value(f"SELECT {condition}"):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{condition} did not come true")
        time.sleep(0.02)


@contextmanager
def following(log, owner):
    """A projection that applies what is pushed meanwhile."""
    log.sql(f"CALL bench.follow('{owner}')")
    try:
        yield
    finally:
        log.sql("SELECT lockstep.projection_drop('follow')")


@contextmanager
def asynchronous(log):
    """Workers that begin now do not wait for the disk at COMMIT, and no others are left."""
    end = "SELECT pg_terminate_backend(pid, 10000) FROM lockstep.worker_status WHERE pid IS NOT NULL"
    log.sql("ALTER ROLE bench_worker SET synchronous_commit = off", end)
    try:
        yield
    finally:
        log.sql("ALTER ROLE bench_worker RESET synchronous_commit", end)


@contextmanager
def listener(log):
    with Load([sys.executable, "-m", "peers.listen_notify"], log.server.environment(log.database), cwd=HERE) as client:
        wait_until(log, "EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'LISTEN%' OR query LIKE '%projection_run%' AND pid <> pg_backend_pid())")
        yield
        if client.process.poll() is not None:
            client.finish()
            raise RuntimeError("the listener has ended")
        client.stop()


def applied(log):
    """The oracle: everything that was pushed was applied once. Waits for it."""
    wait_until(log, "lockstep.projection_wait('follow', lockstep.horizon(), '1 minute')")
    return log.oracle(1)


def push(bench, clients, how):
    """Pushes a second. how: "none"; "all" (workers, and a projection that applies all); "asynchronous" (the same, whose commits do not wait for
    the disk); "idle" (workers with nothing to apply); "notify" (a client that listens)."""
    log = {"none": NONE, "notify": NOTIFYING}.get(how, WORKERS)
    log.reset()
    if how in ("none", "idle"):
        return log.measurement_of(log.write(bench.window, clients).finish())
    if log is WORKERS:
        wait_until(log, "lockstep.workers_are_on()")
    owner = "postgres" if how == "notify" else "bench_worker"
    with following(log, owner), listener(log) if how == "notify" else asynchronous(log) if how == "asynchronous" else nullcontext():
        measured = log.measurement_of(log.write(bench.window, clients).finish())
        lost, doubled = applied(log)
    return replace(measured, lost=measured.lost + lost, doubled=measured.doubled + doubled)


@cache
def fill(events):
    MANY.fill(events)


def catch_up(bench, workers):
    """Events a second, each counted for each of 16 projections, in a log of so many events."""
    events = min(bench.large // 10, 200_000)
    fill(events)
    MANY.sql(f"ALTER SYSTEM SET lockstep.workers = {workers}", "SELECT pg_reload_conf()")
    MANY.server.settle(MANY.database)
    wait_until(MANY, "lockstep.workers_are_on()")
    begun = time.monotonic()
    MANY.sql("CALL bench.follow_16()")
    wait_until(
        MANY, "bool_and(lockstep.projection_wait(name, (SELECT max(position) FROM lockstep.events), '1 minute')) FROM lockstep.projections", 3600
    )
    seconds = time.monotonic() - begun
    counts = [MANY.sql(f"SELECT {events} - count(DISTINCT position), count(*) - count(DISTINCT position) FROM bench.applied_{n}")[0] for n in range(1, 17)]
    MANY.sql("ALTER SYSTEM RESET lockstep.workers", "SELECT pg_reload_conf()", "SELECT lockstep.projection_drop(name) FROM lockstep.projections")
    lost, doubled = (sum(count) for count in zip(*counts, strict=True))
    return Measurement(16 * events / seconds, lost, doubled)


def cells(bench):
    for clients in 1, 8, 32:
        cases = [("workers that apply all", "all", None)]
        if clients == 8:
            cases += [
                ("workers that apply all, synchronous_commit off", "asynchronous", None), ("workers with nothing to apply", "idle", Goal(0.95)),
                ("NOTIFY and a client", "notify", None),
            ]  # fmt: skip
        for words, how, goal in cases:
            yield Cell(
                "workers", f"pushes, {clients} clients, beside {words}", "events/s", "pushes without the library preloaded",
                partial(push, bench, clients, "none"), [Subject("lockstep", partial(push, bench, clients, how))], goal, extra=3,
            )  # fmt: skip
    for workers in 2, 4:
        yield Cell(
            "workers", f"catch-up of 16 projections, {workers} workers", "events/s", "1 worker", partial(catch_up, bench, 1),
            [Subject("lockstep", partial(catch_up, bench, workers))], windows=0, extra=20, once=10,
        )  # fmt: skip
