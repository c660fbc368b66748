"""The limit, and the control: bare INSERTs into a table with the columns and the three unique indexes of lockstep's log, the position from a
sequence. Its consumer is the loop that one writes first, `WHERE position > last seen`, with the cursor moved in the same transaction. It
protects nothing: a position that is committed after a higher one was read is passed over for good. In batches: a multi-row INSERT, and
COPY (by driver.py), which is faster than any statement can be.

Manual: https://www.postgresql.org/docs/18/sql-insert.html, https://www.postgresql.org/docs/18/sql-copy.html
"""

from . import APPLIED, REWIND, Log, consumer, literal, payload

TABLE = """
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
CREATE UNIQUE INDEX ON bench.events (tenant, event_id) WHERE event_id IS NOT NULL;
CREATE TABLE bench.heads (aggregate_id text PRIMARY KEY, sequence bigint NOT NULL) WITH (fillfactor = 50);
"""

# {settled}: what a reader with a protection adds to the condition.
NEXT_EVENTS = """SELECT e.position, e.payload FROM bench.events AS e
        WHERE e.tenant = '' AND e.position > seen {settled} ORDER BY e.position LIMIT batch"""

INSERT = """INSERT INTO bench.events
    (tenant, position, aggregate_type, aggregate_id, sequence, event_type, event_id, payload, metadata, created_at)
VALUES """
ROW = "('', nextval('bench.position'), 'order', {aggregate}, {sequence}, 'paid', NULL, {payload}, NULL, clock_timestamp())"

# By hand, the aggregate's row is what makes writers of one aggregate wait for each other.
NEXT = """INSERT INTO bench.heads AS h VALUES ('hot', 1)
ON CONFLICT (aggregate_id) DO UPDATE SET sequence = h.sequence + 1 RETURNING sequence"""
HOT = f"""BEGIN;
{NEXT} \\gset
{INSERT}{ROW.format(aggregate="'hot'", sequence=":sequence", payload=":payload")};
COMMIT;
"""

FILL = (
    """INSERT INTO bench.events
SELECT '', nextval('bench.position'), 'order', (n / 10)::text, n % 10 + 1, 'paid', NULL,
       jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), NULL, now()
FROM generate_series(0, {events} - 1) AS n""",
)


def batch(aggregates):
    """A multi-row INSERT, all values literals in its text."""
    share = len(aggregates) // len(set(aggregates))
    rows = (
        ROW.format(aggregate=literal(name), sequence=f":sequence + {index // (len(aggregates) // share)}", payload=literal(payload(150)))
        for index, name in enumerate(aggregates)
    )
    return INSERT + ",\n".join(rows) + ";\n"


PEER = Log(
    name="insert",
    schema=APPLIED + TABLE + consumer(NEXT_EVENTS.format(settled="")),
    append=INSERT + ROW.format(aggregate=":aggregate", sequence=":sequence", payload=":payload") + ";\n",
    hot=HOT,
    batch=batch,
    committed="SELECT position FROM bench.events",
    reset=f"TRUNCATE bench.events, bench.heads; {REWIND}",
    rewind=REWIND,
    fill=FILL,
)


class Client:
    """The same through psycopg, for driver.py."""

    def __init__(self):
        import psycopg

        self.connection = psycopg.connect(autocommit=True, prepare_threshold=1)

    def append(self, aggregate, sequence, text):
        self.connection.execute(INSERT + ROW.format(aggregate="%s", sequence="%s", payload="%s"), [aggregate, sequence, text])

    def append_hot(self, text):
        """By hand, the aggregate's row is what makes writers of one aggregate wait for each other."""
        with self.connection.transaction():
            (sequence,) = self.connection.execute(NEXT).fetchone()
            self.append("hot", sequence, text)

    def turn(self, consumer, size):
        """Reads into the client and applies each event from there, in one transaction with the cursor."""
        with self.connection.transaction():
            (seen,) = self.connection.execute("SELECT position FROM bench.cursors WHERE consumer = %s FOR UPDATE", [consumer]).fetchone()
            events = self.connection.execute(
                "SELECT position, aggregate_id, sequence, event_type, payload FROM bench.events"
                " WHERE tenant = '' AND position > %s ORDER BY position LIMIT %s",
                [seen, size],
            ).fetchall()
            for event in events:
                self.connection.execute("INSERT INTO bench.applied VALUES (%s, %s)", [consumer, event[0]])
            if events:
                self.connection.execute("UPDATE bench.cursors SET position = %s WHERE consumer = %s", [events[-1][0], consumer])
        return len(events)

    def append_batch(self, size, run, number, text):
        """A multi-row INSERT; copy_in.py has COPY in its place."""
        values = [(f"{run}-{number}", sequence, text) for sequence in range(1, size + 1)]
        rows = ", ".join(ROW.format(aggregate="%s", sequence="%s", payload="%s") for _ in values)
        self.connection.execute(INSERT + rows, [value for row in values for value in row])
