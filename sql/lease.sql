-- Leases: see src/lease.rs for who writes this table, and under which locks.

-- holder is null after a release; then expires_at is when that was. min_hold_until is null without a min_hold: a released lease
-- is free whatever the clock does. Updated by every renewal: room for HOT updates, and no index on what changes.
CREATE TABLE lockstep.leases (
    name text NOT NULL,
    holder text,
    token bigint NOT NULL,
    acquired_at timestamptz NOT NULL,
    renewed_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    ttl interval NOT NULL,
    transitions bigint NOT NULL,
    metadata jsonb,
    min_hold_until timestamptz,
    lock_delay interval NOT NULL,
    stolen_from text,
    steal_reason text,
    CONSTRAINT leases_pkey PRIMARY KEY (name)
) WITH (fillfactor = 50);

SELECT pg_catalog.pg_extension_config_dump('lockstep.leases', '');
