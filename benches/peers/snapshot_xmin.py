"""The pg_snapshot_xmin recipe: each row carries its transaction's id, and readers stay below the oldest transaction that is running, in the order
of (transaction id, position). Correct within one life of the server; a transaction open anywhere in it, in other databases too, holds all
readers back, and after a dump and restore the ids mean nothing.

Recipe: https://event-driven.io/en/ordering_in_postgres_outbox/
"""

from dataclasses import replace

from . import APPLIED, HANDLER, insert

TABLE = (
    insert.TABLE
    + """
ALTER TABLE bench.events ADD transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX ON bench.events (transaction_id, position);
CREATE TABLE bench.cursors (
    consumer int PRIMARY KEY, position numeric NOT NULL, transaction_id xid8 NOT NULL DEFAULT '0'
) WITH (fillfactor = 50);
"""
)

TURN = """
CREATE FUNCTION bench.turn(of_consumer int, batch int, each boolean DEFAULT false) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    seen record;
    event record;
    applied bigint := 0;
BEGIN
    SELECT c.transaction_id, c.position INTO seen FROM bench.cursors AS c WHERE c.consumer = of_consumer FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF each THEN
        FOR event IN
            SELECT e.transaction_id, e.position, e.payload FROM bench.events AS e
            WHERE (e.transaction_id, e.position) > (seen.transaction_id, seen.position) AND e.transaction_id < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY e.transaction_id, e.position LIMIT batch
        LOOP
            PERFORM bench.handle(of_consumer, event.position, event.payload);
            seen := event;
            applied := applied + 1;
        END LOOP;
    ELSE
        WITH new AS MATERIALIZED (
            SELECT e.transaction_id, e.position, e.payload FROM bench.events AS e
            WHERE (e.transaction_id, e.position) > (seen.transaction_id, seen.position) AND e.transaction_id < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY e.transaction_id, e.position LIMIT batch
        ), kept AS (
            INSERT INTO bench.applied SELECT of_consumer, position, (payload ->> 'amount')::bigint FROM new
        )
        SELECT last.transaction_id, last.position, (SELECT count(*) FROM new) AS n INTO event
        FROM new AS last ORDER BY last.transaction_id DESC, last.position DESC LIMIT 1;
        applied := coalesce(event.n, 0);
        seen := event;
    END IF;
    IF applied > 0 THEN
        UPDATE bench.cursors AS c SET transaction_id = seen.transaction_id, position = seen.position WHERE c.consumer = of_consumer;
    END IF;
    RETURN applied;
END
$$;
"""

PEER = replace(insert.PEER, name="snapshot xmin", schema=APPLIED + HANDLER + TABLE + TURN, fill=())
