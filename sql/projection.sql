-- Projections: a definition, and a cursor for each tenant in which the projection has moved.

-- owner and handler are text: a reg* column would stop pg_upgrade, and a role that is gone a whole restore.
CREATE TABLE lockstep.projections (
    name text NOT NULL,
    owner text NOT NULL,
    aggregate_types text[],
    event_types text[],
    handler text,
    batch_size int NOT NULL,
    max_failures int NOT NULL,
    retry_after interval NOT NULL,
    start_after numeric NOT NULL,
    paused boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL,
    CONSTRAINT projections_pkey PRIMARY KEY (name)
);

-- Updated by every advance: room for HOT updates, and no index on what changes. No foreign key to projections: it would lock
-- the definition's row at each first advance.
CREATE TABLE lockstep.projection_cursors (
    projection text NOT NULL,
    tenant text NOT NULL,
    position numeric NOT NULL,
    advanced_at timestamptz,
    failing boolean NOT NULL DEFAULT false,
    retry_at timestamptz,
    CONSTRAINT projection_cursors_pkey PRIMARY KEY (projection, tenant)
) WITH (fillfactor = 50);

-- What holds for one tenant where it differs from projections.paused.
CREATE TABLE lockstep.projection_pauses (
    projection text NOT NULL,
    tenant text NOT NULL,
    paused boolean NOT NULL,
    CONSTRAINT projection_pauses_pkey PRIMARY KEY (projection, tenant)
);

-- skipped_at: null while the event is still to be retried; a dead letter after that.
CREATE TABLE lockstep.failed_events (
    projection text NOT NULL,
    tenant text NOT NULL,
    position numeric NOT NULL,
    failures int NOT NULL,
    error text NOT NULL,
    sqlstate text,
    context text,
    first_failed_at timestamptz NOT NULL,
    last_failed_at timestamptz NOT NULL,
    skipped_at timestamptz,
    CONSTRAINT failed_events_pkey PRIMARY KEY (projection, tenant, position)
);

SELECT pg_catalog.pg_extension_config_dump('lockstep.projections', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.projection_pauses', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.failed_events', '');
SELECT pg_catalog.pg_extension_config_dump('lockstep.projection_cursors', '');
