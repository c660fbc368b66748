"""Jobs: against a table worked on with SKIP LOCKED, against other queues in Node, in a large backlog, and beside an open transaction."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

from cells.decay import autovacuum, open_transaction, tenths
from load import Driver, Pgbench
from measure import Goal, Measurement
from peers import install, skip_locked
from schedule import Cell, Subject
from servers import server

BACKLOGS = 1_000, 100_000, 1_000_000
PAYLOAD = '{"n": 1}'
NEXT = "\\set n :n + 1\n"


@dataclass(frozen=True)
class Queue:
    name: str
    schema: str
    fill: str
    enqueue: str
    work: str  # claims one and completes it
    work_in_one: str  # completes the last one and claims the next in one transaction, where the queue can
    left: str  # SQL: how many jobs are not done
    table: str
    kept: int = 0  # how many claimed ones `work_in_one` leaves a client with


SKIP_LOCKED = Queue(
    "skip_locked", skip_locked.SCHEMA, skip_locked.FILL, skip_locked.ENQUEUE, skip_locked.WORK, skip_locked.WORK, skip_locked.LEFT,
    "queue",
)  # fmt: skip
LOCKSTEP = Queue(
    "lockstep",
    "CREATE EXTENSION lockstep",
    "SELECT count(*) FROM (SELECT lockstep.job_enqueue('bench', 'key ' || n, 'work', '{{\"n\": 1}}') FROM generate_series(1, {jobs}) AS n) AS e",
    "SELECT * FROM lockstep.job_enqueue('bench', 'new ' || :first || ' ' || :n, 'work', :payload);\n",
    """SELECT job_id, token FROM lockstep.job_claim('bench', 'worker') \\gset
SELECT lockstep.job_complete(:job_id, :token);
""",
    """BEGIN;
