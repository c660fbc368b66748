"""What a transaction that stays open does to a projection: dead rows that no VACUUM may remove."""

import time
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median

from load import Pgbench
from logs import Log
from measure import Goal, Measurement
from peers import insert, lockstep, message_db
from schedule import Cell, Subject

RATE = 1000  # appends a second
TURNS = 400  # of the consumer, a second: few enough for nearly each to find events, since one that finds none takes a fraction of the time
LOGS = [Log(module.PEER, suffix="_decay") for module in (insert, lockstep, message_db)]


@contextmanager
def open_transaction(server, database):
    with server.connect(database) as holder:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT 1")
        yield
        holder.execute("ROLLBACK")


@contextmanager
def autovacuum(server):
    """As it is by default, but looking every 5 seconds, so that it has its chance in a short run."""
    server.execute("postgres", "ALTER SYSTEM SET autovacuum = on", "ALTER SYSTEM SET autovacuum_naptime = '5s'", "SELECT pg_reload_conf()")
    try:
        yield
    finally:
        server.execute("postgres", "ALTER SYSTEM RESET autovacuum", "ALTER SYSTEM RESET autovacuum_naptime", "SELECT pg_reload_conf()")


def tenths(took):
    """The median of the last tenth over that of the first."""
    part = max(1, len(took) // 10)
    return median(took[-part:]) / max(median(took[:part]), 1e-6)


def measure(bench, log, held):
    """How much longer a consumer's turn takes at the end than at the beginning, beside appends; with a transaction open or not."""
    log.reset(1)
    with autovacuum(log.server):
        # Before the transaction, so that the log is not empty for it.
        log.write(1, 4, rate=RATE).finish()
        with open_transaction(log.server, log.database) if held else nullcontext(), log.write(bench.hold, 4, rate=RATE) as writers:
            turns = Pgbench(log.server, log.database, log.turn(100), 1, bench.hold - 1, rate=TURNS, options=log.peer.options)
            with turns:
                took = turns.finish().took
            writers.finish()
        with log.polled(1, 1):
            time.sleep(0.2)
    lost, doubled = log.oracle(1)
    return Measurement(tenths(took), lost, doubled)


def cells(bench):
    subjects = [
        Subject("position > last seen" if log.peer.name == "insert" else log.peer.name, partial(measure, bench, log, True), partial(measure, bench, log, False))
        for log in LOGS
    ]
    yield Cell(
        "decay", f"a consumer's turn, after {bench.hold:g} s beside a REPEATABLE READ transaction", "times as long", "without that transaction", None,
        subjects, Goal(most=1.5), less_is_better=True, ahead=True, windows=0, extra=bench.hold + 4,
    )  # fmt: skip
