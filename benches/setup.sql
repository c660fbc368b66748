-- The control: the same columns and the same two unique indexes as the log's, with the position from a sequence.
CREATE EXTENSION lockstep;
CREATE SCHEMA bench;
CREATE SEQUENCE bench.position;
CREATE TABLE bench.events (
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
    PRIMARY KEY (tenant, aggregate_type, aggregate_id, sequence),
    UNIQUE (tenant, position)
);

-- No vacuum inside a measurement.
ALTER TABLE bench.events SET (autovacuum_enabled = off);
ALTER TABLE lockstep.events SET (autovacuum_enabled = off);
