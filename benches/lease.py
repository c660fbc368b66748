"""Leases: renewals and acquisitions against a bare UPDATE … RETURNING by primary key, the price of a guard in a transaction of
one UPDATE, and what 10,000 leases that are renewed for minutes leave behind."""

import subprocess
import time
from functools import cache

from bench import HERE, finish, psql

LEASES = 10_000

# A lease of its own for every turn of a client, or one for all.
NAMES = {
    "spread": f"\\set n random(1, {LEASES} / :clients) + :client_id * ({LEASES} / :clients)\n",
    "hot": "\\set n 1\n",
}

UPDATE = "UPDATE bench.leases SET renewed_at = clock_timestamp(), expires_at = clock_timestamp() + ttl WHERE name = 'lease-' || :n"
RENEW = {
    False: f"{UPDATE} AND token = :n AND expires_at > clock_timestamp() RETURNING expires_at;",
    True: "SELECT status FROM lockstep.lease_renew('lease-' || :n, :n);",
}

HOLD = {
    False: f"""\\set token 0
UPDATE bench.leases SET holder = :client_id::text, token = nextval('bench.token'), renewed_at = clock_timestamp(),
    acquired_at = clock_timestamp(), expires_at = clock_timestamp() + ttl
WHERE name = 'free-' || :n AND (holder IS NULL OR expires_at < clock_timestamp()) RETURNING token \\gset
UPDATE bench.leases SET holder = NULL WHERE name = 'free-' || :n AND token = :token RETURNING name;
""",
    True: """SELECT COALESCE(token, 0) AS token FROM lockstep.lease_acquire('free-' || :n, :client_id::text) \\gset
SELECT lockstep.lease_release('free-' || :n, :token);
""",
}
# On one name most acquisitions are refused: \\gset wants a row all the same.
HOLD_HOT = {
    False: """WITH taken AS (
    UPDATE bench.leases SET holder = :client_id::text, token = nextval('bench.token'), renewed_at = clock_timestamp(),
        acquired_at = clock_timestamp(), expires_at = clock_timestamp() + ttl
    WHERE name = 'free-' || :n AND (holder IS NULL OR expires_at < clock_timestamp()) RETURNING token)
SELECT COALESCE((SELECT token FROM taken), 0) AS token \\gset
UPDATE bench.leases SET holder = NULL WHERE name = 'free-' || :n AND token = :token RETURNING name;
""",
    True: HOLD[True],
}

GUARDED = """\\set row random(1, 100) + :client_id * 100
BEGIN;
{guard}UPDATE bench.data SET value = value + 1 WHERE id = :row;
COMMIT;
"""
GUARD = {
    False: GUARDED.format(guard=""),
    True: GUARDED.format(guard="SELECT lockstep.lease_guard('lease-' || :n, :n);\n"),
}


@cache
def prepare():
    psql("-f", HERE / "lease.sql")


def cells(bench):
    def cell(scripts, clients, names, **how):
        def rate(candidate):
            prepare()
            extra = ("-D", f"clients={clients}")
            return bench.rate(NAMES[names] + scripts[candidate], clients=clients, extra=extra, **how)

        return rate

    for names in NAMES:
        for clients in 1, 8, 32:
            said = f"{names}, {clients} client{'s' * (clients > 1)}"
            yield f"lease_renew against UPDATE RETURNING, {said}", "tx/s", (">=", 0.9), cell(RENEW, clients, names)
    yield (
        "lease_renew against UPDATE RETURNING, spread, 8 clients, synchronous_commit off", "tx/s", (">=", 0.9),
        cell(RENEW, 8, "spread", synchronous_commit="off"),
    )  # fmt: skip
    for names, scripts in ("spread", HOLD), ("hot", HOLD_HOT):
        for clients in 1, 8, 32:
            said = f"{names}, {clients} client{'s' * (clients > 1)}"
            yield f"lease_acquire and lease_release against two UPDATE RETURNING, {said}", "pairs/s", ("", "-"), cell(scripts, clients, names)
    for names in NAMES:
        for clients in 1, 8, 32:
            said = f"one lease{' each' * (names == 'spread')}, {clients} client{'s' * (clients > 1)}"
            yield f"lease_guard in a transaction of one UPDATE, {said}", "tx/s", (">=", 0.85), cell(GUARD, clients, names)


SIZES = """SELECT pg_relation_size('lockstep.leases') / 1024, pg_indexes_size('lockstep.leases') / 1024,
    n_tup_upd, n_tup_hot_upd, n_dead_tup, autovacuum_count, (SELECT next_multixact_id::text FROM pg_control_checkpoint())
FROM pg_stat_user_tables WHERE relid = 'lockstep.leases'::regclass"""


def query(sql):
    command = ["psql", "-X", "-q", "-A", "-t", "-F", " ", "-v", "ON_ERROR_STOP=1", "-c", "CHECKPOINT", "-c", sql]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.split()


def bloat(bench, minutes):
    """10,000 leases, each renewed every 10 seconds, guards of random ones beside them."""
    psql("-f", HERE / "lease.sql", "-c", "TRUNCATE lockstep.leases")
    psql("-c", f"SELECT bench.fill('lease-', {LEASES})", "-c", "VACUUM ANALYZE lockstep.leases")
    psql("-c", "SELECT pg_stat_reset_single_table_counters('lockstep.leases'::regclass)")
    before = query(SIZES)
    script = f"\\set n random(1, {LEASES})\n{RENEW[True]}\n"
    guard = f"\\set n random(1, {LEASES})\nBEGIN;\nSELECT lockstep.lease_guard('lease-' || :n, :n);\nCOMMIT;\n"
    running = [
        bench.start(text, clients=4, extra=("-T", round(minutes * 60), "-R", LEASES // 10)) for text in (script, guard)
    ]
    begun = time.monotonic()
    for process in running:
        finish(process)
    time.sleep(1)
    after = query(SIZES)
    table, index, updates, hot, dead, vacuums, multixact = after
    print(f"\n{LEASES:,} leases renewed {int(updates) / (time.monotonic() - begun):,.0f} times a second, and guarded, for {minutes:g} minutes:")
    print(f"- table {before[0]} -> {table} kB, primary key {before[1]} -> {index} kB, {dead} dead rows, {vacuums} autovacuums")
    print(f"- {updates} updates, {int(hot) / max(int(updates), 1):.2%} of them HOT; {int(multixact) - int(before[6])} multixacts")
