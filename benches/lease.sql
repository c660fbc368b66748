-- The control: a lease as one would make it by hand. The leases of both are held for a day, and those to be acquired are free.
CREATE SCHEMA IF NOT EXISTS bench;
DROP TABLE IF EXISTS bench.leases, bench.data;
CREATE TABLE bench.leases (LIKE lockstep.leases, PRIMARY KEY (name)) WITH (fillfactor = 50);
CREATE SEQUENCE IF NOT EXISTS bench.token;
CREATE TABLE bench.data (id int PRIMARY KEY, value bigint NOT NULL) WITH (fillfactor = 50);
INSERT INTO bench.data SELECT n, 0 FROM generate_series(1, 3300) AS n;

CREATE OR REPLACE FUNCTION bench.fill(prefix text, count int) RETURNS void LANGUAGE sql AS $$
    INSERT INTO lockstep.leases (name, holder, token, acquired_at, renewed_at, expires_at, ttl, transitions, lock_delay)
    SELECT prefix || n, CASE WHEN prefix = 'lease-' THEN 'holder' END, n, now(), now(), now() + '1 day', '1 day', 0, '0'
    FROM generate_series(1, count) AS n
$$;
TRUNCATE lockstep.leases;
SELECT bench.fill('lease-', 10000), bench.fill('free-', 10000);
SELECT setval('lockstep.token', 10000), setval('bench.token', 10000);
INSERT INTO bench.leases SELECT * FROM lockstep.leases;
VACUUM ANALYZE lockstep.leases, bench.leases, bench.data;
