-- What the functions of the generation registry refuse: message, DETAIL, HINT and SQLSTATE.
SET client_min_messages = warning;
TRUNCATE lockstep.resources, lockstep.replicas;
SELECT setval('lockstep.token', 100);

-- NULL where none is meant: 22004, naming the argument.
SELECT lockstep.resource_create(NULL);
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', NULL);
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', ARRAY['a', NULL]);
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.resource_delete(NULL);
\echo :SQLSTATE
SELECT lockstep.resource_delete('repo', NULL);
\echo :SQLSTATE
SELECT lockstep.resource_purge(NULL);
\echo :SQLSTATE
SELECT lockstep.resource_purge('1 day', NULL);
\echo :SQLSTATE
SELECT lockstep.generation_increment(NULL);
\echo :SQLSTATE
SELECT lockstep.generation_increment('repo', ARRAY[NULL]);
\echo :SQLSTATE
SELECT lockstep.generation_increment('repo', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.generation_set(NULL, 'a', 1);
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', NULL, 1);
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', 'a', NULL);
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', 'a', 1, force => NULL);
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', 'a', 1, tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.generation_replicated(NULL, 'a', 'b');
\echo :SQLSTATE
SELECT lockstep.generation_replicated('repo', NULL, 'b');
\echo :SQLSTATE
SELECT lockstep.generation_replicated('repo', 'a', NULL);
\echo :SQLSTATE
SELECT lockstep.generation_current(NULL);
\echo :SQLSTATE
SELECT lockstep.generation_current('repo', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_make_authoritative(NULL, 'a');
\echo :SQLSTATE
SELECT lockstep.replica_make_authoritative('repo', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_delete(NULL, 'a');
\echo :SQLSTATE
SELECT lockstep.replica_delete('repo', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_invalidate(NULL, 'a');
\echo :SQLSTATE
SELECT lockstep.replica_invalidate('repo', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin(NULL, 'a', 'w');
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', NULL, 'w');
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', 'a', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', 'a', 'w', ttl => NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_renew(NULL, 'a', 1);
\echo :SQLSTATE
SELECT lockstep.replica_sync_renew('repo', NULL, 1);
\echo :SQLSTATE
SELECT lockstep.replica_sync_renew('repo', 'a', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_renew('repo', 'a', 1, NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish(NULL, 'a', 1);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish('repo', NULL, 1);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish('repo', 'a', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish('repo', 'a', 1, missing_at_source => NULL);
\echo :SQLSTATE
SELECT lockstep.replicas_due(NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_claim(NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_claim('w', NULL);
\echo :SQLSTATE
SELECT lockstep.replica_sync_claim('w', ttl => NULL);
\echo :SQLSTATE
SELECT lockstep.registry_follow(NULL, 'repo');
\echo :SQLSTATE
SELECT lockstep.registry_follow('created', NULL);
\echo :SQLSTATE
SELECT lockstep.registry_follow('created', 'repo', NULL);
\echo :SQLSTATE

-- Bad names, numbers and durations: 22023.
SELECT lockstep.resource_create('');
\echo :SQLSTATE
SELECT lockstep.resource_create(repeat('r', 801));
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', ARRAY['a', '']);
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', ARRAY[repeat('a', 801)]);
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', tenant => repeat('t', 801));
\echo :SQLSTATE
SELECT lockstep.resource_purge('-1 day');
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', '', 1);
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', 'a', -1);
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', 'a', '');
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', 'a', 'w', ttl => '0');
\echo :SQLSTATE
SELECT lockstep.replica_sync_renew('repo', 'a', 1, '-1 second');
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', 'a', 'w', '');
\echo :SQLSTATE
SELECT lockstep.replicas_due(0);
\echo :SQLSTATE
SELECT lockstep.replica_sync_claim('w', 0);
\echo :SQLSTATE
SELECT lockstep.replica_sync_claim('w', ttl => '0');
\echo :SQLSTATE
SELECT lockstep.registry_follow('', 'repo');
\echo :SQLSTATE

-- 42704: there is no such resource, or it was deleted; no such replica.
SELECT lockstep.generation_increment('none');
\echo :SQLSTATE
SELECT lockstep.replica_make_authoritative('none', 'a');
\echo :SQLSTATE
SELECT lockstep.generation_replicated('none', 'a', 'b');
\echo :SQLSTATE
SELECT lockstep.resource_create('gone', ARRAY['a']);
\echo :SQLSTATE
SELECT lockstep.resource_delete('gone');
\echo :SQLSTATE
SELECT lockstep.generation_increment('gone');
\echo :SQLSTATE
SELECT lockstep.replica_make_authoritative('gone', 'a');
\echo :SQLSTATE
SELECT lockstep.resource_create('repo', ARRAY['a', 'b', 'c']);
\echo :SQLSTATE
SELECT lockstep.replica_make_authoritative('repo', 'x');
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('none', 'a', 'w');
\echo :SQLSTATE
SELECT lockstep.generation_set('none', 'a', 1);
\echo :SQLSTATE

-- 42710: it is there.
SELECT lockstep.resource_create('repo');
\echo :SQLSTATE

-- LS004: the target is not behind the source.
SELECT lockstep.generation_increment('repo', ARRAY['a', 'b']);
\echo :SQLSTATE
SELECT lockstep.generation_replicated('repo', 'a', 'b');
\echo :SQLSTATE
SELECT lockstep.generation_replicated('repo', 'c', 'a');
\echo :SQLSTATE
SELECT lockstep.resource_create('new', ARRAY['a']);
\echo :SQLSTATE
SELECT lockstep.generation_replicated('new', 'b', 'a');
\echo :SQLSTATE

-- LS005: a write to replicas of which none is current.
SELECT lockstep.generation_increment('repo', ARRAY['c']);
\echo :SQLSTATE
SELECT lockstep.generation_increment('repo', ARRAY['x', 'c']);
\echo :SQLSTATE
SELECT lockstep.generation_increment('repo', '{}');
\echo :SQLSTATE
SELECT lockstep.generation_increment('repo');
\echo :SQLSTATE
SELECT lockstep.generation_increment('repo', ARRAY['a', 'b', 'c']);
\echo :SQLSTATE

-- LS006: the source is not current, or holds nothing.
SELECT lockstep.replica_sync_begin('repo', 'c', 'w', 'a');
\echo :SQLSTATE
SELECT lockstep.replica_sync_begin('repo', 'c', 'w', 'x');
\echo :SQLSTATE

-- What is expected in normal operation is returned, not raised.
SELECT lockstep.generation_set('repo', 'a', 0);
\echo :SQLSTATE
SELECT lockstep.generation_set('repo', 'a', 2, incarnation => 1);
\echo :SQLSTATE
SELECT status, token, generation FROM lockstep.replica_sync_begin('repo', 'c', 'w');
\echo :SQLSTATE
SELECT status FROM lockstep.replica_sync_begin('repo', 'c', 'v');
\echo :SQLSTATE
SELECT status FROM lockstep.replica_sync_begin('gone', 'a', 'v');
\echo :SQLSTATE
SELECT lockstep.replica_sync_renew('repo', 'c', 7);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish('repo', 'c', 7);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish('repo', 'c', 105);
\echo :SQLSTATE
SELECT lockstep.replica_sync_finish('none', 'c', 105);
\echo :SQLSTATE
SELECT lockstep.registry_follow('changed', 'repo');
\echo :SQLSTATE
SELECT lockstep.replica_delete('repo', 'none');
\echo :SQLSTATE
SELECT lockstep.replica_invalidate('repo', 'none');
\echo :SQLSTATE
SELECT lockstep.resource_delete('none');
\echo :SQLSTATE

-- A generation has 63 bits.
SELECT lockstep.resource_create('old', ARRAY['a']);
\echo :SQLSTATE
SELECT lockstep.generation_set('old', 'a', 9223372036854775807);
\echo :SQLSTATE
SELECT lockstep.generation_increment('old', ARRAY['a']);
\echo :SQLSTATE

-- 25006: in a read-only transaction.
BEGIN READ ONLY;
SELECT lockstep.resource_create('other');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.generation_increment('repo');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.replica_sync_finish('repo', 'c', 7);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.registry_follow('created', 'repo');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT count(*) FROM lockstep.generation_current('repo');
\echo :SQLSTATE
ROLLBACK;

-- 55000: the token sequence was left behind, as a logical replication leaves it.
SELECT lockstep.resource_create('left behind', ARRAY['a', 'b']) > 0 AS created;
SELECT lockstep.generation_increment('left behind', ARRAY['a']);
SELECT lockstep.resource_create('deleted') > 0 AS created, lockstep.resource_delete('deleted');
SELECT last_value AS token FROM lockstep.token \gset
SELECT setval('lockstep.token', 1) < :token AS set_back;
SELECT status FROM lockstep.replica_sync_begin('left behind', 'b', 'w');
\echo :SQLSTATE
SELECT count(*) FROM lockstep.replica_sync_claim('w');
\echo :SQLSTATE
SELECT lockstep.resource_create('deleted') > 0 AS created;
\echo :SQLSTATE
SELECT lockstep.after_data_loss();
SELECT status FROM lockstep.replica_sync_begin('left behind', 'b', 'w');
SELECT lockstep.resource_create('deleted') > :token AS created;

-- The same through PL/pgSQL, with all that a driver gets.
DO $$
DECLARE
    message text; detail text; hint text;
BEGIN
    PERFORM lockstep.generation_increment('repo', ARRAY['a']);
EXCEPTION WHEN SQLSTATE 'LS005' THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RAISE WARNING E'%\n%\n%', message, detail, hint;
END
$$;
