"""The generation registry: setting and syncing against a bare UPDATE, and a claim in a large registry against one in a small one."""

from functools import cache, partial

from load import Pgbench
from measure import Goal, Measurement
from schedule import Cell, Subject
from servers import server

DATABASE = "bench_registry"
RESOURCES = 200_000  # each is touched once a measurement, by one of at most 8 clients

# The control has the columns and the key that a replica's progress needs, and no more.
SCHEMA = """CREATE EXTENSION lockstep;
CREATE SCHEMA bench;
CREATE TABLE bench.replicas (
    tenant text, resource text, replica text, generation bigint, synced_at timestamptz, PRIMARY KEY (tenant, resource, replica)
) WITH (fillfactor = 70)"""
FILL = f"""TRUNCATE bench.replicas, lockstep.resources, lockstep.replicas;
SELECT setval('lockstep.token', 1);
INSERT INTO bench.replicas SELECT '', n::text, replica, 0, now() FROM generate_series(0, {RESOURCES} - 1) AS n, unnest('{{a,b}}'::text[]) AS replica;
INSERT INTO lockstep.resources (tenant, resource, incarnation, generation, created_at, changed_at)
SELECT '', n::text, 1, 0, now(), now() FROM generate_series(0, {RESOURCES} - 1) AS n;
INSERT INTO lockstep.replicas (tenant, resource, replica, generation, due_at)
SELECT '', n::text, replica, CASE WHEN replica = 'a' THEN 0 END, CASE WHEN replica = 'b' THEN now() END
FROM generate_series(0, {RESOURCES} - 1) AS n, unnest('{{a,b}}'::text[]) AS replica"""
NEXT = f"\\set id :client_id * {RESOURCES // 8} + :n\n\\set n :n + 1\n"
UPDATE = """UPDATE bench.replicas SET generation = generation + 1, synced_at = clock_timestamp()
WHERE tenant = '' AND resource = :id::text AND replica = 'a' RETURNING generation;
"""
SET = "SELECT lockstep.generation_set(:id::text, 'a', 1);\n"
SYNC = """SELECT token FROM lockstep.replica_sync_begin(:id::text, 'b', 'w') \\gset
SELECT lockstep.replica_sync_finish(:id::text, 'b', :token);
"""
# How many resources were done.
DONE = {
    UPDATE: "SELECT count(*) FROM bench.replicas WHERE generation = 1",
    SET: "SELECT count(*) FROM lockstep.replicas WHERE replica = 'a' AND generation = 1",
    SYNC: "SELECT count(*) FROM lockstep.replicas WHERE replica = 'b' AND generation = 0 AND synced_at IS NOT NULL",
}
CLAIM = """BEGIN;
SELECT count(*) FROM lockstep.replica_sync_claim('w', 10);
ROLLBACK;
"""
LARGE = """CREATE EXTENSION lockstep;
SELECT setval('lockstep.token', 1);
INSERT INTO lockstep.resources (tenant, resource, incarnation, generation, created_at, changed_at)
SELECT '', n::text, 1, 0, now(), now() FROM generate_series(1, {0}) AS n;
INSERT INTO lockstep.replicas (tenant, resource, replica, generation, due_at)
SELECT '', n::text, 'a', CASE WHEN n % ({0} / 100) > 0 THEN 0 END, CASE WHEN n % ({0} / 100) = 0 THEN now() END
FROM generate_series(1, {0}) AS n"""


@cache
def database(name, schema):
    server("plain").create_database(name)
    server("plain").execute(name, schema)
    return server("plain")


def rate(bench, script, clients):
    place = database(DATABASE, SCHEMA)
    place.execute(DATABASE, FILL)
    place.settle(DATABASE)
    loaded = Pgbench(place, DATABASE, NEXT + script, clients, bench.window).finish()
    done = place.value(DATABASE, DONE[script])
    return Measurement(loaded.rate, max(0, min(loaded.count, RESOURCES) - done), 0)


def claim(bench, resources):
    """Microseconds of a claim of 10 replicas; it is rolled back, so that 100 stay due."""
    name = f"bench_registry_{resources}"
    place = database(name, LARGE.format(resources))
    place.settle(name)
    loaded = Pgbench(place, name, CLAIM, 1, bench.window).finish()
    (due,) = place.execute(name, "SELECT count(*) FROM lockstep.replicas WHERE due_at IS NOT NULL")[0]
    return Measurement(1e6 / loaded.rate, max(0, 100 - due), max(0, due - 100))


def cells(bench):
    for clients in 1, 8:
        for words, script, unit, bound in (
            ("generation_set", SET, "calls/s", 0.85),
            ("replica_sync_begin and replica_sync_finish", SYNC, "syncs/s", 0.5),
        ):
            yield Cell(
                "generations", f"{words}, {clients} clients", unit, "one UPDATE … RETURNING", partial(rate, bench, UPDATE, clients),
                [Subject("lockstep", partial(rate, bench, script, clients))], Goal(bound), extra=6,
            )  # fmt: skip
    for resources in 100_000, 1_000_000:
        yield Cell(
            "generations", f"replica_sync_claim of 10 of 100 due, {resources:,} resources", "µs", "1,000 resources", partial(claim, bench, 1000),
            [Subject("lockstep", partial(claim, bench, resources))], Goal(most=1.3), less_is_better=True,
        )  # fmt: skip
