-- Jobs: see src/job.rs for who writes these tables and in which order.

-- Ids grow with enqueueing: among jobs of one priority, the least was there first.
CREATE SEQUENCE lockstep.job_id AS bigint CACHE 1 NO CYCLE;

-- lane keeps apart in the claims' index what a claim reads apart: a number for queue and tenant, plus 1 without a key, plus 2 if
-- run_at was in the future when it was written, so that only the clock can tell whether it is due; null in progress. A number, and
-- no null beside it: a claim looks at each entry of a page, and names would cost it more than all the rest. retry_id keeps apart in
-- the twins' index what failed and came back while its twin may be on its way: 0, or the job's own id.
--
-- Every write of a row costs a look at each of its constraints and predicates, so there is one CHECK, and the predicates differ:
-- each statement names what only its own index can prove, and never walks another that was small when the plan was made.
CREATE TABLE lockstep.jobs (
    job_id bigint NOT NULL,
    tenant text NOT NULL,
    queue text NOT NULL,
    key text,
    kind text NOT NULL,
    payload jsonb NOT NULL,
    priority int NOT NULL,
    state text NOT NULL,
    attempts_left int,
    token bigint,
    holder text,
    claimed_until timestamptz,
    run_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    last_error text,
    last_failed_at timestamptz,
    previous_holder text,
    attempts int NOT NULL DEFAULT 0,
    max_attempts int,
    claimed_at timestamptz,
    enqueued bigint NOT NULL DEFAULT 1,
    slot int,
    retry_id bigint NOT NULL DEFAULT 0,
    delayed_until timestamptz NOT NULL DEFAULT 'epoch',
    lane bigint,
    CONSTRAINT jobs_pkey PRIMARY KEY (job_id),
    CONSTRAINT jobs_state_check
        CHECK (CASE state WHEN 'ready' THEN token IS NULL WHEN 'in_progress' THEN lane IS NULL ELSE false END AND attempts_left >= 0)
) WITH (fillfactor = 85, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.02);

-- One ready job a key and kind, what failed aside.
CREATE UNIQUE INDEX jobs_twin_key ON lockstep.jobs (queue, tenant, key, kind, retry_id)
    WHERE state = 'ready' AND key IS NOT NULL;
-- At most one in progress a key.
CREATE UNIQUE INDEX jobs_in_progress_key ON lockstep.jobs (queue, tenant, key)
    WHERE state = 'in_progress' AND key IS NOT NULL;
-- At most so many in progress as the queue has places.
CREATE UNIQUE INDEX jobs_slot_key ON lockstep.jobs (queue, tenant, slot)
    WHERE slot IS NOT NULL;
-- The order of claims.
CREATE INDEX jobs_order_idx ON lockstep.jobs (lane, priority DESC, delayed_until, job_id)
    WHERE lane IS NOT NULL;
-- The keys of each priority: a claim that meets many jobs of busy keys goes from key to key instead. And the tenants.
CREATE INDEX jobs_key_order_idx ON lockstep.jobs (queue, tenant, priority DESC, key, job_id)
    WHERE token IS NULL;
-- What time alone makes claimable: jobs that were delayed, and claims.
CREATE INDEX jobs_delayed_until_idx ON lockstep.jobs (queue, tenant, delayed_until)
    WHERE delayed_until > 'epoch';
CREATE INDEX jobs_claimed_until_idx ON lockstep.jobs (queue, tenant, claimed_until)
    WHERE claimed_until IS NOT NULL;

CREATE TABLE lockstep.dead_jobs (
    job_id bigint NOT NULL,
    tenant text NOT NULL,
    queue text NOT NULL,
    key text,
    kind text NOT NULL,
    payload jsonb NOT NULL,
    priority int NOT NULL,
    max_attempts int,
    attempts int NOT NULL,
    error text NOT NULL,
    last_holder text,
    run_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    claimed_at timestamptz,
    died_at timestamptz NOT NULL,
    CONSTRAINT dead_jobs_pkey PRIMARY KEY (job_id)
);

CREATE INDEX dead_jobs_queue_idx ON lockstep.dead_jobs (queue, tenant, died_at);

