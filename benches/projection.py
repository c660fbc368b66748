"""Projections: projection_run against a bare loop and against a client, and a claim in a large log against one in a small log."""

import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

from bench import DATABASE, HERE, create_database, psql

EVENTS = 50_000  # of projection.sql
PYTHON = sys.executable if find_spec("psycopg") else HERE.parent / ".venv" / "bin" / "python"

# An empty read model, and the projection at the log's beginning.
EMPTY = """SELECT lockstep.projection_reset(name, tenant => 'log') FROM lockstep.projections WHERE name IN ('copy', 'add');
TRUNCATE bench.payments, bench.balances"""

CLAIM = """\\set tenant random(1, :tenants)
SELECT count(*) FROM lockstep.projection_claim('claimed', max_events => 10, tenant => :tenant::text);
"""

# The tenants take turns; every projection of a tenant has come half way.
FILL = """CREATE EXTENSION lockstep;
INSERT INTO lockstep.events
SELECT (n % {tenants} + 1)::text, n, 'order', (n / {tenants} / 10)::text, n / {tenants} % 10 + 1, 'paid', NULL,
       jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), NULL, now()
FROM generate_series(0, {events} - 1) AS n;
SELECT lockstep.ticket_resync();
SELECT lockstep.projection_create('claimed', start_after => {events} / 2)"""


@cache
def prepare():
    psql("-f", HERE / "projection.sql")


@cache
def fill(tenants, events):
    """A database with a log of so many events; its name."""
    name = f"{DATABASE}_{events}"
    create_database(name)
    psql("-d", name, "-c", FILL.format(tenants=tenants, events=events))
    psql("-d", name, "-c", "VACUUM ANALYZE", "-c", "CHECKPOINT")
    return name


def rate(*command):
    """Events a second, by the time that the command prints: without the start of the program and the connection."""
    prepare()
    psql("-c", EMPTY, "-c", "CHECKPOINT")
    output = subprocess.run(list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE).stdout
    return EVENTS / float(re.search(r"^Time: ([\d.]+) ms", output, re.MULTILINE)[1]) * 1000


def call(procedure):
    return rate("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", "\\timing on", "-c", f"CALL {procedure}")


def client(*arguments):
    return rate(PYTHON, HERE / "client.py", *arguments)


def claim(bench, tenants, events):
    """Microseconds of a claim of 10 events. One of many takes as long as reading the pages that the tenant's events are on."""
    database = fill(tenants, events)
    return 1e6 / bench.rate(CLAIM, clients=1, database=database, extra=("-D", f"tenants={tenants}"))


def cells(bench):
    for batch in 200, 1000:

        def copy(run, batch=batch):
            return call(f"bench.run('copy', {batch})" if run else f"bench.copy_unprotected({batch})")

        yield f"projection_run, a handler of sets of {batch} against a bare loop", "events/s", (">=", 0.9), copy
    for words, arguments in ("", [200]), (" with savepoints", [200, "savepoints"]):

        def add(run, arguments=arguments):
            return call("bench.run('add', 200)") if run else client(*arguments)

        yield f"projection_run, a handler of one event against a client{words}", "events/s", (">=", 5), add
    yield (
        f"projection_claim of 10 events, 1,000 tenants and {bench.large:,} events against 1 and 10,000", "µs", ("<=", 1.2),
        lambda large: claim(bench, 1000, bench.large) if large else claim(bench, 1, 10_000),
    )  # fmt: skip