SELECT lockstep.job_complete(:job_id, :token);
SELECT job_id, token FROM lockstep.job_claim('bench', 'worker') \\gset
COMMIT;
""",
    "SELECT count(*) FROM lockstep.jobs",
    "lockstep.jobs",
    1,
)
# How many jobs of the queues in Node are not done.
NODE_LEFT = {
    "skip_locked": SKIP_LOCKED.left,
    "lockstep": LOCKSTEP.left,
    "graphile_worker": "SELECT count(*) FROM graphile_worker.jobs",
    "pg_boss": "SELECT count(*) FROM pgboss.job WHERE state < 'completed'",
}


@cache
def create(queue, purpose):
    name = f"bench_jobs_{queue.name}_{purpose}"
    server("plain").create_database(name)
    server("plain").execute(name, queue.schema)
    return name


def database(queue, purpose, backlog):
    """A database with so many jobs ready, or about so many; its name."""
    name = create(queue, purpose)
    place = server("plain")
    if abs(place.value(name, queue.left) - backlog) > backlog / 10 + 100:
        place.execute(name, f"TRUNCATE {queue.table}", queue.fill.format(jobs=backlog))
    place.settle(name)
    return name


def measurement(rate, expected, left):
    return Measurement(rate, max(0, expected - left), max(0, left - expected))


def run(bench, queue, script, clients, backlog, left_over=0, enqueued=0):
    """Transactions a second. The oracle: what was there and what was enqueued is done or still there."""
    place, name = server("plain"), database(queue, backlog, backlog)
    before = place.value(name, queue.left)
    variables = {"payload": PAYLOAD, "job_id": 0, "token": 0}
    loaded = Pgbench(place, name, script + NEXT, clients, bench.window, variables=variables).finish()
    expected = before + left_over * clients + enqueued * loaded.count
    return measurement(loaded.rate, expected, place.value(name, queue.left))


def enqueue(bench, queue, clients):
    return run(bench, queue, queue.enqueue, clients, BACKLOGS[0], enqueued=1)


def cycle(bench, queue, clients, backlog, in_one=False):
    work = queue.work_in_one if in_one else queue.work
    return run(bench, queue, queue.enqueue + work, clients, backlog, queue.kept if in_one else 0)


def microseconds(bench, backlog):
    measured = cycle(bench, LOCKSTEP, 8, backlog)
    return Measurement(1e6 / measured.value, measured.lost, measured.doubled)


@cache
def node_database(program):
    install.node()
    name = f"bench_jobs_node_{program}"
    server("plain").create_database(name)
    for queue in (SKIP_LOCKED, LOCKSTEP):
        if queue.name == program:
            server("plain").execute(name, queue.schema)
    Driver("node", server("plain"), name, program, "create").finish()
    return name


def node(bench, program, verb, number, seconds=None):
    """Jobs a second, of 100,000 ready."""
    place, name = server("plain"), node_database(program)
    missing = 100_000 - place.value(name, NODE_LEFT[program])
    if missing > 50_000:
        Driver("node", place, name, program, "fill", missing).finish()
    place.settle(name)
    before = place.value(name, NODE_LEFT[program])
    loaded = Driver("node", place, name, program, verb, number, seconds or bench.window).finish()
    sign = 1 if verb == "enqueue" else -1
    return measurement(loaded.rate, before + sign * loaded.count, place.value(name, NODE_LEFT[program]))


def decay(bench, queue, held):
    """How much longer a turn takes after that time, beside a transaction that stays open or without one."""
    place, name = server("plain"), database(queue, "decay", BACKLOGS[1])
    before = place.value(name, queue.left)
    variables = {"payload": PAYLOAD, "job_id": 0, "token": 0}
    with autovacuum(place), open_transaction(place, name) if held else nullcontext():
        loaded = Pgbench(place, name, queue.enqueue + queue.work + NEXT, 8, bench.hold, variables=variables, rate=200).finish()
    return measurement(tenths(loaded.took), before, place.value(name, queue.left))


def cells(bench):
    for clients in 1, 8, 32:
        yield Cell(
            "jobs", f"job_enqueue, {clients} clients", "jobs/s", "INSERT into a table", partial(enqueue, bench, SKIP_LOCKED, clients),
            [Subject("lockstep", partial(enqueue, bench, LOCKSTEP, clients))], Goal(0.7),
        )  # fmt: skip
    for backlog in BACKLOGS:
        for clients in 1, 8, 32:
            for in_one, words in (False, "claim and complete"), (True, "complete and claim in one transaction"):
                yield Cell(
                    "jobs", f"enqueue, {words}, {clients} workers, {backlog:,} ready", "jobs/s", "SKIP LOCKED",
                    partial(cycle, bench, SKIP_LOCKED, clients, backlog, in_one),
                    [Subject("lockstep", partial(cycle, bench, LOCKSTEP, clients, backlog, in_one))], Goal(0.7),
                    once=20 if backlog == BACKLOGS[-1] else 0,
                )  # fmt: skip
    yield Cell(
        "jobs", f"enqueue, claim and complete, {BACKLOGS[-1]:,} ready", "µs", f"{BACKLOGS[0]:,} ready", partial(microseconds, bench, BACKLOGS[0]),
        [Subject("lockstep", partial(microseconds, bench, BACKLOGS[-1]))], Goal(most=1.3), less_is_better=True,
    )  # fmt: skip
    for verb in "enqueue", "work":
        for number in 1, 8, 32:
            peers = ("lockstep", "lockstep"), ("graphile-worker", "graphile_worker"), ("pg-boss", "pg_boss")
            yield Cell(
                "jobs in Node", f"{verb}, {number} at once", "jobs/s", "SKIP LOCKED", partial(node, bench, "skip_locked", verb, number),
                [Subject(name, partial(node, bench, program, verb, number)) for name, program in peers], ahead=True, extra=3,
            )  # fmt: skip
    yield Cell(
        "decay", f"a job's turn, after {bench.hold:g} s beside a REPEATABLE READ transaction", "times as long", "without that transaction", None,
        [
            Subject("lockstep" if queue is LOCKSTEP else "SKIP LOCKED", partial(decay, bench, queue, True), partial(decay, bench, queue, False))
            for queue in (SKIP_LOCKED, LOCKSTEP)
        ],
        Goal(most=1.5), less_is_better=True, ahead=True, windows=0, extra=bench.hold + 4,
    )  # fmt: skip