-- What was said of a queue: in one tenant, or, where every_tenant, in all of which nothing else was said. Null: not said.
CREATE TABLE lockstep.queues (
    queue text NOT NULL,
    every_tenant boolean NOT NULL,
    tenant text NOT NULL,
    paused boolean,
    max_in_progress int,
    backoff interval,
    max_backoff interval,
    CONSTRAINT queues_pkey PRIMARY KEY (queue, every_tenant, tenant),
    CONSTRAINT queues_tenant_check CHECK (NOT every_tenant OR tenant = '')
);

-- Sums over the last jobs completed, in parts, so that sessions need not wait for each other to add to them.
CREATE TABLE lockstep.queue_statistics (
    queue text NOT NULL,
    tenant text NOT NULL,
    part int NOT NULL,
    jobs float8 NOT NULL,
    waited float8 NOT NULL,
    ran float8 NOT NULL,
    CONSTRAINT queue_statistics_pkey PRIMARY KEY (queue, tenant, part)
) WITH (fillfactor = 50);

CREATE VIEW lockstep.queue_status WITH (security_barrier) AS
WITH clock AS MATERIALIZED (
    SELECT pg_catalog.clock_timestamp() AS now
), jobs AS MATERIALIZED (
    SELECT j.tenant, j.queue,
           pg_catalog.count(*) FILTER (WHERE j.state = 'ready' AND j.delayed_until <= c.now) AS ready,
           pg_catalog.count(*) FILTER (WHERE j.state = 'ready' AND j.delayed_until > c.now) AS delayed,
           pg_catalog.count(*) FILTER (WHERE j.state = 'in_progress') AS in_progress,
           pg_catalog.count(*) FILTER (WHERE j.claimed_until <= c.now) AS expired,
           pg_catalog.min(j.run_at) FILTER (WHERE j.state = 'ready' AND j.delayed_until <= c.now) AS oldest
    FROM lockstep.jobs AS j, clock AS c
    GROUP BY j.tenant, j.queue
), dead AS MATERIALIZED (
    SELECT d.tenant, d.queue, pg_catalog.count(*) AS dead FROM lockstep.dead_jobs AS d GROUP BY d.tenant, d.queue
), statistics AS MATERIALIZED (
    SELECT s.tenant, s.queue, pg_catalog.sum(s.jobs) AS jobs, pg_catalog.sum(s.waited) AS waited, pg_catalog.sum(s.ran) AS ran
    FROM lockstep.queue_statistics AS s
    GROUP BY s.tenant, s.queue
), queues AS MATERIALIZED (
    SELECT j.tenant, j.queue FROM jobs AS j
    UNION SELECT d.tenant, d.queue FROM dead AS d
    UNION SELECT s.tenant, s.queue FROM statistics AS s
    UNION SELECT q.tenant, q.queue FROM lockstep.queues AS q WHERE NOT q.every_tenant
)
SELECT q.tenant,
       q.queue,
       COALESCE(j.ready, 0) AS ready,
       COALESCE(j.delayed, 0) AS delayed,
       COALESCE(j.in_progress, 0) AS in_progress,
       COALESCE(j.expired, 0) AS expired,
       COALESCE(d.dead, 0) AS dead,
       GREATEST(c.now - j.oldest, '0') AS oldest_age,
       pg_catalog.make_interval(secs => s.waited / NULLIF(s.jobs, 0)) AS mean_wait,
       pg_catalog.make_interval(secs => s.ran / NULLIF(s.jobs, 0)) AS mean_run,
       COALESCE(own.paused, every.paused, false) AS paused,
       COALESCE(own.max_in_progress, every.max_in_progress) AS max_in_progress
FROM queues AS q
CROSS JOIN clock AS c
LEFT JOIN jobs AS j ON j.tenant = q.tenant AND j.queue = q.queue
LEFT JOIN dead AS d ON d.tenant = q.tenant AND d.queue = q.queue
LEFT JOIN statistics AS s ON s.tenant = q.tenant AND s.queue = q.queue
LEFT JOIN lockstep.queues AS own ON own.queue = q.queue AND NOT own.every_tenant AND own.tenant = q.tenant
LEFT JOIN lockstep.queues AS every ON every.queue = q.queue AND every.every_tenant;

SELECT pg_catalog.pg_extension_config_dump('lockstep.job_id', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.jobs', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.dead_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.queues', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.queue_statistics', '');
