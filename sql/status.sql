-- What an operator looks at. Both views show what is going on now, from the lock table, beside what is stored.

CREATE VIEW lockstep.writers AS
SELECT w.tenant,
       w.pid,
       x.gid,
       COALESCE(a.xact_start, x.prepared) AS transaction_start,
       w.least_position
FROM lockstep.writer_locks() AS w
LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = w.pid
LEFT JOIN pg_catalog.pg_prepared_xacts AS x ON x.transaction::text::bigint = w.prepared_transaction;

-- The log is looked into only for the pairs that are behind, and there at 10,000 events at the most.
CREATE VIEW lockstep.projection_status AS
WITH tenants AS MATERIALIZED (
    SELECT t.tenant, t.head FROM lockstep.tenants AS t
), claims AS MATERIALIZED (
    SELECT l.projection, l.tenant, l.pid, (pg_catalog.pg_blocking_pids(l.pid))[1] AS waits_for_pid
    FROM lockstep.projection_locks() AS l
), failed AS MATERIALIZED (
    SELECT f.projection, f.tenant,
           pg_catalog.max(f.failures) FILTER (WHERE f.skipped_at IS NULL) AS failures,
           pg_catalog.count(*) FILTER (WHERE f.skipped_at IS NOT NULL) AS skipped,
           (pg_catalog.array_agg(f.error ORDER BY f.last_failed_at DESC))[1] AS last_error
    FROM lockstep.failed_events AS f
    GROUP BY f.projection, f.tenant
), pairs AS MATERIALIZED (
    SELECT p.name AS projection, t.tenant, COALESCE(c.position, p.start_after) AS position, t.head,
           p.aggregate_types, p.event_types,
           -- Why no worker runs it, where workers are on.
           CASE WHEN p.handler IS NULL OR NOT lockstep.workers_are_on() THEN NULL
                WHEN r.rolname IS NULL THEN 'refused_role_missing'
                WHEN r.rolsuper THEN 'refused_superuser'
                WHEN NOT r.rolcanlogin AND pg_catalog.current_setting('server_version_num')::int < 170000
                    THEN 'refused_role_nologin' END AS refused,
           COALESCE(x.paused, p.paused) AS paused,
           COALESCE(c.retry_at > pg_catalog.clock_timestamp(), false) AS backs_off,
           c.advanced_at
    FROM tenants AS t
    CROSS JOIN lockstep.projections AS p
    LEFT JOIN pg_catalog.pg_roles AS r ON r.rolname = p.owner
    LEFT JOIN lockstep.projection_cursors AS c ON c.projection = p.name AND c.tenant = t.tenant
    LEFT JOIN lockstep.projection_pauses AS x ON x.projection = p.name AND x.tenant = t.tenant
), behind AS MATERIALIZED (
    SELECT p.projection, p.tenant, b.*
    FROM pairs AS p
    CROSS JOIN LATERAL (
        SELECT LEAST(pg_catalog.count(*) FILTER (WHERE e.matches), 10000) AS events,
               pg_catalog.count(*) > 10000 AS capped,
               pg_catalog.min(e.created_at) FILTER (WHERE e.matches) AS oldest
        FROM (SELECT e.created_at,
                     (p.aggregate_types IS NULL OR e.aggregate_type = ANY (p.aggregate_types))
                     AND (p.event_types IS NULL OR e.event_type = ANY (p.event_types)) AS matches
              FROM lockstep.events AS e
              WHERE e.tenant = p.tenant AND e.position > p.position
              ORDER BY e.position
              LIMIT 10001) AS e
    ) AS b
    WHERE p.position < p.head
)
SELECT p.projection,
       p.tenant,
       p.position,
       p.head,
       COALESCE(b.events, 0) AS behind,
       COALESCE(b.capped, false) AS behind_capped,
       pg_catalog.clock_timestamp() - b.oldest AS oldest_unapplied_age,
       CASE WHEN l.projection IS NOT NULL THEN 'running'
            WHEN p.paused THEN 'paused'
            WHEN p.backs_off THEN 'backoff'
            ELSE COALESCE(p.refused, 'idle') END AS state,
       l.pid AS claim_pid,
       l.waits_for_pid,
       pg_catalog.clock_timestamp() - a.xact_start AS waits_for_age,
       COALESCE(f.failures, 0) AS failures,
       COALESCE(f.skipped, 0) AS skipped,
       f.last_error,
       p.advanced_at AS last_applied_at
FROM pairs AS p
LEFT JOIN behind AS b ON b.projection = p.projection AND b.tenant = p.tenant
LEFT JOIN claims AS l ON l.projection = p.projection AND l.tenant = p.tenant
LEFT JOIN failed AS f ON f.projection = p.projection AND f.tenant = p.tenant
LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.waits_for_pid;

CREATE VIEW lockstep.worker_status AS
SELECT w.worker,
       w.pid,
       w.owner,
       w.state,
       w.projection,
       w.tenant,
       pg_catalog.clock_timestamp() - w.batch_started_at AS batch_age,
       w.batches,
       w.events,
       w.events_per_second,
       w.errors,
       w.last_error,
       w.last_error_at,
       w.restarts,
       w.started_at,
       a.wait_event_type,
       a.wait_event
FROM lockstep.workers() AS w
LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = w.pid;
