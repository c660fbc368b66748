"""The queued advisory-lock barrier: writers hold a lock shared until their transaction ends; a reader asks for it exclusively, and what the
sequence had given out by then is settled. Correct, and known: Zitadel's projections and dcb-event-store do so. The request stands in the
lock's queue, so that one slow writer and one waiting reader hold up all writers.

Recipe: https://github.com/zitadel/zitadel/issues/8509; https://www.postgresql.org/docs/18/explicit-locking.html#ADVISORY-LOCKS
"""

from dataclasses import replace

from . import APPLIED, consumer, insert

BEGIN = """PERFORM pg_advisory_lock(2);
    settled := (SELECT last_value FROM bench.position);
    PERFORM pg_advisory_unlock(2);"""

PEER = replace(
    insert.PEER,
    name="queued barrier",
    schema=APPLIED + insert.TABLE + consumer(insert.NEXT_EVENTS.format(settled="AND e.position <= settled"), BEGIN),
    before="SELECT pg_advisory_xact_lock_shared(2);\n",
)
