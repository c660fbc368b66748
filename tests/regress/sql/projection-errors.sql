-- What the projections' functions refuse: message, DETAIL, HINT and SQLSTATE.
SET client_min_messages = warning;
TRUNCATE lockstep.events, lockstep.unique_keys, lockstep.projections, lockstep.projection_cursors;
SELECT setval('lockstep.ticket', 100);
SELECT lockstep.projection_create('mails');
\echo :SQLSTATE
SELECT count(*) FROM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed"}, {"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed"}, {"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed"}]');
\echo :SQLSTATE

-- NULL where none is meant: 22004, naming the argument.
SELECT lockstep.projection_create(NULL);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', batch_size => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', max_failures => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', retry_after => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', if_not_exists => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', event_types => ARRAY[NULL]);
\echo :SQLSTATE
SELECT lockstep.projection_alter(NULL);
\echo :SQLSTATE
SELECT lockstep.projection_drop(NULL);
\echo :SQLSTATE
SELECT lockstep.projection_owner(NULL, current_user::regrole);
\echo :SQLSTATE
SELECT lockstep.projection_owner('mails', NULL);
\echo :SQLSTATE
SELECT lockstep.projection_claim(NULL);
\echo :SQLSTATE
SELECT lockstep.projection_claim('mails', barrier => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_claim('mails', wait => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_claim('mails', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_claim_state(NULL);
\echo :SQLSTATE
SELECT lockstep.projection_claim_state('mails', NULL);
\echo :SQLSTATE
SELECT lockstep.projection_advance(NULL);
\echo :SQLSTATE
SELECT lockstep.projection_advance('mails', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_due(max_rows => NULL);
\echo :SQLSTATE
SELECT lockstep.projection_due(ARRAY['mails', NULL]);
\echo :SQLSTATE

-- Bad values: 22023.
SELECT lockstep.projection_create('');
\echo :SQLSTATE
SELECT lockstep.projection_create('p', batch_size => 0);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', max_failures => 0);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', retry_after => '-1 second');
\echo :SQLSTATE
SELECT lockstep.projection_create('p', start_after => -1);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', start_after => 1.0000001);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', aggregate_types => ARRAY['']);
\echo :SQLSTATE
SELECT lockstep.projection_create('p', handler => 'now()');
\echo :SQLSTATE
SELECT lockstep.projection_create('p', handler => 'pg_catalog.length(text)');
\echo :SQLSTATE
SELECT lockstep.projection_alter('mails', batch_size => 0);
\echo :SQLSTATE
SELECT lockstep.projection_claim('mails', 0);
\echo :SQLSTATE
SELECT lockstep.projection_claim('mails', max_position => -1);
\echo :SQLSTATE
SELECT lockstep.projection_due(max_rows => 0);
\echo :SQLSTATE

-- 42704 and 42710.
SELECT lockstep.projection_claim('none');
\echo :SQLSTATE
SELECT lockstep.projection_alter('none');
\echo :SQLSTATE
SELECT lockstep.projection_drop('none');
\echo :SQLSTATE
SELECT lockstep.projection_owner('none', current_user::regrole);
\echo :SQLSTATE
SELECT lockstep.projection_due(ARRAY['mails', 'none']);
\echo :SQLSTATE
SELECT lockstep.projection_create('mails');
\echo :SQLSTATE
SELECT lockstep.projection_create('mails', if_not_exists => true);
\echo :SQLSTATE

-- LS002: no claim, or one that was rolled back.
SELECT lockstep.projection_advance('mails');
\echo :SQLSTATE
BEGIN;
SAVEPOINT s;
SELECT aggregate_id, sequence FROM lockstep.projection_claim('mails', 2);
\echo :SQLSTATE
SELECT * FROM lockstep.projection_claim_state('mails');
\echo :SQLSTATE
ROLLBACK TO s;
SELECT * FROM lockstep.projection_claim_state('mails');
\echo :SQLSTATE
SELECT lockstep.projection_advance('mails');
\echo :SQLSTATE
ROLLBACK;

-- up_to must be an event of the claimed batch: 22023.
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 100);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 101.000002);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 101.0000011);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 101.5);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 90);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 'NaN');
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.projection_claim('mails', 2);
SELECT lockstep.projection_advance('mails', 101);
\echo :SQLSTATE
SELECT lockstep.projection_advance('mails');
\echo :SQLSTATE
COMMIT;
BEGIN;
SELECT position FROM lockstep.projection_claim('mails', tenant => 'other');
\echo :SQLSTATE
SELECT lockstep.projection_advance('mails', tenant => 'other');
\echo :SQLSTATE
SELECT lockstep.projection_advance('mails', 101, tenant => 'other');
\echo :SQLSTATE
ROLLBACK;
SELECT position FROM lockstep.projection_claim('mails');
\echo :SQLSTATE

-- 25000 and 25006.
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT lockstep.projection_claim('mails', barrier => false);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.push_event('order', 'b', 'placed');
SELECT lockstep.projection_claim('mails', wait => true);
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.push_event('order', 'b', 'placed');
SELECT lockstep.projection_drop('mails');
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT FROM lockstep.push_event('order', 'b', 'placed');
SELECT lockstep.projection_alter('mails', batch_size => 2);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.projection_claim('mails');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.projection_create('p');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.projection_drop('mails');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.projection_alter('mails');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.projection_owner('mails', current_user::regrole);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.projection_advance('mails');
\echo :SQLSTATE
ROLLBACK;

-- 42501: not the owner; and nothing is granted to PUBLIC.
CREATE ROLE regress_lockstep_owner;
CREATE ROLE regress_lockstep_stranger;
GRANT USAGE ON SCHEMA lockstep TO regress_lockstep_stranger, regress_lockstep_owner;
SET ROLE regress_lockstep_stranger;
SELECT lockstep.projection_claim('mails');
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', 'placed');
\echo :SQLSTATE
SELECT count(*) FROM lockstep.events;
\echo :SQLSTATE
RESET ROLE;
GRANT EXECUTE ON FUNCTION lockstep.projection_create, lockstep.projection_alter, lockstep.projection_drop, lockstep.projection_owner TO regress_lockstep_stranger, regress_lockstep_owner;
SELECT lockstep.projection_owner('mails', 'regress_lockstep_owner');
\echo :SQLSTATE
SET ROLE regress_lockstep_stranger;
SELECT lockstep.projection_alter('mails', batch_size => 2);
\echo :SQLSTATE
SELECT lockstep.projection_drop('mails');
\echo :SQLSTATE
SELECT lockstep.projection_owner('mails', 'regress_lockstep_stranger');
\echo :SQLSTATE
SET ROLE regress_lockstep_owner;
SELECT lockstep.projection_alter('mails', batch_size => 2);
\echo :SQLSTATE
SELECT lockstep.projection_owner('mails', 'regress_lockstep_stranger');
\echo :SQLSTATE
SELECT lockstep.projection_drop('mails');
\echo :SQLSTATE
RESET ROLE;
REVOKE ALL ON FUNCTION lockstep.projection_create, lockstep.projection_alter, lockstep.projection_drop, lockstep.projection_owner FROM regress_lockstep_stranger, regress_lockstep_owner;
REVOKE ALL ON SCHEMA lockstep FROM regress_lockstep_stranger, regress_lockstep_owner;
DROP ROLE regress_lockstep_stranger;
DROP ROLE regress_lockstep_owner;
TRUNCATE lockstep.events, lockstep.unique_keys, lockstep.projections, lockstep.projection_cursors;
