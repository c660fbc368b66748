"""The systems of the cells, each a peer on one of the servers."""

from logs import ClientLog, Log
from peers import APPLIED, copy_in, eventsourcing_python, insert, lockstep, message_db, pgq, queued_barrier, snapshot_xmin
from peers import Log as Peer

EMMETT_PEER = Peer(
    name="Emmett",
    schema=APPLIED,
    own_schema=True,
    append="",
    committed="SELECT global_position FROM emt_messages",
    reset="TRUNCATE emt_streams, emt_messages, emt_processors, bench.applied",
    rewind="TRUNCATE emt_processors, bench.applied",
    fill=(
        """INSERT INTO emt_messages (stream_id, stream_position, partition, message_data, message_metadata, message_schema_version,
    message_type, message_kind, message_id, transaction_id)
SELECT 'order-' || n / 10, n % 10 + 1, 'emt:default', jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), '{{}}', '1',
       'paid', 'E', gen_random_uuid()::text, pg_current_xact_id()
FROM generate_series(0, {events} - 1) AS n""",
    ),
)

INSERT, LOCKSTEP = Log(insert.PEER), Log(lockstep.PEER)
MESSAGE_DB = Log(message_db.PEER)
QUEUED_BARRIER, SNAPSHOT_XMIN = Log(queued_barrier.PEER), Log(snapshot_xmin.PEER)
OLD_INSERT, OLD_LOCKSTEP, PGQ = Log(insert.PEER, "old"), Log(lockstep.PEER, "old"), Log(pgq.PEER, "old")

NODE_INSERT, NODE_LOCKSTEP = ClientLog(insert.PEER, "node", "insert"), ClientLog(lockstep.PEER, "node", "lockstep")
EMMETT = ClientLog(EMMETT_PEER, "node", "emmett")
PYTHON_INSERT, PYTHON_LOCKSTEP = ClientLog(insert.PEER, "python", "insert"), ClientLog(lockstep.PEER, "python", "lockstep")
EVENTSOURCING = ClientLog(eventsourcing_python.PEER, "python", "eventsourcing_python")
COPY = ClientLog(copy_in.PEER, "python", "copy_in", suffix="_copy")

# Those that share a driver, the control first.
FAMILIES = {
    "SQL": (INSERT, LOCKSTEP, MESSAGE_DB),
    "Node": (NODE_INSERT, NODE_LOCKSTEP, EMMETT),
    "Python": (PYTHON_INSERT, PYTHON_LOCKSTEP, EVENTSOURCING),
    "PostgreSQL 15": (OLD_INSERT, OLD_LOCKSTEP, PGQ),
}
