"""lockstep itself. Appends check the version as the peers' do (`expected_sequence`), but where they cannot (a hot aggregate). A consumer
claims, applies and advances in one transaction, below the horizon (`barrier => false`), as workers do; the catch-up cells call
projection_run with a handler.

Reference: docs/event_log.md, docs/projection.md
"""

import json

from . import APPLIED, CONSUMERS, Log, literal, payload

SCHEMA = (
    "CREATE EXTENSION lockstep;"
    + APPLIED
    + f"""
CREATE FUNCTION bench.turn(of_consumer int, batch int, each boolean DEFAULT false) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    applied bigint;
BEGIN
    INSERT INTO bench.applied
    SELECT of_consumer, position, (payload ->> 'amount')::bigint
    FROM lockstep.projection_claim('consumer ' || of_consumer, max_events => batch, barrier => false);
    GET DIAGNOSTICS applied = ROW_COUNT;
    IF applied > 0 THEN
        PERFORM lockstep.projection_advance('consumer ' || of_consumer);
    END IF;
    RETURN applied;
END
$$;

-- What projection_run calls: for a set of events, or for each of them. A projection of its own for each consumer.
DO $do$
BEGIN
    FOR n IN 1..{CONSUMERS} LOOP
        EXECUTE format($f$
            CREATE FUNCTION bench.apply_set_%1$s(events lockstep.events[]) RETURNS void LANGUAGE sql AS
                $h$INSERT INTO bench.applied SELECT %1$s, e.position, (e.payload ->> 'amount')::bigint FROM unnest(events) AS e$h$;
            CREATE FUNCTION bench.apply_each_%1$s(event lockstep.events) RETURNS void LANGUAGE plpgsql AS
                $h$BEGIN INSERT INTO bench.applied VALUES (%1$s, event.position, (event.payload ->> 'amount')::bigint); END$h$;
            $f$, n);
        PERFORM lockstep.projection_create('consumer ' || n);
        PERFORM lockstep.projection_create('set ' || n, handler => format('bench.apply_set_%s(lockstep.events[])', n)::regprocedure);
        PERFORM lockstep.projection_create('each ' || n, handler => format('bench.apply_each_%s(lockstep.events)', n)::regprocedure);
    END LOOP;
END
$do$;
"""
)

REWIND = "TRUNCATE bench.applied, lockstep.projection_cursors, lockstep.failed_events"
FILL = (
    """INSERT INTO lockstep.events
SELECT '', n + 1, 'order', (n / 10)::text, n % 10 + 1, 'paid', NULL, jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), NULL, now()
FROM generate_series(0, {events} - 1) AS n""",
    "SELECT lockstep.ticket_resync()",
)

RUN = "SELECT * FROM lockstep.projection_run(CASE WHEN {each} THEN 'each ' ELSE 'set ' END || (:client_id + 1), max_events => {batch}, barrier => false);\n"


def event(aggregate, text):
    return json.dumps({"aggregate_type": "order", "aggregate_id": aggregate, "event_type": "paid", "payload": json.loads(text)})


def batch(aggregates):
    """All values in the text of the one argument."""
    return f"SELECT * FROM lockstep.push_events({literal('[' + ', '.join(event(name, payload(150)) for name in aggregates) + ']')});\n"


PEER = Log(
    name="lockstep",
    schema=SCHEMA,
    append="SELECT * FROM lockstep.push_event('order', :aggregate, 'paid', :payload, :sequence - 1);\n",
    hot="SELECT * FROM lockstep.push_event('order', 'hot', 'paid', :payload);\n",
    batch=batch,
    committed="SELECT position FROM lockstep.events WHERE tenant = ''",
    reset=f"TRUNCATE lockstep.events; {REWIND}",
    rewind=REWIND,
    fill=FILL,
)


class Client:
    """The same through psycopg, for driver.py."""

    def __init__(self):
        import psycopg

        self.connection = psycopg.connect(autocommit=True, prepare_threshold=1)

    def append(self, aggregate, sequence, text):
        self.connection.execute("SELECT * FROM lockstep.push_event('order', %s, 'paid', %s, %s)", [aggregate, text, sequence - 1])

    def append_hot(self, text):
        self.connection.execute("SELECT * FROM lockstep.push_event('order', 'hot', 'paid', %s)", [text])

    def append_batch(self, size, run, number, text):
        name = f"{run}-{number}"
        events = "[" + ",".join([event(name, text)] * size) + "]"
        self.connection.execute("SELECT * FROM lockstep.push_events(%s)", [events]).fetchall()

    def turn(self, consumer, size):
        name = f"consumer {consumer}"
        with self.connection.transaction():
            events = self.connection.execute(
                "SELECT position, aggregate_id, sequence, event_type, payload FROM lockstep.projection_claim(%s, max_events => %s, barrier => false)",
                [name, size],
            ).fetchall()
            for position, *_ in events:
                self.connection.execute("INSERT INTO bench.applied VALUES (%s, %s)", [consumer, position])
            if events:
                self.connection.execute("SELECT lockstep.projection_advance(%s)", [name])
        return len(events)
