"""What readers do to writers, and what a writer's open transaction does to readers of others."""

import time
from contextlib import nullcontext
from functools import partial

from load import Pgbench
from measure import Goal, Measurement, tail
from peers import payload
from schedule import Cell, Subject
from servers import server
from systems import INSERT, LOCKSTEP, QUEUED_BARRIER, SNAPSHOT_XMIN

WRITERS, RATE = 8, 400  # together, events a second

# The age of the oldest event that is committed, as far as one sees, and not yet applied by consumer 1.
OLDEST = {
    LOCKSTEP: """SELECT extract(epoch FROM clock_timestamp() - min(e.created_at)) * 1000 FROM (
        SELECT created_at FROM lockstep.events WHERE tenant = '' AND position > coalesce(
            (SELECT position FROM lockstep.projection_cursors WHERE projection = 'consumer 1' AND tenant = ''), 0)
        ORDER BY position LIMIT 100) AS e""",
    QUEUED_BARRIER: """SELECT extract(epoch FROM clock_timestamp() - min(e.created_at)) * 1000 FROM (
        SELECT created_at FROM bench.events WHERE tenant = '' AND position > (SELECT position FROM bench.cursors WHERE consumer = 1)
        ORDER BY position LIMIT 100) AS e""",
    SNAPSHOT_XMIN: """SELECT extract(epoch FROM clock_timestamp() - min(e.created_at)) * 1000 FROM (
        SELECT e.created_at FROM bench.events AS e, bench.cursors AS c
        WHERE c.consumer = 1 AND (e.transaction_id, e.position) > (c.transaction_id, c.position)
        ORDER BY e.transaction_id, e.position LIMIT 100) AS e""",
}


def slow_writer(log, hold, where, seconds):
    """A client whose transactions have appended and stay open for so long (milliseconds)."""
    place, database, options = log.server, log.database, log.peer.options
    push = f"{log.peer.before}{log.peer.append}"
    if where == "another tenant" and log is LOCKSTEP:
        push = "SELECT * FROM lockstep.push_event('order', :aggregate, 'paid', :payload, NULL, NULL, 'other');\n"
    elif where == "another database":
        place, database = server("plain"), "postgres"
        push = "SELECT pg_current_xact_id();\n"
    script = f"\\set aggregate :first + :n\n\\set sequence 1\nBEGIN;\n{push}\\sleep {int(hold)} ms\nCOMMIT;\n\\set n :n + 1\n"
    return Pgbench(place, database, script, 1, seconds, variables={"payload": payload(150)}, options=options)


def length(bench, hold):
    return max(bench.tail, hold / 1000 + 1)


def p99(bench, log, hold, where, consumers):
    """Milliseconds of the writers' 99th percentile; and what the consumers were not passed."""
    log.reset(consumers)
    seconds = length(bench, hold)
    with log.polled(consumers, seconds), slow_writer(log, hold, where, seconds) as slow:
        loaded = log.write(seconds, WRITERS, rate=RATE).finish()
        slow.finish()
    lost, doubled = log.oracle(consumers) if consumers else (0, 0)
    return Measurement(loaded.p99, lost, doubled, 0, {"rate": loaded.rate})


def age(bench, log, hold):
    """Milliseconds: the 99th percentile of the age of the oldest unapplied event; hold 0: without a slow writer."""
    log.reset(1)
    seconds, ages = length(bench, hold), []
    with log.polled(1, seconds):
        slow = slow_writer(log, hold, "another tenant", seconds) if hold else nullcontext()
        with slow, log.write(seconds, WRITERS, rate=RATE) as writers, log.server.connect(log.database) as observer:
            while writers.process.poll() is None:
                (oldest,) = observer.execute(OLDEST[log]).fetchone()
                ages.append((time.monotonic(), float(oldest or 0)))
                time.sleep(0.02)
            writers.finish()
            if hold:
                slow.finish()
    lost, doubled = log.oracle(1)
    return Measurement(tail(ages), lost, doubled)


def cells(bench):
    variants = [(hold, "the same tenant", 8) for hold in (100, 1000, 10000)]
    variants += [(1000, where, 8) for where in ("another tenant", "another database")]
    variants += [(1000, "the same tenant", consumers) for consumers in (1, 64)]
    for hold, where, consumers in variants:
        logs = [LOCKSTEP]
        if (hold, where, consumers) == (1000, "the same tenant", 8):
            logs += [INSERT, QUEUED_BARRIER, SNAPSHOT_XMIN]
        elif consumers == 64:
            logs += [INSERT]  # what the consumers' work alone does to the writers
        subjects = [
            Subject(
                "position > last seen" if log is INSERT else log.peer.name,
                partial(p99, bench, log, hold, where, consumers), partial(p99, bench, log, hold, where, 0),
            )
            for log in logs
        ]  # fmt: skip
        yield Cell(
            "stall", f"p99 of pushes, {consumers} projections, a transaction open {hold / 1000:g} s in {where}", "ms", "without projections",
            None, subjects, Goal(most=1.5), less_is_better=True, windows=0, extra=1.6 + length(bench, hold),
        )  # fmt: skip
    for hold in 1000, 10000:
        subjects = [Subject(log.peer.name, partial(age, bench, log, hold), partial(age, bench, log, 0)) for log in OLDEST]
        yield Cell(
            "age", f"oldest unapplied event, a transaction open {hold / 1000:g} s in another tenant", "ms", "without that transaction",
            None, subjects, Goal(most=1.2), less_is_better=True, windows=0, extra=1.6 + length(bench, hold),
        )  # fmt: skip
