"""All clients append to one aggregate."""

from functools import partial

from schedule import Cell, Subject
from systems import FAMILIES

CLIENTS = 32


def write(bench, log):
    log.reset()
    loaded = log.write(bench.window, CLIENTS, hot=True).finish()
    return log.measurement_of(loaded)


def cells(bench):
    for family in "SQL", "Node", "Python":
        control, *others = FAMILIES[family]
        yield Cell(
            "hot aggregate", f"{CLIENTS} clients, {family}", "events/s", "a row that counts, and INSERT", partial(write, bench, control),
            [Subject(log.peer.name, partial(write, bench, log)) for log in others], ahead=True,
        )  # fmt: skip
