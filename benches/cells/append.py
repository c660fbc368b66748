"""Appends: one event a transaction, and batches."""

from functools import partial

from load import Pgbench
from measure import Goal, Measurement
from schedule import Cell, Subject
from systems import COPY, FAMILIES, INSERT, LOCKSTEP, MESSAGE_DB, PYTHON_INSERT, PYTHON_LOCKSTEP


def write(bench, log, clients, **how):
    return log.write_measured(bench.window, clients, **how)


def write_batches(bench, log, size, aggregates, clients):
    """Events a second of transactions with so many events, of one new aggregate or of so many that get 10 events each."""
    log.reset()
    names = [f":aggregate-{index % aggregates}" for index in range(size)]
    pushes = 1 if aggregates == 1 else 10
    script = f"\\set aggregate :first + :n / {pushes}\n\\set sequence (:n % {pushes}) * {size // aggregates} + 1\n"
    script += f"{log.peer.batch(names)}\\set n :n + 1\n"
    loaded = Pgbench(log.server, log.database, script, clients, bench.window, protocol="simple").finish()
    there, expected = log.committed(), loaded.count * size
    return Measurement(loaded.rate * size, max(0, expected - there), max(0, there - expected))


def single(bench, variant, logs, clients, goal=None, quick=False, **how):
    control, *others = logs
    measure = {log: partial(write, bench, log, clients, **how) for log in logs}
    subjects = [Subject(log.peer.name, measure[log]) for log in others]
    return Cell("append", variant, "events/s", "bare INSERT", measure[control], subjects, goal, ahead=len(others) > 1, quick=quick)


def cells(bench):
    for synchronous_commit, bound in ("on", 0.95), ("off", 0.85):
        for clients in 1, 8, 32:
            for size in (150, 2048) if synchronous_commit == "on" else (150,):
                yield single(
                    bench, f"{clients} clients, {size} B, synchronous_commit {synchronous_commit}", (INSERT, LOCKSTEP, MESSAGE_DB), clients,
                    Goal(bound), clients == 8 and size == 150 and synchronous_commit == "on", size=size,
                    options=f"-c synchronous_commit={synchronous_commit}",
                )  # fmt: skip
    for family in "Node", "Python", "PostgreSQL 15":
        for clients in (1, 8, 32) if family == "Node" else (1, 8):
            yield single(bench, f"{clients} clients, 150 B, {family}", FAMILIES[family], clients)
    for size in 10, 100, 1000:
        for aggregates in sorted({1, min(size, 100)}):
            for clients in 1, 8:
                measure = [partial(write_batches, bench, log, size, aggregates, clients) for log in (INSERT, LOCKSTEP)]
                yield Cell(
                    "append in batches", f"{size} events of {aggregates} aggregates, {clients} clients", "events/s", "multi-row INSERT",
                    measure[0], [Subject("lockstep", measure[1])], Goal(1.0),
                )  # fmt: skip
        logs = (PYTHON_INSERT, PYTHON_LOCKSTEP, COPY)
        measure = [partial(lambda log, size: log.write_batches(bench.window, size), log, size) for log in logs]
        yield Cell(
            "append in batches", f"{size} events, 1 client, Python", "events/s", "multi-row INSERT", measure[0],
            [Subject("lockstep", measure[1]), Subject("COPY", measure[2])],
        )  # fmt: skip
