-- The event log: see src/event_log.rs for who writes these tables and in which order.

-- Names are resolved with search_path pg_catalog, lockstep, pg_temp; what others put into this schema would be found there. It is
-- in this script's path too, so this names each operator's schema: an `=` in it for types between which pg_catalog has none would
-- be the best match, and would run with the rights of the superuser who installs.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_class AS c
               WHERE c.relnamespace OPERATOR(pg_catalog.=) 'lockstep'::pg_catalog.regnamespace::pg_catalog.oid)
        OR EXISTS (SELECT FROM pg_catalog.pg_proc AS p
                   WHERE p.pronamespace OPERATOR(pg_catalog.=) 'lockstep'::pg_catalog.regnamespace::pg_catalog.oid)
        OR EXISTS (SELECT FROM pg_catalog.pg_operator AS o
                   WHERE o.oprnamespace OPERATOR(pg_catalog.=) 'lockstep'::pg_catalog.regnamespace::pg_catalog.oid)
        OR EXISTS (SELECT FROM pg_catalog.pg_type AS t
                   WHERE t.typnamespace OPERATOR(pg_catalog.=) 'lockstep'::pg_catalog.regnamespace::pg_catalog.oid)
        OR EXISTS (SELECT
                   FROM pg_catalog.pg_namespace AS n, pg_catalog.aclexplode(n.nspacl) AS a
                   WHERE n.nspname OPERATOR(pg_catalog.=) 'lockstep'::pg_catalog.name
                     AND a.privilege_type OPERATOR(pg_catalog.=) 'CREATE'::pg_catalog.text
                     AND a.grantee OPERATOR(pg_catalog.<>) n.nspowner)
        OR NOT EXISTS (SELECT
                       FROM pg_catalog.pg_namespace AS n
                       JOIN pg_catalog.pg_roles AS r ON r.oid OPERATOR(pg_catalog.=) n.nspowner
                       WHERE n.nspname OPERATOR(pg_catalog.=) 'lockstep'::pg_catalog.name
                         AND (r.rolsuper OR r.rolname OPERATOR(pg_catalog.=) current_user))
    THEN
        RAISE EXCEPTION 'schema "lockstep" is in use'
            USING ERRCODE = 'duplicate_schema',
                  DETAIL = 'It holds objects, another role may create objects in it, or it belongs to a role that is not a superuser.',
                  HINT = 'Drop it; CREATE EXTENSION creates it. If there is none, default privileges let others create objects in new schemas: revoke that before.';
    END IF;
END
$$;

DO $$
BEGIN
    IF pg_catalog.current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII') THEN
        RAISE EXCEPTION 'lockstep needs a database in encoding UTF8, not %', pg_catalog.current_setting('server_encoding')
            USING ERRCODE = 'feature_not_supported';
    END IF;
END
$$;

-- CACHE 1: a cached value would let a push carry a ticket from before a reader's cut.
CREATE SEQUENCE lockstep.ticket AS bigint CACHE 1 NO CYCLE;

CREATE TABLE lockstep.events (
    tenant text NOT NULL,
    position numeric NOT NULL,
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    sequence bigint NOT NULL,
    event_type text NOT NULL,
    event_id uuid,
    payload jsonb,
    metadata jsonb,
    created_at timestamptz NOT NULL,
    CONSTRAINT events_pkey PRIMARY KEY (tenant, aggregate_type, aggregate_id, sequence),
    CONSTRAINT events_tenant_position_key UNIQUE (tenant, position)
);

CREATE UNIQUE INDEX events_tenant_event_id_key ON lockstep.events (tenant, event_id) WHERE event_id IS NOT NULL;

CREATE TABLE lockstep.unique_keys (
    tenant text NOT NULL,
    scope text NOT NULL,
    value text NOT NULL,
    global boolean NOT NULL,
    position numeric NOT NULL,
    CONSTRAINT unique_keys_pkey PRIMARY KEY (tenant, scope, value)
);

CREATE UNIQUE INDEX unique_keys_scope_value_key ON lockstep.unique_keys (scope, value) WHERE global;

-- One descent of the index a tenant: the log is never scanned.
CREATE VIEW lockstep.tenants WITH (security_barrier) AS
WITH RECURSIVE walk (tenant) AS (
    (SELECT e.tenant FROM lockstep.events AS e ORDER BY e.tenant LIMIT 1)
    UNION ALL
    SELECT (SELECT e.tenant FROM lockstep.events AS e WHERE e.tenant > walk.tenant ORDER BY e.tenant LIMIT 1)
    FROM walk
    WHERE walk.tenant IS NOT NULL
)
SELECT walk.tenant,
       (SELECT e.position FROM lockstep.events AS e
        WHERE e.tenant = walk.tenant ORDER BY e.position DESC LIMIT 1) AS head
FROM walk
WHERE walk.tenant IS NOT NULL;

SELECT pg_catalog.pg_extension_config_dump('lockstep.ticket', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.events', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.unique_keys', '');
