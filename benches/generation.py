"""The generation registry: setting and syncing against a bare UPDATE, and a claim in a large registry against one in a small one."""

from functools import cache

from bench import DATABASE, create_database, psql

RESOURCES = 200_000  # each is touched once a measurement, by one of at most 8 clients

# The control has the columns and the key that a replica's progress needs, and no more.
SCHEMA = """CREATE TABLE IF NOT EXISTS bench.replicas (
    tenant text, resource text, replica text, generation bigint, synced_at timestamptz, PRIMARY KEY (tenant, resource, replica)
) WITH (fillfactor = 70);
ALTER TABLE bench.replicas SET (autovacuum_enabled = off);
ALTER TABLE lockstep.resources SET (autovacuum_enabled = off);
ALTER TABLE lockstep.replicas SET (autovacuum_enabled = off)"""

FILL = f"""TRUNCATE bench.replicas, lockstep.resources, lockstep.replicas;
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
CLAIM = """BEGIN;
SELECT count(*) FROM lockstep.replica_sync_claim('w', 10);
ROLLBACK;
"""
LARGE = """CREATE EXTENSION lockstep;
ALTER TABLE lockstep.replicas SET (autovacuum_enabled = off);
INSERT INTO lockstep.resources (tenant, resource, incarnation, generation, created_at, changed_at)
SELECT '', n::text, 1, 0, now(), now() FROM generate_series(1, {0}) AS n;
INSERT INTO lockstep.replicas (tenant, resource, replica, generation, due_at)
SELECT '', n::text, 'a', CASE WHEN n % ({0} / 100) > 0 THEN 0 END, CASE WHEN n % ({0} / 100) = 0 THEN now() END
FROM generate_series(1, {0}) AS n"""


def rate(bench, script, clients):
    psql("-c", SCHEMA, "-c", FILL, "-c", "VACUUM ANALYZE")
    return bench.rate(NEXT + script, clients=clients)


@cache
def registry(resources):
    """A database with so many resources, 100 of which are due; its name."""
    name = f"{DATABASE}_registry_{resources}"
    create_database(name)
    psql("-d", name, "-c", LARGE.format(resources), "-c", "VACUUM ANALYZE", "-c", "CHECKPOINT")
    return name


def claim(bench, resources):
    """Microseconds of a claim of 10 replicas; it is rolled back, so that 100 stay due."""
    database = registry(resources)
    psql("-d", database, "-c", "VACUUM lockstep.resources, lockstep.replicas")
    return 1e6 / bench.rate(CLAIM, clients=1, database=database)


def cells(bench):
    for clients in 1, 8:
        sessions = f"{clients} client{'s' if clients > 1 else ''}"

        def set_generation(candidate, clients=clients):
            return rate(bench, SET if candidate else UPDATE, clients)

        def sync(candidate, clients=clients):
            return rate(bench, SYNC if candidate else UPDATE, clients)

        yield f"generation_set against UPDATE … RETURNING, {sessions}", "calls/s", (">=", 0.85), set_generation
        yield f"replica_sync_begin and _finish against one UPDATE … RETURNING, {sessions}", "syncs/s", (">=", 0.5), sync
    for resources in 100_000, 1_000_000:
        yield (
            f"replica_sync_claim of 10 of 100 due, {resources:,} resources against 1,000", "µs", ("<=", 1.3),
            lambda large, resources=resources: claim(bench, resources if large else 1000),
        )  # fmt: skip
