-- What the functions of leases refuse: message, DETAIL, HINT and SQLSTATE.
SET client_min_messages = warning;
SET timezone = 'UTC';
TRUNCATE lockstep.leases;
SELECT setval('lockstep.token', 100);

-- NULL where none is meant: 22004, naming the argument.
SELECT lockstep.lease_acquire(NULL, 'a');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', NULL);
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', ttl => NULL);
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', min_hold => NULL);
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', lock_delay => NULL);
\echo :SQLSTATE
SELECT lockstep.lease_renew(NULL, 1);
\echo :SQLSTATE
SELECT lockstep.lease_renew('job', NULL);
\echo :SQLSTATE
SELECT lockstep.lease_release(NULL, 1);
\echo :SQLSTATE
SELECT lockstep.lease_release('job', NULL);
\echo :SQLSTATE
SELECT lockstep.lease_guard(NULL, 1);
\echo :SQLSTATE
SELECT lockstep.lease_guard('job', NULL);
\echo :SQLSTATE
SELECT lockstep.lease_guard_at_commit(NULL, 1);
\echo :SQLSTATE
SELECT lockstep.lease_guard_at_commit('job', NULL);
\echo :SQLSTATE
SELECT lockstep.lease_steal(NULL, 'a', '1 second', 'test');
\echo :SQLSTATE
SELECT lockstep.lease_steal('job', NULL, '1 second', 'test');
\echo :SQLSTATE
SELECT lockstep.lease_steal('job', 'a', NULL, 'test');
\echo :SQLSTATE
SELECT lockstep.lease_steal('job', 'a', '1 second', NULL);
\echo :SQLSTATE
CALL lockstep.lease_take(NULL, 'a', '1 second', '1 second');
\echo :SQLSTATE
CALL lockstep.lease_take('job', NULL, '1 second', '1 second');
\echo :SQLSTATE
CALL lockstep.lease_take('job', 'a', NULL, '1 second');
\echo :SQLSTATE
CALL lockstep.lease_take('job', 'a', '1 second', NULL);
\echo :SQLSTATE
SELECT lockstep.lease_delete_expired(NULL);
\echo :SQLSTATE

-- Bad names and durations: 22023.
SELECT lockstep.lease_acquire('', 'a');
\echo :SQLSTATE
SELECT lockstep.lease_acquire(repeat('n', 801), 'a');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', '');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', repeat('h', 801));
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', ttl => '0');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', ttl => '-1 second');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', ttl => '1001 years');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', min_hold => '-1 second');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', lock_delay => '-1 second');
\echo :SQLSTATE
SELECT lockstep.lease_acquire('job', 'a', lock_delay => '1001 years');
\echo :SQLSTATE
SELECT lockstep.lease_renew('job', 1, '0');
\echo :SQLSTATE
SELECT lockstep.lease_steal('job', 'a', '1 second', '');
\echo :SQLSTATE
CALL lockstep.lease_take('job', 'a', '0', '1 second');
\echo :SQLSTATE
CALL lockstep.lease_take('job', 'a', '1 second', '-1 second');
\echo :SQLSTATE
SELECT lockstep.lease_delete_expired('-1 second');
\echo :SQLSTATE

-- What is expected in normal operation is returned, not raised.
SELECT acquired, token, held_by FROM lockstep.lease_acquire('job', 'a', '1 hour');
\echo :SQLSTATE
SELECT acquired, token, held_by FROM lockstep.lease_acquire('job', 'b', '1 hour');
\echo :SQLSTATE
SELECT status FROM lockstep.lease_renew('job', 101);
\echo :SQLSTATE
SELECT status FROM lockstep.lease_renew('job', 100);
\echo :SQLSTATE
SELECT status FROM lockstep.lease_renew('no such lease', 101);
\echo :SQLSTATE
SELECT lockstep.lease_release('job', 100);
\echo :SQLSTATE

