"""Who waits for whom: a barrier waits for writers, nobody waits for a barrier. Orders of events, never times."""

import pytest
from server import wait_for_lock_wait
from sessions import advance, call, claim, claim_and_advance, drain, locks, push, raises, start

# What is not delayed has to come back long before this; what is delayed fails with it instead of hanging.
PATIENCE = "-c statement_timeout=20s"


@pytest.fixture
def waiting_claim(db):
    """An open writer, and a claim that waits for it: (writer, its position, the claim's Future)."""
    writer, reader, observer = db.connect(), db.connect(), db.connect()
    observer.execute("SELECT lockstep.projection_create('p')")
    writer.execute("BEGIN")
    position = push(writer)
    reader.execute("BEGIN")
    waiting = start(claim, reader)
    wait_for_lock_wait(observer, reader.info.backend_pid)
    return writer, position, waiting


def test_while_a_claim_waits_for_an_open_writer_other_writers_of_the_tenant_finish(db, waiting_claim):
    writer, first, waiting = waiting_claim
    others = [db.connect(options=PATIENCE) for _ in range(4)]
    later = [push(other) for other in others for _ in range(5)]
    assert not waiting.done()
    writer.execute("COMMIT")
    seen = waiting.result(30)
    assert seen[0] == first
    assert seen[1:] == [], "the claim's cut was before the later pushes"
    assert min(later) > first


def test_while_a_claim_waits_another_tenant_pushes_and_claims(db, waiting_claim):
    writer, first, waiting = waiting_claim
    other = db.connect(options=PATIENCE)
    positions = [push(other, tenant="other") for _ in range(3)]
    assert claim_and_advance(other, tenant="other", barrier=True, wait=True) == positions
    assert call(other, "barrier", tenant="other") == [(positions[-1],)]
    assert not waiting.done()
    writer.execute("COMMIT")
    assert waiting.result(30) == [first]


def test_while_a_claim_waits_a_horizon_claim_of_another_projection_gets_what_is_settled(db):
    writer, reader, other, observer = db.connect(), db.connect(), db.connect(options=PATIENCE), db.connect()
    observer.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    before = [push(observer) for _ in range(2)]
    writer.execute("BEGIN")
    open_position = push(writer)
    after = push(observer)
    waiting = start(claim_and_advance, reader)
    wait_for_lock_wait(observer, reader.info.backend_pid)
    assert claim_and_advance(other, "q", barrier=False) == before
    assert claim_and_advance(other, "q", barrier=False) == []
    assert call(other, "horizon") == [(before[-1],)]
    assert not waiting.done()
    writer.execute("COMMIT")
    assert waiting.result(30) == [*before, open_position, after]
    assert claim_and_advance(other, "q", barrier=False) == [open_position, after]


def test_a_busy_projection_gives_no_rows_at_once_or_waits_when_asked(db):
    holder, other, observer = db.connect(), db.connect(options=PATIENCE), db.connect()
    observer.execute("SELECT lockstep.projection_create('p')")
    first, second = push(observer), push(observer)
    holder.execute("BEGIN")
    assert claim(holder, max_events=1) == [first]
    advance(holder)
    with other.transaction():
        assert claim(other) == []
        assert call(other, "projection_claim_state", name="p") == [("busy", False)]
        with raises("LS002"), other.transaction():
            advance(other)
    waiting = start(claim_and_advance, other, wait=True)
    assert wait_for_lock_wait(observer, other.info.backend_pid) == "advisory"
    holder.execute("COMMIT")
    assert waiting.result(30) == [second], "the cursor is read after the wait"


def test_long_transactions_elsewhere_and_idle_readers_delay_nobody(db, server, new_database):
    observer, worker = db.connect(), db.connect(options=PATIENCE)
    observer.execute("SELECT lockstep.projection_create('p')")
    other_database = new_database(server, db.name + "_other")
    try:
        elsewhere = other_database.connect()
        elsewhere.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        push(elsewhere, "one")
        idle_reader = db.connect()
        idle_reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        idle_reader.execute("SELECT count(*) FROM lockstep.events")
        idle_writer = db.connect()
        idle_writer.execute("BEGIN")
        idle_writer.execute("CREATE TABLE unrelated AS SELECT 1")
        other_tenant = db.connect()
        other_tenant.execute("BEGIN")
        push(other_tenant, tenant="other")

        position = push(worker, "one")
        assert call(worker, "horizon") == [(position,)]
        assert call(worker, "barrier") == [(position,)]
        assert claim_and_advance(worker) == [position]
        next_position = push(worker, "one")
        assert claim_and_advance(worker, barrier=False) == [next_position]
    finally:
        other_database.drop()


