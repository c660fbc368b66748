-- Three copies of one log, and for each: how a writer pushes an event, and how a projection applies what is new.
-- A projection applies an event by writing its position into demo.applied, in the transaction that moves its cursor.

CREATE EXTENSION lockstep;
CREATE SCHEMA demo;

CREATE TABLE demo.applied (
    way int NOT NULL,
    position numeric NOT NULL,
    age interval NOT NULL, -- from the event's push to here
    PRIMARY KEY (way, position)
);

-- The projections' cursors of the ways 1 and 2; lockstep keeps its own.
CREATE TABLE demo.cursors (
    way int PRIMARY KEY,
    position bigint NOT NULL
);
INSERT INTO demo.cursors VALUES (1, 0), (2, 0);

CREATE TABLE demo.latencies (
    way int NOT NULL,
    milliseconds numeric NOT NULL
);

CREATE TABLE demo.log_1 (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    event_type text NOT NULL,
    payload jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE demo.log_2 (LIKE demo.log_1 INCLUDING ALL);

CREATE VIEW demo.committed AS
SELECT 1 AS way, position::numeric FROM demo.log_1
UNION ALL
SELECT 2, position FROM demo.log_2
UNION ALL
SELECT 3, position FROM lockstep.events;

-- Way 1: position > last seen.

CREATE FUNCTION demo.push_1(writer int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO demo.log_1 (aggregate_type, aggregate_id, event_type, payload)
    VALUES ('order', writer::text, 'paid', '{"amount": 10}');
END
$$;

CREATE FUNCTION demo.apply_1() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    seen bigint := (SELECT position FROM demo.cursors WHERE way = 1);
    applied bigint;
BEGIN
    WITH new AS (
        INSERT INTO demo.applied
        SELECT 1, position, clock_timestamp() - created_at FROM demo.log_1
        WHERE position > seen
        ORDER BY position LIMIT 1000
        RETURNING position
    )
    SELECT count(*), max(position) INTO applied, seen FROM new;
    UPDATE demo.cursors SET position = seen WHERE way = 1 AND applied > 0;
    RETURN applied;
END
$$;

-- Way 2: writers hold a lock shared; the projection waits in the lock's queue to have it alone, when no writer is in flight.
-- What was drawn from the sequence by then is settled: no event of it is missed.

CREATE FUNCTION demo.push_2(writer int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(2);
    INSERT INTO demo.log_2 (aggregate_type, aggregate_id, event_type, payload)
    VALUES ('order', writer::text, 'paid', '{"amount": 10}');
END
$$;

CREATE FUNCTION demo.apply_2() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    seen bigint := (SELECT position FROM demo.cursors WHERE way = 2);
    settled bigint;
    applied bigint;
BEGIN
    PERFORM pg_advisory_lock(2);
    settled := (SELECT last_value FROM demo.log_2_position_seq);
    PERFORM pg_advisory_unlock(2);
    WITH new AS (
        INSERT INTO demo.applied
        SELECT 2, position, clock_timestamp() - created_at FROM demo.log_2
        WHERE position > seen AND position <= settled
        ORDER BY position LIMIT 1000
        RETURNING position
    )
    SELECT count(*), max(position) INTO applied, seen FROM new;
    UPDATE demo.cursors SET position = seen WHERE way = 2 AND applied > 0;
    RETURN applied;
END
$$;

-- Way 3: lockstep.

SELECT lockstep.projection_create('demo');

CREATE FUNCTION demo.push_3(writer int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lockstep.push_event('order', writer::text, 'paid', '{"amount": 10}');
END
$$;

CREATE FUNCTION demo.apply_3() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    applied bigint;
BEGIN
    INSERT INTO demo.applied
    SELECT 3, position, clock_timestamp() - created_at FROM lockstep.projection_claim('demo', max_events => 1000);
    GET DIAGNOSTICS applied = ROW_COUNT;
    PERFORM lockstep.projection_advance('demo');
    RETURN applied;
END
$$;