-- LS003: the lease is not held with this token.
SELECT lockstep.lease_guard('no such lease', 101);
\echo :SQLSTATE
SELECT lockstep.lease_guard('job', 100);
\echo :SQLSTATE
UPDATE lockstep.leases SET expires_at = '2001-02-03 04:05:06+00' WHERE name = 'job';
SELECT lockstep.lease_guard('job', 101);
\echo :SQLSTATE
SELECT lockstep.lease_guard('job', 100);
\echo :SQLSTATE
UPDATE lockstep.leases SET holder = NULL WHERE name = 'job';
SELECT lockstep.lease_guard('job', 101);
\echo :SQLSTATE
-- At COMMIT.
BEGIN;
SELECT lockstep.lease_guard_at_commit('job', 101);
\echo :SQLSTATE
COMMIT;
\echo :SQLSTATE

-- LS003 by the trigger.
CREATE TABLE guarded (n int);
CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('job', 'app.token');
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
SET app.token = 'seven';
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
SET app.token = '100';
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
DROP TRIGGER guard ON guarded;
CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('job');
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
DROP TRIGGER guard ON guarded;
-- A trigger that is made wrongly.
CREATE TRIGGER guard AFTER INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('job');
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
DROP TRIGGER guard ON guarded;
CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger();
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
DROP TRIGGER guard ON guarded;
CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('');
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
DROP TRIGGER guard ON guarded;
CREATE TRIGGER guard BEFORE INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('job', '');
INSERT INTO guarded VALUES (1);
\echo :SQLSTATE
DROP TABLE guarded;

-- 55P03: a theft does not wait longer than lock_timeout for who guards the lease.
SELECT acquired, token FROM lockstep.lease_acquire('job', 'a', '1 hour');
\echo :SQLSTATE
BEGIN;
SELECT lockstep.lease_guard('job', 102);
\echo :SQLSTATE
PREPARE TRANSACTION 'guard';
\echo :SQLSTATE
SET lock_timeout = '10ms';
SELECT lockstep.lease_steal('job', 'b', '1 hour', 'test');
\echo :SQLSTATE
RESET lock_timeout;
COMMIT PREPARED 'guard';

-- 0A000: a check at COMMIT cannot be prepared.
BEGIN;
SELECT lockstep.lease_guard_at_commit('job', 102);
\echo :SQLSTATE
PREPARE TRANSACTION 'guard';
\echo :SQLSTATE

-- 2D000: the procedure commits, so it has no transaction around it.
BEGIN;
CALL lockstep.lease_take('job', 'b', '1 second', '1 second');
\echo :SQLSTATE
ROLLBACK;
CREATE FUNCTION take() RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    acquired boolean; token bigint; expires_at timestamptz; renew_before timestamptz;
BEGIN
    CALL lockstep.lease_take('job', 'b', '1 second', '1 second', acquired, token, expires_at, renew_before);
    RETURN acquired;
END
$$;
SELECT take();
\echo :SQLSTATE
DROP FUNCTION take();

-- 25006: in a read-only transaction. A guard only reads.
BEGIN READ ONLY;
SELECT lockstep.lease_acquire('job', 'a');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.lease_renew('job', 102);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.lease_release('job', 102);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.lease_steal('job', 'b', '1 second', 'test');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.lease_delete_expired('1 day');
\echo :SQLSTATE
ROLLBACK;
SET default_transaction_read_only = on;
CALL lockstep.lease_take('job', 'b', '1 second', '1 second');
\echo :SQLSTATE
SET default_transaction_read_only = off;
BEGIN READ ONLY;
SELECT lockstep.lease_guard('job', 102);
\echo :SQLSTATE
ROLLBACK;

-- 55000: the token sequence was set back.
SELECT lockstep.lease_release('job', 102);
\echo :SQLSTATE
SELECT setval('lockstep.token', 50);
SELECT lockstep.lease_acquire('job', 'a');
\echo :SQLSTATE
SELECT lockstep.after_data_loss();
\echo :SQLSTATE
SELECT acquired, token FROM lockstep.lease_acquire('job', 'a');
\echo :SQLSTATE

-- The same through PL/pgSQL, with all that a driver gets.
DO $$
DECLARE
    message text; detail text; hint text;
BEGIN
    PERFORM lockstep.lease_guard('no such lease', 7);
EXCEPTION WHEN SQLSTATE 'LS003' THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RAISE WARNING E'%\n%\n%', message, detail, hint;
END
$$;