def test_advisory_locks_of_an_application_neither_disturb_nor_are_disturbed(db):
    writer, worker, application, other = (db.connect(options=PATIENCE) for _ in range(4))
    application.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    writer.execute("BEGIN")
    open_position = push(writer, "one")
    worker.execute("BEGIN")
    claim(worker, barrier=False)
    keys = application.execute(
        "SELECT DISTINCT classid::bigint, objid::bigint FROM pg_locks WHERE locktype = 'advisory'"
    ).fetchall()
    assert len(keys) >= 5  # WRITER, WRITER_START, AGGREGATE, PROJECTION, PROJECTION_ALL
    # The application takes both its kinds of lock on every key that the extension uses.
    for high, low in keys:
        for query in (
            "SELECT pg_try_advisory_lock((%(high)s::bigint << 32) | %(low)s::bigint)",
            "SELECT pg_try_advisory_lock((%(high)s::bigint)::bit(32)::int, (%(low)s::bigint)::bit(32)::int)",
        ):
            assert application.execute(query, {"high": high, "low": low}).fetchone() == (True,)
    writer.execute("COMMIT")
    worker.execute("COMMIT")
    position = push(other, "one")
    assert claim_and_advance(other, wait=True) == [open_position, position]
    assert claim_and_advance(worker, "q", barrier=False) == [open_position, position]
    assert push(writer, "one") > position


BARRIERS = {
    "barrier": "SELECT lockstep.barrier()",
    "read_events": "SELECT * FROM lockstep.read_events()",
    "projection_claim": "SELECT * FROM lockstep.projection_claim('p')",
}


@pytest.fixture
def open_writer(db):
    """A session with a push that is not committed, and the projection `p`."""
    writer = db.connect()
    writer.execute("SELECT lockstep.projection_create('p')")
    writer.execute("BEGIN")
    push(writer)
    return writer


@pytest.mark.parametrize("query", BARRIERS.values(), ids=BARRIERS)
@pytest.mark.parametrize("setting, sqlstate", [("lock_timeout", "55P03"), ("statement_timeout", "57014")])
def test_a_timeout_ends_a_waiting_barrier_and_leaves_no_lock(db, open_writer, query, setting, sqlstate):
    session, observer = db.connect(), db.connect()
    session.execute(f"SET {setting} = '50ms'")
    with raises(sqlstate):
        session.execute(query)
    assert locks(observer, session) == 0
    session.execute("RESET ALL")
    with observer.transaction():
        assert claim(observer, barrier=False) == []
        assert call(observer, "projection_claim_state", name="p") == [("none", False)]


@pytest.mark.parametrize("query", BARRIERS.values(), ids=BARRIERS)
def test_a_cancel_ends_a_waiting_barrier_and_leaves_no_lock(db, open_writer, query):
    session, observer = db.connect(), db.connect()
    waiting = start(session.execute, query)
    assert wait_for_lock_wait(observer, session.info.backend_pid) == "virtualxid"
    session.cancel()
    with raises("57014"):
        waiting.result(30)
    assert locks(observer, session) == 0


def test_a_claim_that_timed_out_in_a_savepoint_is_free_for_others_while_its_transaction_goes_on(db, open_writer):
    session, other = db.connect(), db.connect()
    session.execute("BEGIN")
    session.execute("SET LOCAL lock_timeout = '50ms'")
    with raises("55P03"), session.transaction():
        claim(session)
    with other.transaction():
        assert claim(other, barrier=False) == []
        assert call(other, "projection_claim_state", name="p") == [("none", False)]
    with raises("LS002"), session.transaction():
        advance(session)
    open_writer.execute("COMMIT")
    assert len(claim(session)) == 1


def test_lock_timeout_ends_the_wait_for_a_busy_projection(db, open_writer):
    holder, session, observer = db.connect(), db.connect(), db.connect()
    holder.execute("BEGIN")
    claim(holder, barrier=False)
    session.execute("SET lock_timeout = '50ms'")
    with raises("55P03"):
        claim(session, wait=True)
    assert locks(observer, session) == 0


def test_two_transactions_that_push_and_then_claim_neither_deadlock_nor_miss_an_event(db):
    one, other, observer = db.connect(options=PATIENCE), db.connect(options=PATIENCE), db.connect()
    observer.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    one.execute("BEGIN")
    other.execute("BEGIN")
    first, second = push(one), push(other)
    seen = {"p": claim(one, "p"), "q": claim(other, "q")}
    for session, name in ((one, "p"), (other, "q")):
        if seen[name]:
            advance(session, name)
    # Its own push is settled only as far as no other writer may still commit below it.
    assert seen == {"p": [first], "q": []}
    one.execute("COMMIT")
    other.execute("COMMIT")
    for name in "pq":
        assert seen[name] + drain(observer, name) == [first, second]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT lockstep.barrier()",
        "SELECT * FROM lockstep.projection_claim('p', wait => true)",
        "SELECT lockstep.projection_drop('p')",
        "SELECT lockstep.projection_alter('p', batch_size => 7)",
    ],
)
def test_what_would_wait_is_refused_in_a_transaction_that_has_pushed(db, query):
    session = db.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    with raises("25000") as caught, session.transaction():
        push(session)
        session.execute(query)
    assert caught.value.diag.message_hint
    # A push that was rolled back does not count.
    with session.transaction():
        session.execute("SAVEPOINT before")
        push(session)
        session.execute("ROLLBACK TO before")
        session.execute(query)
