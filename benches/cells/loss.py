"""Overlapping writers and a consumer that reads on: who passes everything on?"""

from functools import partial

from measure import Measurement
from schedule import Cell, Subject
from systems import FAMILIES, QUEUED_BARRIER, SNAPSHOT_XMIN

WRITERS = 8
HOLD = 20  # milliseconds, at most, between an append and its COMMIT, where the peer lets its caller have the transaction


def write(bench, log, consumers):
    """Events a second of the writers, with a consumer beside them or without; and what the consumer was not passed."""
    log.reset(consumers)
    with log.polled(consumers, bench.window):
        loaded = log.write(bench.window, WRITERS, hold=HOLD).finish()
    there = log.committed()
    lost, doubled = log.oracle(consumers) if consumers else (0, 0)
    return Measurement(loaded.rate, lost + max(0, loaded.count - there), doubled, loaded.failed, {"committed": there})


def cells(bench):
    """The control of each system is that system without the consumer: what differs between systems are what their readers cost and lose."""
    readers = {"SQL": (QUEUED_BARRIER, SNAPSHOT_XMIN)}
    for family, logs in FAMILIES.items():
        subjects = []
        for log in (*logs, *readers.get(family, ())):
            name = "position > last seen" if log.peer.name == "insert" else log.peer.name
            subjects.append(Subject(name, partial(write, bench, log, 1), partial(write, bench, log, 0)))
        yield Cell("loss", f"{WRITERS} writers, {family}", "events/s", "its own writers alone", None, subjects, quick=family == "SQL", extra=2.2)
