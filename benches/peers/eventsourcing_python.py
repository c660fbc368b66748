"""eventsourcing 9.5.6 (PyPI) with its module eventsourcing.postgres, below the aggregates: its recorders, which are what touches PostgreSQL, so
that no Python object is made for the sake of the measurement. Appends by PostgresApplicationRecorder.insert_events (the unique originator_version
is the version's check; the table is locked, so that notification ids are committed in their order). A consumer reads select_notifications
and applies each in one transaction with its tracking record, as a PostgresTrackingRecorder of a materialised view does.

Docs: https://eventsourcing.readthedocs.io/en/stable/topics/persistence.html#postgresql,
https://eventsourcing.readthedocs.io/en/stable/topics/projection.html
"""

import os

from . import APPLIED, Log

PEER = Log(
    name="eventsourcing",
    schema=APPLIED,
    own_schema=True,
    append="",
    committed="SELECT notification_id FROM public.log_events",
    reset="TRUNCATE public.log_events, bench.applied; DELETE FROM public.view_tracking",
    fill=(
        """INSERT INTO public.log_events (originator_id, originator_version, topic, state)
SELECT (n / 10)::text, n % 10 + 1, 'paid', convert_to(jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000)::text, 'UTF8')
FROM generate_series(0, {events} - 1) AS n""",
    ),
    rewind="TRUNCATE bench.applied; DELETE FROM public.view_tracking",
)


class Client:
    def __init__(self):
        from eventsourcing.persistence import IntegrityError, StoredEvent, Tracking
        from eventsourcing.postgres import PostgresApplicationRecorder, PostgresDatastore, PostgresTrackingRecorder

        self.Conflict, self.StoredEvent, self.Tracking = IntegrityError, StoredEvent, Tracking
        datastore = PostgresDatastore(
            dbname=os.environ["PGDATABASE"], host=os.environ["PGHOST"], port=os.environ["PGPORT"], user="postgres", password="",
            originator_id_type="text", single_row_tracking=True,
        )  # fmt: skip

        class View(PostgresTrackingRecorder):
            """The read model: what an event means to it, and the tracking record, in one transaction."""

            def apply(self, consumer, tracking):
                with self.datastore.transaction(commit=True) as cursor:
                    cursor.execute("INSERT INTO bench.applied VALUES (%s, %s)", (consumer, tracking.notification_id), prepare=True)
                    self._insert_tracking(cursor, tracking)

        self.events = PostgresApplicationRecorder(datastore, events_table_name="log_events")
        self.view = View(datastore, tracking_table_name="view_tracking")

    def create(self):
        self.events.create_table()
        self.view.create_table()

    def append(self, aggregate, sequence, text):
        self.events.insert_events([self.StoredEvent(aggregate, sequence, "paid", text.encode())])

    def append_hot(self, text):
        """Reads the last version, appends the next; again if another was faster. Returns how often."""
        failed = 0
        while True:
            last = self.events.select_events("hot", desc=True, limit=1)
            try:
                self.append("hot", last[0].originator_version + 1 if last else 1, text)
                return failed
            except self.Conflict:
                failed += 1

    def append_batch(self, size, run, number, text):
        events = [self.StoredEvent(f"{run}-{number}", sequence, "paid", text.encode()) for sequence in range(1, size + 1)]
        self.events.insert_events(events)

    def turn(self, consumer, size):
        application = f"log {consumer}"
        last = self.view.max_tracking_id(application)
        events = self.events.select_notifications(last, size, inclusive_of_start=False)
        for event in events:
            self.view.apply(consumer, self.Tracking(application, event.id))
        return len(events)
