"""The same push and the same claim in something small and in something large."""

import shutil
from contextlib import ExitStack, contextmanager
from functools import cache, partial

from load import Pgbench
from measure import Goal, Measurement
from peers import payload
from schedule import Cell, Subject
from servers import server

SMALL = {"events": 10_000, "tenants": 1, "projections": 1, "writers": 1}
LARGE = {"events": 10_000_000, "tenants": 10_000, "projections": 1_000, "writers": 100}
BYTES = 700  # of disk for an event, its indexes and WAL

# The tenants take turns; every projection of a tenant has come half way, so a claim reads from the middle.
FILL = [
    "CREATE EXTENSION lockstep",
    """INSERT INTO lockstep.events
SELECT (n % {tenants} + 1)::text, n + 1, 'order', (n / {tenants} / 10)::text, n / {tenants} % 10 + 1, 'paid', NULL,
       jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), NULL, now()
FROM generate_series(0, {events} - 1) AS n""",
    "SELECT lockstep.ticket_resync()",
    "SELECT lockstep.projection_create('claimed ' || n, start_after => {events} / 2) FROM generate_series(1, {projections}) AS n",
]
PUSH = "\\set tenant random(1, :tenants)\nSELECT * FROM lockstep.push_event('new', :first || '-' || :n, 'paid', :payload, tenant => :tenant::text);\n\\set n :n + 1\n"
CLAIM = """\\set tenant random(1, :tenants)
\\set projection random(1, :projections)
SELECT count(*) FROM lockstep.projection_claim('claimed ' || :projection, max_events => 10, barrier => false, tenant => :tenant::text);
"""


def large_log(bench):
    """As many events as are asked for, if the disk has room for them."""
    free = shutil.disk_usage("/var/lib" if shutil.os.geteuid() == 0 else ".").free
    return min(bench.large, max(SMALL["events"], free // 2 // BYTES // 1000 * 1000))


@cache
def database(tenants, events, projections):
    """A database with such a log; its name."""
    name = f"bench_growth_{tenants}_{events}_{projections}"
    place = server("plain")
    place.create_database(name)
    place.execute(name, *(step.format(tenants=tenants, events=events, projections=projections) for step in FILL))
    return name


@contextmanager
def writers_in_flight(name, count):
    """So many transactions of tenant 1 that have pushed and stay open."""
    with ExitStack() as stack:
        for n in range(count):
            session = stack.enter_context(server("plain").connect(name))
            stack.callback(session.rollback)
            session.autocommit = False
            session.execute("SELECT lockstep.push_event('open', %s, 'paid', tenant => '1')", [str(n)])
        yield


def measure(bench, what, sizes):
    """Microseconds of one client's push or claim."""
    name = database(sizes["tenants"], sizes["events"], sizes["projections"])
    place = server("plain")
    place.settle(name)
    before = place.value(name, "SELECT count(*) FROM lockstep.events WHERE aggregate_type = 'new'")
    with writers_in_flight(name, sizes["writers"] if sizes["writers"] > 1 else 0):
        variables = {"payload": payload(150), "tenants": sizes["tenants"], "projections": sizes["projections"]}
        # A commit's flush takes ten times as long as a push, and would hide what grows in it.
        options = "-c synchronous_commit=off"
        loaded = Pgbench(place, name, PUSH if what == "push" else CLAIM, 1, bench.window, variables=variables, options=options).finish()
    there = place.value(name, "SELECT count(*) FROM lockstep.events WHERE aggregate_type = 'new'") - before
    acknowledged = loaded.count if what == "push" else 0
    return Measurement(1e6 / loaded.rate, max(0, acknowledged - there), max(0, there - acknowledged))


def cells(bench):
    for what in "push", "claim":
        for dimension in SMALL:
            # Tenants and projections grow in a log of a middle size, which has room for them.
            middle = SMALL | {"events": min(bench.large, 1_000_000)} if dimension in ("tenants", "projections") else SMALL
            large = middle | {dimension: min(LARGE["events"], bench.large) if dimension == "events" else LARGE[dimension]}

            def grown(what=what, large=large, dimension=dimension):
                return measure(bench, what, large | {"events": large_log(bench)} if dimension == "events" else large)

            yield Cell(
                "growth", f"{what}, {middle[dimension]:,} to {large[dimension]:,} {'writers in flight' if dimension == 'writers' else dimension}",
                "µs", f"{middle[dimension]:,}", partial(measure, bench, what, middle), [Subject("lockstep", grown)], Goal(most=1.2),
                less_is_better=True, once=120 if dimension == "events" else 20,
            )  # fmt: skip
