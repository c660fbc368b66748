"""Pushes against bare INSERTs."""

import json

from bench import PAYLOAD, finish, psql

PUSH = "SELECT * FROM lockstep.push_event('order', :aggregate, 'paid', :payload);"
INSERT = """INSERT INTO bench.events
    (tenant, position, aggregate_type, aggregate_id, sequence, event_type, event_id, payload, metadata, created_at)
VALUES """
ROW = "('', nextval('bench.position'), 'order', {aggregate}, {sequence}, 'paid', NULL, {payload}, NULL, clock_timestamp())"


def event(aggregate):
    names = {"aggregate_type": "order", "aggregate_id": aggregate, "event_type": "paid"}
    return json.dumps({**names, "payload": json.loads(PAYLOAD)})


def literal(text):
    return "'" + text.replace("'", "''") + "'"


def single(push):
    """One event a transaction, the values passed as parameters; 10 events an aggregate."""
    statement = PUSH if push else INSERT + ROW.format(aggregate=":aggregate", sequence=":sequence", payload=":payload") + ";"
    return f"\\set aggregate :first + :n / 10\n\\set sequence :n % 10 + 1\n{statement}\n\\set n :n + 1\n"


def batch(push, aggregates):
    """100 events a transaction, all values literals in the statement's text: of one new aggregate, or of 100, of which each gets
    10 events before a client goes on to new ones."""
    names = [f":aggregate-{index % aggregates}" for index in range(100)]
    if push:
        statement = f"SELECT * FROM lockstep.push_events({literal('[' + ', '.join(map(event, names)) + ']')})"
    else:
        rows = (
            ROW.format(aggregate=literal(name), sequence=f":sequence + {index // aggregates}", payload=literal(PAYLOAD))
            for index, name in enumerate(names)
        )
        statement = INSERT + ",\n".join(rows)
    pushes = 1 if aggregates == 1 else 10
    return f"\\set aggregate :first + :n / {pushes}\n\\set sequence :n % {pushes} + 1\n{statement};\n\\set n :n + 1\n"


SLOW_WRITER = """BEGIN;
SELECT * FROM lockstep.push_event('order', 'slow', 'paid', :payload);
\\sleep 1 s
COMMIT;
"""

PROJECTION = """\\set number :client_id + 1
BEGIN;
SELECT count(*) FROM lockstep.projection_claim('p' || :number, max_events => 1000);
SELECT lockstep.projection_advance('p' || :number);
COMMIT;
\\sleep 100 ms
"""

# Their cursors start at the end of the log that the cells before have left.
PROJECTIONS = """SELECT lockstep.projection_drop(name) FROM lockstep.projections;
SELECT lockstep.projection_create('p' || n, start_after => NULL) FROM generate_series(1, 8) AS n"""


def writers_p99(bench, projections):
    """Milliseconds at the 99th percentile of 8 writers that push 400 events a second together, beside a slow writer."""
    psql("-c", "CHECKPOINT", "-c", PROJECTIONS)
    prefix = bench.directory / f"latency-{bench.runs}"
    beside = [bench.start(SLOW_WRITER, 1)]
    if projections:
        beside.append(bench.start(PROJECTION, 8))
    writers = bench.start(single(True), 8, extra=("-R", 400, "-l", "--log-prefix", prefix))
    for process in [writers, *beside]:
        finish(process)
    lines = [line.split() for log in bench.directory.glob(f"{prefix.name}.*") for line in log.read_text().splitlines()]
    first = min(int(line[4]) for line in lines)
    took = sorted(int(line[2]) / 1000 for line in lines if int(line[4]) > first)
    return took[len(took) * 99 // 100]


def cells(bench):
    """Name, unit, goal, and how to measure the control and the candidate. A goal is a least or a greatest ratio."""
    for synchronous_commit, goal in ("on", 0.95), ("off", 0.85):
        for clients in 1, 8, 32:

            def push(push, clients=clients, synchronous_commit=synchronous_commit):
                return bench.rate(single(push), clients=clients, synchronous_commit=synchronous_commit)

            yield f"push_event, {clients} clients, synchronous_commit {synchronous_commit}", "tps", (">=", goal), push
    for aggregates in 1, 100:
        for clients in 1, 8:

            def push_many(push, clients=clients, aggregates=aggregates):
                return bench.rate(batch(push, aggregates), clients=clients, protocol="simple")

            yield f"push_events, 100 events of {aggregates} aggregates, {clients} clients", "tps", (">=", 1.0), push_many
    yield "writers' p99 beside 8 projections", "ms", ("<=", 1.5), lambda projections: writers_p99(bench, projections)
