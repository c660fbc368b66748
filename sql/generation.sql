-- The generation registry: resources, their replicas, and who is syncing what. src/generation.rs says who writes these tables
-- and in which order.

-- No foreign key from replicas: it would lock the resource's row once more at each new replica.
CREATE TABLE lockstep.resources (
    tenant text NOT NULL,
    resource text NOT NULL,
    incarnation bigint NOT NULL,
    generation bigint NOT NULL,
    created_at timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    deleted_at timestamptz,
    CONSTRAINT resources_pkey PRIMARY KEY (tenant, resource)
) WITH (fillfactor = 70);

CREATE INDEX resources_tenant_deleted_at_idx ON lockstep.resources (tenant, deleted_at) WHERE deleted_at IS NOT NULL;

-- generation: null where the replica holds nothing. sync_*: the claim, null without one. due_at: from when on a sync is wanted,
-- null where the replica is current; a claim does not change it, so that beginning and renewing touch no index.
CREATE TABLE lockstep.replicas (
    tenant text NOT NULL,
    resource text NOT NULL,
    replica text NOT NULL,
    generation bigint,
    synced_at timestamptz,
    due_at timestamptz,
    sync_token bigint,
    sync_holder text,
    sync_started_at timestamptz,
    sync_expires_at timestamptz,
    sync_generation bigint,
    sync_source text,
    sync_source_lost boolean NOT NULL DEFAULT false,
    retry_count int NOT NULL DEFAULT 0,
    retry_at timestamptz,
    missing_at_source boolean NOT NULL DEFAULT false,
    last_error text,
    CONSTRAINT replicas_pkey PRIMARY KEY (tenant, resource, replica)
) WITH (fillfactor = 70);

-- What wants a sync, and no more: a look at it costs the same in any registry.
CREATE INDEX replicas_tenant_due_at_idx ON lockstep.replicas (tenant, due_at) WHERE due_at IS NOT NULL;

CREATE VIEW lockstep.replica_status AS
SELECT p.tenant,
       p.resource,
       p.replica,
       CASE WHEN r.deleted_at IS NOT NULL THEN 'gone'
            WHEN p.generation = r.generation THEN 'current'
            WHEN p.sync_expires_at > t.now THEN 'syncing'
            WHEN p.retry_at > t.now THEN 'backoff'
            WHEN p.generation IS NULL THEN 'missing'
            ELSE 'outdated' END AS state,
       p.generation,
       r.generation AS resource_generation,
       r.generation - p.generation AS behind,
       r.incarnation,
       p.synced_at,
       p.due_at,
       p.sync_holder,
       p.sync_source,
       p.sync_started_at,
       p.sync_expires_at,
       p.retry_count,
       p.retry_at,
       p.missing_at_source,
       p.last_error
FROM lockstep.replicas AS p
JOIN lockstep.resources AS r ON r.tenant = p.tenant AND r.resource = p.resource
CROSS JOIN (SELECT pg_catalog.clock_timestamp() AS now OFFSET 0) AS t;

CREATE VIEW lockstep.resource_status AS
SELECT r.tenant,
       r.resource,
       CASE WHEN r.deleted_at IS NOT NULL THEN 'gone'
            WHEN c.current = 0 THEN 'outdated'
            WHEN c.current < c.replicas THEN 'partly'
            ELSE 'current' END AS state,
       r.incarnation,
       r.generation,
       c.replicas,
       c.current,
       c.syncing,
       c.failing,
       c.oldest_due_at,
       r.created_at,
       r.changed_at,
       r.deleted_at
FROM lockstep.resources AS r
CROSS JOIN LATERAL (
    SELECT pg_catalog.count(*) AS replicas,
           pg_catalog.count(*) FILTER (WHERE p.generation = r.generation AND r.deleted_at IS NULL) AS current,
           pg_catalog.count(*) FILTER (WHERE p.sync_expires_at > pg_catalog.clock_timestamp()) AS syncing,
           pg_catalog.count(*) FILTER (WHERE p.retry_count > 0) AS failing,
           pg_catalog.min(p.due_at) AS oldest_due_at
    FROM lockstep.replicas AS p
    WHERE p.tenant = r.tenant AND p.resource = r.resource
) AS c;

SELECT pg_catalog.pg_extension_config_dump('lockstep.resources', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.replicas', '');
