-- What the event log's functions refuse: message, DETAIL, HINT and SQLSTATE.
SET client_min_messages = warning;
TRUNCATE lockstep.events, lockstep.unique_keys, lockstep.projections, lockstep.projection_cursors;
SELECT setval('lockstep.ticket', 100);

-- NULL where none is meant: 22004, naming the argument.
SELECT lockstep.push_events(NULL);
\echo :SQLSTATE
SELECT lockstep.push_events('[]', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.push_event(NULL, 'a', 'placed');
\echo :SQLSTATE
SELECT lockstep.push_event('order', NULL, 'placed');
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', NULL);
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', 'placed', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.barrier(NULL);
\echo :SQLSTATE
SELECT lockstep.horizon(NULL);
\echo :SQLSTATE
SELECT lockstep.read_events(after => NULL);
\echo :SQLSTATE
SELECT lockstep.read_events(max_events => NULL);
\echo :SQLSTATE
SELECT lockstep.read_events(barrier => NULL);
\echo :SQLSTATE
SELECT lockstep.read_events(tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.read_events(aggregate_types => ARRAY['order', NULL]);
\echo :SQLSTATE
SELECT lockstep.read_events(event_types => ARRAY[NULL]);
\echo :SQLSTATE
SELECT lockstep.aggregate_events(NULL, 'a');
\echo :SQLSTATE
SELECT lockstep.aggregate_events('order', NULL);
\echo :SQLSTATE
SELECT lockstep.aggregate_events('order', 'a', after_sequence => NULL);
\echo :SQLSTATE
SELECT lockstep.aggregate_events('order', 'a', tenant => NULL);
\echo :SQLSTATE

-- NULL with a meaning.
SELECT sequence FROM lockstep.push_event('order', 'null', 'placed', payload => NULL, expected_sequence => NULL, metadata => NULL);
SELECT payload, metadata FROM lockstep.aggregate_events('order', 'null');
SELECT aggregate_id FROM lockstep.read_events(aggregate_types => NULL, event_types => NULL);
\echo :SQLSTATE
SELECT sequence FROM lockstep.aggregate_events('order', 'null', max_events => NULL);
\echo :SQLSTATE

-- Malformed events: 22023, naming the element and the key.
SELECT lockstep.push_events('{}');
\echo :SQLSTATE
SELECT lockstep.push_events('[]');
\echo :SQLSTATE
SELECT lockstep.push_events('null');
\echo :SQLSTATE
SELECT lockstep.push_events('[1]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed"}, "x"]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "event_type": "placed"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed"}, {"aggregate_type": "order", "aggregate_id": "", "event_type": "placed"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": 1, "aggregate_id": "a", "event_type": "placed"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": null, "aggregate_id": "a", "event_type": "placed"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "sequence": 1}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": -1}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": 1.5}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": "1"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": 9223372036854775808}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": null}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "no uuid"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": 7}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": {}}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "keep", "scope": "n", "value": "1"}]}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "n"}]}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "", "value": "1"}]}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "n", "value": "1", "ttl": 3}]}]');
\echo :SQLSTATE
SELECT lockstep.push_event('', 'a', 'placed');
\echo :SQLSTATE
SELECT lockstep.push_event('order', repeat('a', 801), 'placed');
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', 'placed', tenant => repeat('t', 801));
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', 'placed', expected_sequence => -1);
\echo :SQLSTATE

-- Bad numbers of the readers: 22023.
SELECT lockstep.read_events(-1);
\echo :SQLSTATE
SELECT lockstep.read_events('NaN');
\echo :SQLSTATE
SELECT lockstep.read_events(0.0000001);
\echo :SQLSTATE
SELECT lockstep.read_events(1e30);
\echo :SQLSTATE
SELECT lockstep.read_events(max_events => 0);
\echo :SQLSTATE
SELECT lockstep.aggregate_events('order', 'a', -1);
\echo :SQLSTATE
SELECT lockstep.aggregate_events('order', 'a', max_events => 0);
\echo :SQLSTATE
SELECT lockstep.read_events(aggregate_types => ARRAY['']);
\echo :SQLSTATE

-- LS001: the aggregate is not at expected_sequence.
SELECT lockstep.push_event('order', 'a', 'placed', expected_sequence => 5);
\echo :SQLSTATE
SELECT sequence FROM lockstep.push_event('order', 'a', 'placed', expected_sequence => 0);
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', 'placed', expected_sequence => 0);
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": 1}, {"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": 1}]');
\echo :SQLSTATE
SELECT sequence FROM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": 1}, {"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "expected_sequence": 2}]');
\echo :SQLSTATE

