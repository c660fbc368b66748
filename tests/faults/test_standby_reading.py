"""What a standby answers and what it refuses, function by function and view by view; conflicts with recovery; promotion."""

import importlib
from pathlib import Path

import pytest
from server import wait_until
from sessions import call, claim_and_advance, log, push, raises, start

RELATIONS = """
    SELECT c.relname FROM pg_class AS c
    JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    JOIN pg_extension AS e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'lockstep'
    WHERE c.relkind = ANY (%s) ORDER BY 1
"""

# What reads and locks nothing. Everything else is refused, so that what is new is, until somebody has thought about it.
ANSWERS = {
    "aggregate_events",
    "generation_current",
    "generation_replicated",
    "lease_locks",
    "projection_locks",
    "read_events",
    "schema_version",
    "workers",
    "workers_are_on",
    "writer_locks",
}


@pytest.fixture
def arguments(monkeypatch):
    """For each argument's name an expression that is valid: those of the tests of arguments."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("test_arguments")


def positions(session, **arguments):
    return [row[1] for row in call(session, "read_events", **arguments)]


def test_every_function_that_writes_or_locks_is_refused_and_names_the_primary(shared_pair, arguments):
    database, standby = shared_pair
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p'), lockstep.resource_create('r', ARRAY['a', 'c'])")
    session.execute("SELECT lockstep.generation_increment('r', ARRAY['a'])")
    session.execute("CREATE FUNCTION public.handle(event lockstep.events) RETURNS void LANGUAGE sql AS ''")
    push(session, "one")
    claim_and_advance(session)
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    functions = session.execute(arguments.FUNCTIONS).fetchall()
    assert len(functions) > 60
    answered, refused = set(), set()
    valid = arguments.VALID | {"token": "1"}  # CALL takes no subquery
    for name, types, names, _, kind in functions:
        if kind == "t":  # fired by a write, which PostgreSQL itself refuses
            continue
        values = ", ".join(f"{valid.get(n, 'NULL')}::{t}" for n, t in zip(names or [], types, strict=True))
        statement = f"CALL lockstep.{name}({values})" if kind == "p" else f"SELECT * FROM lockstep.{name}({values})"
        if name in ANSWERS:
            replica.execute(statement)
            answered.add(name)
            continue
        with raises("25006") as caught:
            replica.execute(statement)
        diagnostics = caught.value.diag
        assert diagnostics.message_primary == f"cannot execute {name}() during recovery"
        assert diagnostics.message_hint == "Connect to the primary server."
        refused.add(name)
    assert answered == ANSWERS
    assert {"push_event", "projection_claim", "lease_guard", "job_claim", "job_guard", "barrier"} <= refused
    locks = "SELECT count(*) FROM pg_locks WHERE pid = %s AND locktype = 'advisory'"
    assert replica.execute(locks, (replica.info.backend_pid,)).fetchone() == (0,)


def test_every_table_and_view_can_be_read(shared_pair):
    database, standby = shared_pair
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p'), lockstep.resource_create('r', ARRAY['a'])")
    session.execute("SELECT lockstep.lease_acquire('l', 'a', '1 hour')")
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'send')")
    first = push(session)
    claim_and_advance(session)
    second = push(session)
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    relations = [name for (name,) in session.execute(RELATIONS, (["r", "v", "S"],)).fetchall()]
    assert {"events", "ticket", "writers", "projection_status", "queue_status"} <= set(relations)
    for name in relations:
        replica.execute(f"SELECT * FROM lockstep.{name}")
    status = replica.execute("SELECT tenant, position, head, behind FROM lockstep.projection_status").fetchall()
    assert status == [("", first, second, 1)]
    assert replica.execute("SELECT * FROM lockstep.tenants").fetchall() == [("", second)]
    assert replica.execute("SELECT name, state FROM lockstep.lease_status").fetchall() == [("l", "held")]
    assert replica.execute("SELECT queue, ready FROM lockstep.queue_status").fetchall() == [("q", 1)]


def test_the_views_of_a_standby_show_what_is_stored_and_none_of_the_primarys_locks(shared_pair):
    database, standby = shared_pair
    holder, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    ((token,),) = session.execute("SELECT token FROM lockstep.lease_acquire('l', 'a', '1 hour')").fetchall()
    push(session)
    holder.execute("BEGIN")
    assert call(holder, "projection_claim", name="p")
    call(holder, "lease_guard", name="l", token=token)
    push(holder)
    database.cluster.wait_for_replay(standby)
    views = (
        "SELECT pid FROM lockstep.writers",
        "SELECT claim_pid FROM lockstep.projection_status WHERE state = 'running'",
        "SELECT guarding_pids[1] FROM lockstep.lease_status WHERE guarding_pids <> '{}'",
    )
    for view in views:
        assert session.execute(view).fetchall() == [(holder.info.backend_pid,)]
        assert standby.connect(database.name).execute(view).fetchall() == []


def test_a_pause_a_backoff_and_a_failed_event_are_seen_on_a_standby(shared_pair):
    database, standby = shared_pair
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p', retry_after => '5 minutes'), lockstep.projection_create('q')")
    position = push(session)
    with session.transaction():
        call(session, "projection_claim", name="p")
        call(session, "projection_fail", name="p", event_position=position, error="no")
    session.execute("SELECT lockstep.projection_pause('q')")
    database.cluster.wait_for_replay(standby)
    status = "SELECT projection, state, failures, last_error FROM lockstep.projection_status ORDER BY 1"
    shown = standby.connect(database.name).execute(status).fetchall()
    assert shown == session.execute(status).fetchall() == [("p", "backoff", 1, "no"), ("q", "paused", 0, None)]


@pytest.fixture
def impatient(shared_pair):
    """The pair, and no query on the standby may hold up its replay."""
    _, standby = shared_pair
    standby.conf(max_standby_streaming_delay=0)
    yield shared_pair
    standby.conf(max_standby_streaming_delay="30s", hot_standby_feedback="off")


def vacuum_cursors(session):
    """Leaves old versions of the cursor's row and removes them, which a standby must replay."""
    for _ in range(3):
        push(session)
        assert claim_and_advance(session)
    session.execute("VACUUM lockstep.projection_cursors")


