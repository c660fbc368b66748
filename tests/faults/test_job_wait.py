"""CALL job_wait: woken in time, without a transaction, and only by what a claim would get."""

import time

import pytest
from server import wait_until
from sessions import raises, start


def wait(connection, timeout="30 seconds", queue="q", tenant=""):
    row = connection.execute("CALL lockstep.job_wait(%s, %s, tenant => %s)", (queue, timeout, tenant)).fetchone()
    return row[0]


def sleeps(observer, connection):
    """Until the session is asleep inside job_wait."""
    query = "SELECT wait_event IN ('Extension', 'LockstepWait') FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    pid = connection.info.backend_pid
    wait_until(lambda: (observer.execute(query, (pid,)).fetchone() or [False])[0])


@pytest.fixture(params=["polled", "woken"])
def database(request, db, cluster, new_database):
    """With and without the library preloaded; where it is, a poll would come too late."""
    if request.param == "polled":
        return db
    return new_database(cluster(shared_preload_libraries="lockstep", **{"lockstep.poll_interval": "10s"}), "waits")


def elapsed(future):
    begun = time.monotonic()
    assert future.result(60) is True
    return time.monotonic() - begun


@pytest.mark.parametrize("tenant", ["", None])
def test_it_ends_when_a_job_is_enqueued_and_not_before_the_commit(database, tenant):
    waiter, session = database.connect(), database.connect()
    waiting = start(wait, waiter, tenant=tenant)
    sleeps(session, waiter)
    with session.transaction():
        session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a')")
        assert not waiting.done()
    assert elapsed(waiting) < 5
    assert wait(waiter, "1 millisecond", tenant=tenant) is True, "and it took nothing"


@pytest.mark.parametrize("end", ["job_complete(job_id, token)", "job_fail(job_id, token, 'no')", "job_cancel(job_id)"])
def test_it_ends_when_its_key_is_free_again(database, end):
    waiter, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a'), lockstep.job_enqueue('q', 'k', 'b')")
    session.execute("SELECT lockstep.job_claim('q', 'w')")
    waiting = start(wait, waiter)
    sleeps(session, waiter)
    session.execute(f"SELECT lockstep.{end} FROM lockstep.jobs WHERE state = 'in_progress'")
    assert elapsed(waiting) < 5


def test_it_ends_when_a_limit_or_a_pause_ends(database):
    waiter, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a'), lockstep.queue_pause('q')")
    waiting = start(wait, waiter)
    sleeps(session, waiter)
    session.execute("SELECT lockstep.queue_resume('q')")
    assert elapsed(waiting) < 5


@pytest.mark.parametrize("what", ["delayed", "expiring"])
def test_it_sleeps_no_longer_than_until_time_brings_a_job(database, what):
    waiter, session = database.connect(), database.connect()
    if what == "delayed":
        session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a', delay => '1 second')")
    else:
        session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a')")
        session.execute("SELECT lockstep.job_claim('q', 'w', ttl => '1 second')")
    begun = time.monotonic()
    assert wait(waiter) is True
    assert 0.5 < time.monotonic() - begun < 5


def test_it_is_false_at_the_timeout_and_holds_no_snapshot_while_it_waits(database):
    waiter, session = database.connect(), database.connect()
    assert wait(waiter, "20 milliseconds") is False
    waiting = start(wait, waiter, "2 seconds")
    sleeps(session, waiter)
    row = session.execute(
        "SELECT backend_xmin, backend_xid FROM pg_stat_activity WHERE pid = %s", (waiter.info.backend_pid,)
    ).fetchone()
    assert row == (None, None)
    assert waiting.result(30) is False


def test_it_does_not_call_a_worker_for_what_another_is_just_claiming(database):
    waiter, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a'), lockstep.job_enqueue('q', NULL, 'b')")
    with session.transaction(force_rollback=True):
        assert len(session.execute("SELECT FROM lockstep.job_claim('q', 'w', 2)").fetchall()) == 2
        assert wait(waiter, "50 milliseconds") is False
        waiting = start(wait, waiter)
        sleeps(database.connect(), waiter)
    assert elapsed(waiting) < 5, "a claim that is rolled back wakes"


def test_a_claim_that_is_rolled_back_to_a_savepoint_wakes(database):
    waiter, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a')")
    with session.transaction():
        with session.transaction(force_rollback=True):
            assert len(session.execute("SELECT FROM lockstep.job_claim('q', 'w')").fetchall()) == 1
            waiting = start(wait, waiter)
            sleeps(database.connect(), waiter)
        assert elapsed(waiting) < 5


@pytest.mark.parametrize("what", ["delayed", "expiring"])
def test_for_any_tenant_it_sleeps_no_longer_than_until_time_brings_a_job(database, what):
    waiter, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a', delay => '1 hour')")
    if what == "delayed":
        session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a', delay => '1 second', tenant => 't')")
    else:
        session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a', tenant => 't')")
        session.execute("SELECT lockstep.job_claim('q', 'w', ttl => '1 second', tenant => 't')")
    begun = time.monotonic()
    assert wait(waiter, tenant=None) is True
    assert 0.5 < time.monotonic() - begun < 5


def test_what_has_no_attempts_left_is_buried_and_does_not_end_it(database):
    waiter, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a', max_attempts => 1)")
    session.execute("SELECT lockstep.job_claim('q', 'w', ttl => '1 microsecond')")
    assert wait(waiter, "50 milliseconds") is False
    assert session.execute("SELECT count(*) FROM lockstep.dead_jobs").fetchone() == (1,)


def test_another_queue_or_tenant_does_not_end_it(db):
    waiter, session = db.connect(), db.connect()
    session.execute("SELECT lockstep.job_enqueue('r', 'k', 'a'), lockstep.job_enqueue('q', 'k', 'a', tenant => 't')")
    assert wait(waiter, "50 milliseconds") is False
    assert wait(waiter, "50 milliseconds", tenant="t") is True
    assert wait(waiter, "50 milliseconds", tenant=None) is True


def test_in_a_transaction_block_or_a_function_it_is_2d000(db):
    session = db.connect()
    with raises("2D000"), session.transaction():
        wait(session, "1 second")
    session.execute(
        """CREATE FUNCTION public.waits() RETURNS void LANGUAGE plpgsql AS
           $$ DECLARE ready boolean; BEGIN CALL lockstep.job_wait('q', '1 second', ready); END $$"""
    )
    with raises("2D000"):
        session.execute("SELECT public.waits()")


@pytest.mark.parametrize(
    "arguments, sqlstate",
    [("NULL, '1 s'", "22004"), ("'', '1 s'", "22023"), ("'q', NULL", "22004"), ("'q', '0'", "22023"), ("'q', '-1 s'", "22023")],
)
def test_a_bad_argument_is_refused(db, arguments, sqlstate):
    with raises(sqlstate):
        db.connect().execute(f"CALL lockstep.job_wait({arguments})")


def test_cancel_ends_it(db):
    waiter, session = db.connect(), db.connect()
    waiting = start(wait, waiter)
    sleeps(session, waiter)
    session.execute("SELECT pg_cancel_backend(%s)", (waiter.info.backend_pid,))
    with raises("57014"):
        waiting.result(30)
    session.execute("SELECT lockstep.job_enqueue('q', 'k', 'a')")
    assert wait(waiter) is True
