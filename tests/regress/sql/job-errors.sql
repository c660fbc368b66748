-- What the functions of the job queue refuse: message, DETAIL, HINT and SQLSTATE.
SET client_min_messages = warning;
TRUNCATE lockstep.jobs, lockstep.dead_jobs, lockstep.queues;
SELECT setval('lockstep.token', 100), setval('lockstep.job_id', 100);

-- NULL where none is meant: 22004, naming the argument.
SELECT lockstep.job_enqueue(NULL, 'k', 'send');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', NULL);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', NULL);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', delay => NULL);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', priority => NULL);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', on_twin => NULL);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', tenant => NULL);
\echo :SQLSTATE
SELECT lockstep.job_claim(NULL, 'w');
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', NULL);
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', 'w', NULL);
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', 'w', ttl => NULL);
\echo :SQLSTATE
SELECT lockstep.job_renew(NULL, ARRAY[1]);
\echo :SQLSTATE
SELECT lockstep.job_renew(ARRAY[1], NULL);
\echo :SQLSTATE
SELECT lockstep.job_renew(ARRAY[NULL]::bigint[], ARRAY[1]);
\echo :SQLSTATE
SELECT lockstep.job_renew(ARRAY[1], ARRAY[NULL]::bigint[]);
\echo :SQLSTATE
SELECT lockstep.job_renew(ARRAY[1], ARRAY[1], NULL);
\echo :SQLSTATE
SELECT lockstep.job_complete(NULL, 1);
\echo :SQLSTATE
SELECT lockstep.job_complete(1, NULL);
\echo :SQLSTATE
SELECT lockstep.job_fail(NULL, 1, 'no');
\echo :SQLSTATE
SELECT lockstep.job_fail(1, NULL, 'no');
\echo :SQLSTATE
SELECT lockstep.job_fail(1, 1, NULL);
\echo :SQLSTATE
SELECT lockstep.job_guard(NULL, 1);
\echo :SQLSTATE
SELECT lockstep.job_guard(1, NULL);
\echo :SQLSTATE
SELECT lockstep.job_cancel(NULL);
\echo :SQLSTATE
SELECT lockstep.job_requeue(NULL);
\echo :SQLSTATE
SELECT lockstep.job_discard(NULL);
\echo :SQLSTATE
SELECT lockstep.job_purge(NULL);
\echo :SQLSTATE
SELECT lockstep.queue_configure(NULL);
\echo :SQLSTATE
SELECT lockstep.queue_pause(NULL);
\echo :SQLSTATE
SELECT lockstep.queue_resume(NULL);
\echo :SQLSTATE
CALL lockstep.job_wait(NULL, '1 second');
\echo :SQLSTATE
CALL lockstep.job_wait('mail', NULL);
\echo :SQLSTATE

-- Bad names, numbers and durations: 22023.
SELECT lockstep.job_enqueue('', 'k', 'send');
\echo :SQLSTATE
SELECT lockstep.job_enqueue(repeat('q', 801), 'k', 'send');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', '', 'send');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', repeat('k', 801), 'send');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', '');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', repeat('s', 801));
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', max_attempts => 0);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', delay => '-1 second');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', on_twin => 'merge');
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'k', 'send', tenant => repeat('t', 801));
\echo :SQLSTATE
SELECT lockstep.job_claim('', 'w');
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', '');
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', 'w', 0);
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', 'w', ttl => '0');
\echo :SQLSTATE
SELECT lockstep.job_claim('mail', 'w', ttl => '1001 years');
\echo :SQLSTATE
SELECT lockstep.job_renew(ARRAY[1, 2], ARRAY[1]);
\echo :SQLSTATE
SELECT lockstep.job_renew(ARRAY[1], ARRAY[1], '0');
\echo :SQLSTATE
SELECT lockstep.job_fail(1, 1, 'no', '-1 second');
\echo :SQLSTATE
SELECT lockstep.job_purge('-1 day');
\echo :SQLSTATE
SELECT lockstep.queue_configure('mail', max_in_progress => -2);
\echo :SQLSTATE
SELECT lockstep.queue_configure('mail', max_in_progress => 1000000);
\echo :SQLSTATE
SELECT lockstep.queue_configure('mail', backoff => '-1 second');
\echo :SQLSTATE
SELECT lockstep.queue_configure('mail', max_backoff => '-1 second');
\echo :SQLSTATE
CALL lockstep.job_wait('mail', '-1 second');
\echo :SQLSTATE

-- What is expected in normal operation is returned, not raised.
CALL lockstep.job_wait('mail', '1 millisecond', tenant => NULL);
\echo :SQLSTATE
SELECT * FROM lockstep.job_enqueue('mail', 'k', 'send', max_attempts => 1);
\echo :SQLSTATE
SELECT * FROM lockstep.job_enqueue('mail', 'k', 'send');
\echo :SQLSTATE
SELECT job_id, state, token, attempts_left FROM lockstep.job_claim('mail', 'w', ttl => '1 hour');
\echo :SQLSTATE
SELECT count(*) FROM lockstep.job_claim('mail', 'w');
\echo :SQLSTATE
SELECT lockstep.job_complete(101, 7);
\echo :SQLSTATE
SELECT lockstep.job_fail(101, 7, 'no');
\echo :SQLSTATE
SELECT count(*) FROM lockstep.job_renew(ARRAY[101, 999], ARRAY[7, 7]);
\echo :SQLSTATE
SELECT lockstep.job_cancel(999), lockstep.job_requeue(999), lockstep.job_discard(999);
\echo :SQLSTATE

-- LS007: the job is not claimed with this token.
SELECT lockstep.job_guard(101, 101);
\echo :SQLSTATE
SELECT lockstep.job_guard(101, 7);
\echo :SQLSTATE
SELECT lockstep.job_guard(999, 101);
\echo :SQLSTATE
SELECT lockstep.job_enqueue('mail', 'other', 'send');
\echo :SQLSTATE
SELECT lockstep.job_guard(102, 101);
\echo :SQLSTATE
UPDATE lockstep.jobs SET claimed_until = '2001-02-03 04:05:06+00' WHERE job_id = 101;
SELECT lockstep.job_guard(101, 101);
\echo :SQLSTATE
SELECT lockstep.job_reap();
\echo :SQLSTATE
SELECT lockstep.job_guard(101, 101);
\echo :SQLSTATE

-- 2D000: the procedure commits, so it has no transaction around it.
BEGIN;
CALL lockstep.job_wait('mail', '1 second');
\echo :SQLSTATE
ROLLBACK;

-- 25006: in a read-only transaction.
BEGIN READ ONLY;
SELECT lockstep.job_enqueue('mail', 'k', 'send');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.job_claim('mail', 'w');
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.job_complete(101, 101);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.job_guard(101, 101);
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.job_reap();
\echo :SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT lockstep.queue_pause('mail');
\echo :SQLSTATE
ROLLBACK;

-- The same through PL/pgSQL, with all that a driver gets.
DO $$
DECLARE
    message text; detail text; hint text;
BEGIN
    PERFORM lockstep.job_guard(102, 7);
EXCEPTION WHEN SQLSTATE 'LS007' THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RAISE WARNING E'%\n%\n%', message, detail, hint;
END
$$;
