"""What lockstep is measured against, one file each. A peer has a database of its own, its own schema and its own way of use.

A file in SQL and Python defines PEER, a `Log`: its schema, its statement to append an event, how a consumer takes its turn. Whatever
its way, a consumer writes what it was passed to bench.applied in the transaction that moves its cursor, if the peer has one: that is the
read model, with an amount from the payload, and what the oracle compares with the log in the end.
"""

import json
from dataclasses import dataclass, field

CONSUMERS = 64

# The read model, the same for all.
APPLIED = """
CREATE SCHEMA IF NOT EXISTS bench;
CREATE TABLE bench.applied (consumer int NOT NULL, position numeric NOT NULL, amount bigint);
"""

# A handler of one event, for a consumer that is written by hand.
HANDLER = """
CREATE FUNCTION bench.handle(of_consumer int, at_position numeric, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO bench.applied VALUES (of_consumer, at_position, (payload ->> 'amount')::bigint);
END
$$;
"""

# A consumer by hand: it reads what follows its cursor, by {events}, a query of positions and payloads with `seen`, `batch` and what {begin}
# does first (it may set `settled`), and moves the cursor in the same transaction.
CONSUMER = (
    HANDLER
    + """
CREATE TABLE bench.cursors (consumer int PRIMARY KEY, position numeric NOT NULL) WITH (fillfactor = 50);
CREATE FUNCTION bench.turn(of_consumer int, batch int, each boolean DEFAULT false) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    seen {type};
    settled {type};
    event record;
    applied bigint := 0;
BEGIN
    SELECT c.position INTO seen FROM bench.cursors AS c WHERE c.consumer = of_consumer FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    {begin}
    IF each THEN
        FOR event IN {events} LOOP
            PERFORM bench.handle(of_consumer, event.position, event.payload);
            seen := event.position;
            applied := applied + 1;
        END LOOP;
    ELSE
        WITH new AS (
            INSERT INTO bench.applied SELECT of_consumer, e.position, (e.payload ->> 'amount')::bigint FROM ({events}) AS e
            RETURNING position
        )
        SELECT count(*), coalesce(max(position), seen) INTO applied, seen FROM new;
    END IF;
    IF applied > 0 THEN
        UPDATE bench.cursors AS c SET position = seen WHERE c.consumer = of_consumer;
    END IF;
    RETURN applied;
END
$$;
"""
)
REWIND = "TRUNCATE bench.applied, bench.cursors; INSERT INTO bench.cursors SELECT n, 0 FROM generate_series(1, 64) AS n"


def consumer(events, begin="", type="numeric"):
    """SQL that makes CONSUMER; positions are of `type`."""
    return CONSUMER.format(events=events, begin=begin, type=type)


@dataclass(frozen=True)
class Log:
    name: str
    schema: str  # SQL; it has bench.turn(consumer int, batch int, each boolean): applies a batch, returns how many events
    append: str  # pgbench: one event to :aggregate with :payload, which is its :sequence-th
    before: str = field(default="", kw_only=True)  # pgbench: what a writer's transaction does first
    committed: str  # SQL: the positions of the committed events
    reset: str  # SQL: an empty log, {consumers} consumers at its beginning
    hot: str = ""  # pgbench: one event to the aggregate 'hot', whatever its sequence
    batch: object = None  # function: a statement of pgbench for a list of aggregates
    fill: tuple = ()  # SQL with {events}: statements that make a log of so many events, 10 of each aggregate
    rewind: str = ""  # SQL: consumers at the beginning of the log as it is
    turn: str = "SELECT bench.turn(:client_id + 1, {batch}, {each});"
    settle: str = ""  # SQL: what makes the last events known to consumers, where the peer has such a thing
    options: str = ""  # for the server, in PGOPTIONS
    own_schema: bool = False  # the client library makes its schema itself


def payload(size):
    """JSON of so many bytes: an order, padded by a text that does not compress away as one letter would."""
    order = {"amount": 1250, "currency": "EUR", "customer": "c-7391", "text": ""}
    text = "".join(f"{n * 2654435761 % 4294967296:08x}" for n in range(size // 8 + 1))
    return json.dumps(order | {"text": text[: size - len(json.dumps(order))]})


def literal(text):
    return "'" + text.replace("'", "''") + "'"