-- 23505: an event_id or a unique key is taken.
SELECT sequence FROM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "6f9619ff-8b86-d011-b42d-00c04fc964ff", "unique": [{"op": "add", "scope": "name", "value": "ada"}]}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "6f9619ff-8b86-d011-b42d-00c04fc964ff"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "6f9619ff-8b86-d011-b42d-00c04fc964ff", "expected_sequence": 0}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "00000000-0000-0000-0000-000000000001"}, {"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "00000000-0000-0000-0000-000000000001"}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "name", "value": "ada"}]}]');
\echo :SQLSTATE
SELECT sequence FROM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "event_id": "6f9619ff-8b86-d011-b42d-00c04fc964ff", "unique": [{"op": "add", "scope": "name", "value": "ada"}]}]', tenant => 'other');
\echo :SQLSTATE
SELECT sequence FROM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "domain", "value": "example.org", "global": true}]}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "domain", "value": "example.org", "global": true}]}]');
\echo :SQLSTATE
SELECT lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "domain", "value": "example.org", "global": true}]}]', tenant => 'other');
\echo :SQLSTATE

-- 54000: too much in one push.
SET lockstep.max_aggregates_per_push = 2;
SELECT lockstep.push_events((SELECT jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', i::text, 'event_type', 'placed')) FROM generate_series(1, 3) AS i));
\echo :SQLSTATE
SELECT count(*) FROM lockstep.push_events((SELECT jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', i::text, 'event_type', 'placed')) FROM generate_series(1, 2) AS i));
\echo :SQLSTATE
RESET lockstep.max_aggregates_per_push;
SELECT lockstep.push_events((SELECT jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', i::text, 'event_type', 'placed')) FROM generate_series(1, 1001) AS i));
\echo :SQLSTATE
SELECT count(*) FROM lockstep.push_events((SELECT jsonb_agg(jsonb_build_object('aggregate_type', 'order', 'aggregate_id', i::text, 'event_type', 'placed')) FROM generate_series(1, 1000) AS i));
\echo :SQLSTATE

-- 25000: where the transaction's snapshot is too old, and what would wait after a push.
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT lockstep.read_events();
\echo :SQLSTATE
ROLLBACK;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT lockstep.horizon();
\echo :SQLSTATE
ROLLBACK;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT lockstep.barrier();
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT sequence FROM lockstep.push_event('order', 'b', 'placed');
\echo :SQLSTATE
SELECT count(*) > 0 AS read FROM lockstep.read_events(max_events => 3);
\echo :SQLSTATE
SELECT lockstep.barrier();
\echo :SQLSTATE
ROLLBACK;

-- 25006: a read-only transaction may read, not push.
BEGIN READ ONLY;
SELECT count(*) FROM lockstep.read_events(max_events => 3);
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'a', 'placed');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.ticket_resync();
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.after_data_loss();
\echo :SQLSTATE
ROLLBACK;

-- 55000: the ticket sequence was set back below the log.
TRUNCATE lockstep.events, lockstep.unique_keys;
SELECT setval('lockstep.ticket', 200);
SELECT position FROM lockstep.push_event('order', 'a', 'placed');
\echo :SQLSTATE
SELECT setval('lockstep.ticket', 50);
SELECT lockstep.push_event('order', 'b', 'placed');
\echo :SQLSTATE
-- Refused again, as often as it is tried.
SELECT lockstep.push_event('order', 'b', 'placed');
\echo :SQLSTATE
SELECT lockstep.push_event('order', 'c', 'placed', expected_sequence => 0);
\echo :SQLSTATE
SELECT lockstep.ticket_resync();
\echo :SQLSTATE
SELECT position FROM lockstep.push_event('order', 'b', 'placed');
\echo :SQLSTATE
SELECT lockstep.ticket_resync();
\echo :SQLSTATE
SELECT lockstep.after_data_loss();
\echo :SQLSTATE
SELECT position FROM lockstep.push_event('order', 'b', 'placed');
\echo :SQLSTATE

-- The same through PL/pgSQL, with all that a driver gets.
DO $$
DECLARE
    message text; detail text; hint text; name text;
BEGIN
    PERFORM lockstep.push_event('order', 'a', 'placed', expected_sequence => 7);
EXCEPTION WHEN SQLSTATE 'LS001' THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RAISE WARNING E'%\n%\n%', message, detail, hint;
END $$;
DO $$
DECLARE
    detail text; name text;
BEGIN
    PERFORM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "name", "value": "ada"}]}, {"aggregate_type": "order", "aggregate_id": "a", "event_type": "placed", "unique": [{"op": "add", "scope": "name", "value": "ada"}]}]');
EXCEPTION WHEN unique_violation THEN
    GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, name = CONSTRAINT_NAME;
    RAISE WARNING E'%\n%', detail, name;
END $$;
TRUNCATE lockstep.events, lockstep.unique_keys;
