"""From commit to applied."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

from cells.worker import NONE, applied, following, listener, wait_until
from logs import Log
from measure import Goal, Measurement, tail
from peers import followed, listen_notify
from schedule import Cell, Subject

CLIENTS = 4
WORKERS = Log(followed.PEER, "latency")
NOTIFYING = Log(replace(followed.PEER, append=listen_notify.APPEND), "latency", "_notify")

# By the server's own record of commits: until the commit record of what was applied, from that of the push, which is written before the push's
# flush. The warm-up is left out.
LATENCY = """WITH pair AS (
    SELECT e.created_at, pg_xact_commit_timestamp(a.xmin) - pg_xact_commit_timestamp(e.xmin) AS waited
    FROM bench.applied AS a JOIN lockstep.events AS e ON e.tenant = '' AND e.position = a.position
)
SELECT extract(epoch FROM created_at - begun), extract(epoch FROM waited) * 1000
FROM pair, (SELECT min(created_at) AS begun FROM pair) AS first WHERE created_at > begun + interval '1 second'"""


def measure(bench, rate, workers):
    """Milliseconds at the 99th percentile."""
    log = WORKERS if workers else NOTIFYING
    log.reset()
    if workers:
        wait_until(log, "lockstep.workers_are_on()")
    with following(log, "bench_worker" if workers else "postgres"), nullcontext() if workers else listener(log):
        log.write(bench.tail, CLIENTS, rate=rate).finish()
        lost, doubled = applied(log)
        waited = [(float(due), float(milliseconds)) for due, milliseconds in log.sql(LATENCY)]
    return Measurement(tail(waited), lost, doubled, 0, {"p50": median(milliseconds for _, milliseconds in waited)})


def pushes(bench, rate, workers):
    """Milliseconds of the pushes' 99th percentile at that rate, beside workers that apply all or on a server without them."""
    log = WORKERS if workers else NONE
    log.reset()
    if workers:
        wait_until(log, "lockstep.workers_are_on()")
    with following(log, "bench_worker") if workers else nullcontext():
        loaded = log.write(bench.tail, CLIENTS, rate=rate).finish()
        lost, doubled = applied(log) if workers else (0, 0)
    measured = log.measurement_of(loaded)
    return Measurement(loaded.p99, measured.lost + lost, measured.doubled + doubled, 0, {"p50": median(loaded.took)})


def cells(bench):
    for rate in 100, 1000:
        yield Cell(
            "latency", f"p99 of pushes, {rate:,} a second, beside workers that apply all", "ms", "pushes without the library preloaded",
            partial(pushes, bench, rate, False), [Subject("lockstep", partial(pushes, bench, rate, True))], Goal(most=1.2), less_is_better=True,
            windows=0, extra=1.6 + bench.tail,
        )  # fmt: skip
        yield Cell(
            "latency", f"commit to applied, p99, {rate:,} pushes a second", "ms", "LISTEN/NOTIFY and a client", partial(measure, bench, rate, False),
            [Subject("lockstep", partial(measure, bench, rate, True))], Goal(most=5, of="value", unit="ms"), less_is_better=True, windows=0, extra=1.6 + bench.tail,
        )  # fmt: skip
