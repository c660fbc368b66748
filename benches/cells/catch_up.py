"""Catching up: consumers at the beginning of a log of a million events, as fast as they can."""

from functools import cache, partial

from load import Pgbench
from logs import ClientLog, Log
from measure import Goal, Measurement
from peers import insert, lockstep, message_db, pgq
from peers import eventsourcing_python as eventsourcing
from schedule import Cell, Subject
from systems import EMMETT_PEER

EVENTS = 1_000_000
BATCH = 1000

# In databases of their own, because other cells empty theirs.
INSERT, LOCKSTEP, MESSAGE_DB = (Log(module.PEER, suffix="_large") for module in (insert, lockstep, message_db))
OLD_INSERT, OLD_LOCKSTEP, PGQ = (Log(module.PEER, "old", "_large") for module in (insert, lockstep, pgq))
NODE = [ClientLog(peer, "node", program, suffix="_node_large") for peer, program in ((insert.PEER, "insert"), (lockstep.PEER, "lockstep"), (EMMETT_PEER, "emmett"))]
PYTHON = [
    ClientLog(peer, "python", program, suffix="_python_large")
    for peer, program in ((insert.PEER, "insert"), (lockstep.PEER, "lockstep"), (eventsourcing.PEER, "eventsourcing_python"))
]


@cache
def filled(log, events):
    log.fill(events)


def rewind(bench, log, consumers):
    filled(log, min(EVENTS, bench.large))
    log.sql(log.peer.rewind.replace("{consumers}", str(consumers)))
    log.server.settle(log.database)


def passed(log, seconds, consumers):
    """Events a second, of all consumers together. The oracle, for the part of the log that was read: as many events as the consumer that was
    passed the fewest has are to be the log's first ones, and each consumer was passed each of them once."""
    lost, doubled, count = log.sql(
        f"""WITH passed AS MATERIALIZED (SELECT consumer, position, count(*) AS times FROM bench.applied GROUP BY 1, 2),
        log AS MATERIALIZED (
            SELECT position FROM ({log.peer.committed}) AS c (position) ORDER BY position
            LIMIT (SELECT min(n) FROM (SELECT count(*) AS n FROM passed GROUP BY consumer) AS counted)
        )
        SELECT count(*) FILTER (WHERE times IS NULL), coalesce(sum(times - 1), 0)::bigint, (SELECT sum(times) FROM passed)::bigint
        FROM generate_series(1, {consumers}) AS c (consumer) CROSS JOIN log LEFT JOIN passed USING (consumer, position)"""
    )[0]
    if not count:
        raise RuntimeError(f"{log} was passed nothing")
    return Measurement(count / seconds, lost, doubled, 0, {"events": count})


def by_sql(bench, log, consumers, each):
    """Events a second, of all consumers together; each takes the same number of turns."""
    rewind(bench, log, consumers)
    turns = max(2, bench.catch_up * (1 if each else 10) // BATCH // max(1, consumers // 2))
    spare = 2 if log is PGQ else 0  # a tick without events is a turn too
    script = lockstep.RUN if log in (LOCKSTEP, OLD_LOCKSTEP) else log.turn
    script = script(BATCH, each) if callable(script) else script.format(batch=BATCH, each=str(each).lower())
    loaded = Pgbench(log.server, log.database, script, consumers, turns=turns + spare, options=log.peer.options).finish()
    return passed(log, loaded.seconds, consumers)


def by_client(bench, log, consumers):
    rewind(bench, log, consumers)
    events = bench.catch_up // 10 // consumers // BATCH * BATCH or BATCH
    loaded = log.driver("catchup", consumers, BATCH, events).finish()
    return passed(log, loaded.seconds, consumers)


def cells(bench):
    for each in False, True:
        for consumers in 1, 4, 16:
            handler = "a handler of one event" if each else "a handler of sets"
            logs = (INSERT, LOCKSTEP, MESSAGE_DB)
            measure = [partial(by_sql, bench, log, consumers, each) for log in logs]
            yield Cell(
                "catch-up", f"{consumers} projections, {handler}, SQL", "events/s", "an unprotected loop", measure[0],
                [Subject(log.peer.name, case) for log, case in zip(logs[1:], measure[1:], strict=True)], Goal(0.9), ahead=True,
                windows=0, extra=4, once=10,
            )  # fmt: skip
    for each in False, True:
        logs = (OLD_INSERT, OLD_LOCKSTEP, PGQ)
        measure = [partial(by_sql, bench, log, 1, each) for log in logs]
        yield Cell(
            "catch-up", f"1 projection, a handler of {'one event' if each else 'sets'}, PostgreSQL 15", "events/s", "an unprotected loop", measure[0],
            [Subject(log.peer.name, case) for log, case in zip(logs[1:], measure[1:], strict=True)], ahead=True, windows=0, extra=4, once=20,
        )  # fmt: skip
    for family, logs in ("Node", NODE), ("Python", PYTHON):
        for consumers in (1, 4) if family == "Node" else (1,):
            measure = [partial(by_client, bench, log, consumers) for log in logs]
            yield Cell(
                "catch-up", f"{consumers} projections, a client that applies each event, {family}", "events/s", "an unprotected loop", measure[0],
                [Subject(log.peer.name, case) for log, case in zip(logs[1:], measure[1:], strict=True)], ahead=True, windows=0, extra=6, once=30,
            )  # fmt: skip
