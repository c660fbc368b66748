"""Reading one's own write: projection_wait, as sessions see each other."""

import pytest
from psycopg import sql
from server import wait_until
from sessions import call, claim, claim_and_advance, push, raises, start


@pytest.fixture
def session(db):
    connection = db.connect(options="-c statement_timeout=60s")
    connection.execute("SELECT lockstep.projection_create('p')")
    return connection


def wait(connection, up_to, timeout="30 seconds", name="p", **arguments):
    return call(connection, "projection_wait", name=name, up_to=up_to, timeout=timeout, **arguments)[0][0]


def wait_until_it_waits(observer, connection):
    """Until the session is inside projection_wait and asleep."""
    # Before PostgreSQL 17 an extension's waits have no name of their own.
    query = "SELECT wait_event IN ('LockstepWait', 'Extension') FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    pid = connection.info.backend_pid
    wait_until(lambda: (observer.execute(query, (pid,)).fetchone() or [False])[0])


def test_it_is_true_once_another_session_has_committed_the_advance_and_not_before(db, session):
    worker, observer = db.connect(), db.connect()
    position = push(observer)
    waiting = start(wait, session, position)
    wait_until_it_waits(observer, session)
    with worker.transaction():
        assert claim(worker) == [position]
        call(worker, "projection_advance", name="p")
        assert wait(observer, position, "20 milliseconds") is False, "an advance that is not committed does not count"
        assert not waiting.done()
    assert waiting.result(30) is True
    assert wait(observer, position, "1 millisecond") is True


def test_it_is_false_at_the_timeout_and_for_a_position_that_is_not_reached(db, session):
    worker = db.connect()
    first, second = push(worker), push(worker)
    assert wait(session, first, "20 milliseconds") is False
    claim_and_advance(worker, max_events=1)
    assert wait(session, first, "20 milliseconds") is True
    assert wait(session, second, "20 milliseconds") is False
    assert wait(session, first, "20 milliseconds", tenant="other") is False, "each tenant has its own cursor"


def test_it_sees_an_event_that_the_worker_skipped_or_filtered_out_as_passed(db, session):
    worker = db.connect()
    call(session, "projection_create", name="f", event_types=["wanted"], max_failures=1)
    other, wanted = push(worker), push(worker, event_type="wanted")
    assert wait(session, other, "10 milliseconds", name="f") is False
    with worker.transaction():
        assert claim(worker, "f") == [wanted]
        assert call(worker, "projection_fail", name="f", event_position=wanted, error="no") == [("skip",)]
    assert wait(session, other, "10 milliseconds", name="f") is True
    assert wait(session, wanted, "10 milliseconds", name="f") is True


@pytest.mark.parametrize("how", ["cancel", "statement_timeout"])
def test_cancel_and_statement_timeout_end_it(db, session, how):
    observer = db.connect()
    position = push(observer)
    if how == "statement_timeout":
        session.execute("SET statement_timeout = '50ms'")
    waiting = start(wait, session, position, "1 hour")
    if how == "cancel":
        wait_until_it_waits(observer, session)
        observer.execute("SELECT pg_cancel_backend(%s)", (session.info.backend_pid,))
    with raises("57014"):
        waiting.result(30)
    session.execute("RESET statement_timeout")
    claim_and_advance(observer)
    assert wait(session, position) is True, "the session is as good as before"


def test_a_projection_that_is_unknown_or_dropped_meanwhile_is_42704(db, session):
    owner = db.connect()
    with raises("42704"):
        wait(session, 1, name="unknown")
    waiting = start(wait, session, 1)
    wait_until_it_waits(owner, session)
    owner.execute("SELECT lockstep.projection_drop('p')")
    with raises("42704"):
        waiting.result(30)


def test_it_is_refused_after_a_push_in_the_same_transaction(session):
    with raises("25000") as caught, session.transaction():
        position = push(session)
        wait(session, position)
    assert caught.value.diag.message_hint
    with session.transaction():
        with session.transaction(force_rollback=True):
            push(session)
        assert wait(session, 1, "1 millisecond") is False, "a push that was rolled back is none"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_it_is_refused_under_a_transaction_snapshot(session, level):
    with raises("25000"), session.transaction():
        session.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL " + level))
        wait(session, 1)


def test_push_wait_query_reads_ones_own_write(db, session):
    worker = db.connect()
    session.execute(
        """
        CREATE TABLE public.seen (position numeric);
        CREATE FUNCTION public.see(e lockstep.events) RETURNS void LANGUAGE sql AS
            'INSERT INTO public.seen VALUES (e.position)';
        SELECT lockstep.projection_create('s', handler => 'public.see(lockstep.events)');
        """
    )
    for _ in range(20):
        position = push(session)
        running = start(call, worker, "projection_run", name="s")
        assert wait(session, position, name="s") is True
        assert session.execute("SELECT max(position) FROM public.seen").fetchone() == (position,)
        assert running.result(30)[0][:2] == ("ok", 1)
