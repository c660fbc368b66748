"""COPY, the fastest way into a table, as the limit of batches: PostgreSQL's own protocol through psycopg, into the control's table. It takes
its positions in one statement before, gives nothing back, and checks no version but by the unique index.

Manual: https://www.postgresql.org/docs/18/sql-copy.html, https://www.psycopg.org/psycopg3/docs/basic/copy.html
"""

from datetime import UTC, datetime

from . import insert

PEER = insert.PEER
COLUMNS = "tenant, position, aggregate_type, aggregate_id, sequence, event_type, payload, created_at"


class Client(insert.Client):
    def append_batch(self, size, run, number, text):
        positions = self.connection.execute("SELECT nextval('bench.position') FROM generate_series(1, %s)", [size]).fetchall()
        now = datetime.now(UTC)
        with self.connection.cursor().copy(f"COPY bench.events ({COLUMNS}) FROM STDIN") as copy:
            for sequence, (position,) in enumerate(positions, 1):
                copy.write_row(("", position, "order", f"{run}-{number}", sequence, "paid", text, now))