def test_a_query_in_the_way_of_replay_is_cancelled_with_40001_and_can_be_repeated(impatient):
    database, standby = impatient
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    push(session)
    claim_and_advance(session)
    database.cluster.wait_for_replay(standby)
    replica, observer = standby.connect(database.name), standby.connect(database.name)
    # One statement, so one snapshot, that is still used when the rows that it shows are removed.
    reading = start(replica.execute, "SELECT e.position FROM lockstep.read_events() AS e, pg_sleep(600)")
    asleep = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
    wait_until(lambda: observer.execute(asleep, (replica.info.backend_pid,)).fetchone())
    vacuum_cursors(session)
    with raises("40001") as caught:
        reading.result(60)
    assert "conflict with recovery" in caught.value.diag.message_primary
    database.cluster.wait_for_replay(standby)
    assert positions(replica) == log(session)


def test_with_hot_standby_feedback_it_is_not_in_the_way(impatient):
    database, standby = impatient
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    push(session)
    claim_and_advance(session)
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    before = log(session)
    standby.conf(hot_standby_feedback="on", wal_receiver_status_interval="1s")
    with replica.transaction():
        replica.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert positions(replica) == before
        (snapshot,) = replica.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint").fetchone()
        told = "SELECT 1 FROM pg_stat_replication WHERE backend_xmin::text::bigint <= %s"
        wait_until(lambda: session.execute(told, (snapshot,)).fetchone())
        vacuum_cursors(session)
        database.cluster.wait_for_replay(standby)
        assert positions(replica) == before, "what the transaction's snapshot shows is still there"
    assert positions(replica) == log(session)


def test_a_session_of_a_standby_reads_and_writes_as_on_a_primary_after_the_promotion(pair):
    database, standby = pair
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    first = push(session)
    claim_and_advance(session)
    second = push(session)
    database.cluster.wait_for_replay(standby)
    replica, old = standby.connect(database.name), standby.connect(database.name)
    assert positions(replica) == [first]
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    assert positions(old) == [first]
    database.cluster.crash()
    standby.promote()
    # A transaction that began in recovery stays read-only, and its snapshot old.
    with raises("25000"):
        positions(old)
    old.execute("ROLLBACK")
    old.execute("BEGIN")
    third = push(old)
    assert positions(replica, barrier=False) == [first, second]
    old.execute("COMMIT")
    assert positions(replica) == [first, second, third]
    assert claim_and_advance(replica) == [second, third]
