"""A lease as one would make it by hand: a row with a holder, a token and an expiry, taken and renewed by UPDATE … RETURNING with the condition in it.
The table has lockstep's columns; renewals touch the same number of them.

Recipe: as in https://www.postgresql.org/docs/18/sql-update.html; ShedLock's and Quartz's JDBC lock tables are of this kind.
"""

LEASES = 10_000

# The leases of both are held for a day, and those to be acquired are free.
SCHEMA = """
CREATE EXTENSION lockstep;
CREATE SCHEMA bench;
CREATE TABLE bench.leases (LIKE lockstep.leases, PRIMARY KEY (name)) WITH (fillfactor = 50);
CREATE SEQUENCE bench.token;
CREATE TABLE bench.data (id int PRIMARY KEY, value bigint NOT NULL) WITH (fillfactor = 50);
CREATE FUNCTION bench.fill(prefix text, count int) RETURNS void LANGUAGE sql AS $$
    INSERT INTO lockstep.leases (name, holder, token, acquired_at, renewed_at, expires_at, ttl, transitions, lock_delay)
    SELECT prefix || n, CASE WHEN prefix = 'lease-' THEN 'holder' END, n, now(), now(), now() + '1 day', '1 day', 0, '0'
    FROM generate_series(1, count) AS n
$$
"""
RESET = [
    "TRUNCATE lockstep.leases, bench.leases, bench.data",
    f"SELECT bench.fill('lease-', {LEASES}), bench.fill('free-', {LEASES})",
    f"SELECT setval('lockstep.token', {LEASES}), setval('bench.token', {LEASES})",
    "INSERT INTO bench.leases SELECT * FROM lockstep.leases",
    "INSERT INTO bench.data SELECT n, 0 FROM generate_series(1, 3300) AS n",
]

UPDATE = "UPDATE bench.leases SET renewed_at = clock_timestamp(), expires_at = clock_timestamp() + ttl WHERE name = 'lease-' || :n"
RENEW = f"{UPDATE} AND token = :n AND expires_at > clock_timestamp() RETURNING expires_at;\n"
GUARD = "SELECT FROM bench.leases WHERE name = 'lease-' || :n AND token = :n AND expires_at > clock_timestamp() FOR KEY SHARE;\n"
# A refused acquisition gives a row all the same, as lease_acquire does.
HOLD = """WITH taken AS (
    UPDATE bench.leases SET holder = :client_id::text, token = nextval('bench.token'), renewed_at = clock_timestamp(),
        acquired_at = clock_timestamp(), expires_at = clock_timestamp() + ttl, transitions = transitions + 1
    WHERE name = 'free-' || :n AND (holder IS NULL OR expires_at < clock_timestamp()) RETURNING token)
SELECT COALESCE((SELECT token FROM taken), 0) AS token \\gset
UPDATE bench.leases SET holder = NULL WHERE name = 'free-' || :n AND token = :token RETURNING name;
"""
