"""Handlers in the server: each event applied once whatever dies, few subtransactions, and errors that are not the event's."""

import random
import threading
import time

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from server import wait_for_lock_wait, wait_until
from sessions import call, claim, drain, log, push, push_many, raises, start

# nth tells in which order the events were applied, and by its gaps how many were applied in vain.
SCHEMA = """
    CREATE TABLE public.applied (nth bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, position numeric, aggregate_id text);
    CREATE TABLE public.bad (aggregate_id text);
    CREATE FUNCTION public.apply(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.applied (position, aggregate_id) VALUES (e.position, e.aggregate_id);
        IF EXISTS (SELECT FROM public.bad WHERE aggregate_id = e.aggregate_id) THEN
            RAISE 'cannot apply %', e.aggregate_id;
        END IF;
    END $$;
    CREATE FUNCTION public.apply_sql(e lockstep.events) RETURNS void LANGUAGE sql AS $$
        INSERT INTO public.applied (position, aggregate_id) VALUES (e.position, e.aggregate_id) $$;
    CREATE FUNCTION public.apply_set(e lockstep.events[]) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.applied (position, aggregate_id)
            SELECT u.position, u.aggregate_id FROM unnest(e) AS u ORDER BY u.position;
        IF EXISTS (SELECT FROM public.bad JOIN unnest(e) AS u USING (aggregate_id)) THEN
            RAISE 'cannot apply one of %', cardinality(e);
        END IF;
    END $$;
    CREATE FUNCTION public.apply_set_sql(e lockstep.events[]) RETURNS bigint LANGUAGE sql AS $$
        INSERT INTO public.applied (position, aggregate_id)
            SELECT u.position, u.aggregate_id FROM unnest(e) AS u ORDER BY u.position;
        SELECT count(*) FROM public.applied $$;
"""
ROW, SET = "public.apply(lockstep.events)", "public.apply_set(lockstep.events[])"
HANDLERS = [ROW, SET, "public.apply_sql(lockstep.events)", "public.apply_set_sql(lockstep.events[])"]
STATEMENT_TIMEOUT = "-c statement_timeout=60s"


@pytest.fixture
def session(db):
    connection = db.connect(options=STATEMENT_TIMEOUT)
    connection.execute(SCHEMA)
    return connection


def create(connection, handler=ROW, name="p", **arguments):
    call(connection, "projection_create", name=name, handler=handler, **arguments)


def run(connection, name="p", **arguments):
    """(status, processed, skipped, more)"""
    row = call(connection, "projection_run", name=name, **arguments)[0]
    return (*row[:3], row[4])


def run_to_the_end(connection, name="p"):
    while (result := run(connection, name))[1] or result[3]:
        assert result[0] == "ok"


def applied(connection):
    rows = connection.execute("SELECT position FROM public.applied ORDER BY nth")
    return [position for (position,) in rows]


def failed(connection):
    return connection.execute("SELECT position, failures, error FROM lockstep.failed_events ORDER BY 1").fetchall()


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_handler_applies_every_event_once_in_order_and_a_rolled_back_run_applies_none(session, handler):
    create(session, handler, batch_size=7)
    positions = push_many(session, 10) + [push(session) for _ in range(10)]
    with session.transaction(force_rollback=True):
        assert run(session) == ("ok", 7, 0, True)
    assert applied(session) == []
    assert [run(session) for _ in range(4)] == [
        ("ok", 7, 0, True),
        ("ok", 7, 0, True),
        ("ok", 6, 0, False),
        ("ok", 0, 0, False),
    ]
    assert applied(session) == positions


def test_a_handler_that_pushes_to_the_tenant_it_reads_sees_its_own_events_in_a_later_run(session):
    session.execute(
        """
        CREATE FUNCTION public.follow(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.applied (position) VALUES (e.position);
            IF e.sequence < 5 THEN
                PERFORM FROM lockstep.push_event(e.aggregate_type, e.aggregate_id, 'more', expected_sequence => e.sequence);
            END IF;
        END $$
        """
    )
    create(session, "public.follow(lockstep.events)")
    for aggregate in ("one", "two"):
        push(session, aggregate)
    assert [run(session)[1] for _ in range(6)] == [2, 2, 2, 2, 2, 0]
    assert applied(session) == log(session)
    assert len(log(session)) == 10


def loop(cluster, dbname, step, stop, counts):
    """Repeats the step until told to stop, over a new connection after each kill."""
    while not stop.is_set():
        connection = None
        try:
            connection = cluster.connect(dbname, options=STATEMENT_TIMEOUT)
            while not stop.is_set():
                step(connection)
        except psycopg.OperationalError as error:
            if connection and not connection.closed and not (error.sqlstate or "").startswith("57P"):
                raise
            counts.append("broken")
        finally:
            if connection:
                connection.close()


def apply_as_client(connection):
    """One round of a client that applies events itself."""
    with connection.transaction():
        positions = claim(connection, max_events=30, wait=True)
        if positions:
            connection.execute("INSERT INTO public.applied (position) SELECT unnest(%s::numeric[])", (positions,))
            call(connection, "projection_advance", name="p")


def run_in_the_server(connection):
    assert run(connection, barrier=False)[0] in ("ok", "busy")


HOLDER = """
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND objsubid >> 12 = 5
      AND database = (SELECT oid FROM pg_database WHERE datname = %s)
"""


def test_fifty_kills_of_whoever_holds_the_claim_leave_each_event_applied_once_and_in_order(cluster, new_database):
    """45 backends are terminated; 5 get a SIGKILL, which takes the whole server through crash recovery each time.

    The victim is the holder of the claim, at a random moment after it got it: in the handler, between it and the commit, or
    just after. Three runs in the server and one client compete for the projection while two writers push.
    """
    own = cluster()
    database = new_database(own, "killed")
    dice = random.Random(20)
    with own.connect(database.name) as connection:
        connection.execute(SCHEMA)
        create(connection, batch_size=100)
    stop_writing, stop_working, broken = threading.Event(), threading.Event(), []
    threads = [
        *(start(loop, own, database.name, lambda c: push_many(c, 20), stop_writing, []) for _ in range(2)),
        *(start(loop, own, database.name, run_in_the_server, stop_working, broken) for _ in range(3)),
        start(loop, own, database.name, apply_as_client, stop_working, broken),
    ]
    killer = own.connect()
    for number in range(50):
        holders = wait_until(lambda: killer.execute(HOLDER, (database.name,)).fetchall())
        time.sleep(dice.uniform(0, 0.02))  # not to wait for something: to hit any moment
        (victim,) = holders[0]
        if number % 10 == 9:
            own.kill_backend(victim)
            own.wait_for_connections()
            killer = own.connect()
        else:
            killer.execute("SELECT pg_terminate_backend(%s, 30000)", (victim,))
    stop_writing.set()
    for writer in threads[:2]:
        writer.result(60)
    stop_working.set()
    for worker in threads[2:]:
        worker.result(60)

    with own.connect(database.name) as session:
        run_to_the_end(session)
        assert applied(session) == log(session)
        assert failed(session) == []
        (in_vain,) = session.execute("SELECT max(nth) - count(*) FROM public.applied").fetchone()
        by_client, by_handler = session.execute(
            "SELECT count(*) FILTER (WHERE aggregate_id IS NULL), count(aggregate_id) FROM public.applied"
        ).fetchone()
    assert len(broken) >= 50
    assert by_client and by_handler
    assert in_vain > 5 * 33, "a crash skips up to 33 numbers; more were not lost: the kills did not hit the handler"


def test_a_clients_claims_and_runs_in_the_server_on_one_projection_apply_each_event_once(db, session):
    create(session, batch_size=10)
    stop, broken = threading.Event(), []
    workers = [
        start(loop, db.cluster, db.name, step, stop, broken) for step in (run_in_the_server, apply_as_client)
    ]
    for _ in range(150):
        push_many(session, 10)
    wait_until(lambda: session.execute("SELECT count(*) FROM public.applied").fetchone()[0] >= 1500)
    stop.set()
    for worker in workers:
        worker.result(30)
    assert broken == []
    assert applied(session) == log(session)
    kinds = session.execute("SELECT count(DISTINCT aggregate_id IS NULL) FROM public.applied").fetchone()
    assert kinds == (2,), "one of the two did all of it"


@pytest.fixture
def quiet(cluster, new_database):
    """A session in a server where nothing else takes transaction ids; 10,000 events, the projection p."""
    connection = new_database(cluster(autovacuum="off"), "quiet").connect(options="-c statement_timeout=280s")
    connection.execute(SCHEMA)
    connection.execute(
        """
        INSERT INTO lockstep.events (tenant, position, aggregate_type, aggregate_id, sequence, event_type, created_at)
        SELECT '', n, 'order', n::text, 1, 'added', clock_timestamp() FROM generate_series(1, 10000) AS n;
        SELECT setval('lockstep.ticket', 10000);
        """
    )
    return connection


def next_xid(connection):
    return connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").fetchone()[0]


def test_10000_good_events_take_one_subtransaction_a_batch(quiet):
    create(quiet)
    before = next_xid(quiet)
    for number in range(50):
        assert run(quiet) == ("ok", 200, 0, number < 49)
    assert next_xid(quiet) - before <= 100, "a transaction and a subtransaction for each of 50 batches"
    rows = quiet.execute("SELECT count(*), count(DISTINCT position), count(DISTINCT xmin::text) FROM public.applied")
    assert rows.fetchone() == (10000, 10000, 50)


@pytest.mark.parametrize("handler", [ROW, SET])
def test_with_every_tenth_event_failing_no_transaction_keeps_more_than_64_subtransactions(quiet, handler):
    quiet.execute("INSERT INTO public.bad SELECT n::text FROM generate_series(10, 10000, 10) AS n")
    create(quiet, handler, batch_size=1000, max_failures=1)
    kept, skipped, more = [], 0, True
    with psycopg.connect(quiet.info.dsn, autocommit=True) as observer:
        while more:
            before = quiet.execute("SELECT COALESCE(max(nth), 0) FROM public.applied").fetchone()[0]
            with quiet.transaction():
                status, _, skips, more = run(quiet)
                assert status == "ok"
                skipped += skips
                if quiet.info.server_version >= 160000:
                    query = """SELECT s.* FROM pg_stat_get_backend_idset() AS b, pg_stat_get_backend_subxact(b) AS s
                               WHERE pg_stat_get_backend_pid(b) = %s"""
                    count, overflowed = observer.execute(query, (quiet.info.backend_pid,)).fetchone()
                    assert not overflowed
                    kept.append(count)
            query = "SELECT count(DISTINCT xmin::text) FROM public.applied WHERE nth > %s"
            (writing,) = quiet.execute(query, (before,)).fetchone()
            assert writing <= 64
            kept.append(writing)
    assert max(kept) <= 64
    assert max(kept) > 32, "the limit was not tried"
    assert skipped == 1000
    good = quiet.execute("SELECT count(*), count(DISTINCT position), max(position) FROM public.applied").fetchone()
    assert good == (9000, 9000, 9999)
    assert quiet.execute("SELECT count(*), max(position) FROM lockstep.failed_events").fetchone() == (1000, 10000)


def cursor_of(connection, name="p"):
    rows = connection.execute("SELECT position FROM lockstep.projection_cursors WHERE projection = %s", (name,))
    return rows.fetchone()


@pytest.mark.parametrize("how", ["cancel", "statement_timeout", "terminate"])
def test_cancel_and_timeouts_inside_a_handler_end_the_statement_and_are_no_failure_of_the_event(db, session, how):
    session.execute(
        """
        CREATE FUNCTION public.slow(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.applied (position) VALUES (e.position);
            IF e.aggregate_id = 'slow' THEN PERFORM pg_sleep(3600); END IF;
        EXCEPTION WHEN OTHERS THEN
            RAISE 'caught %', SQLSTATE;
        END $$
        """
    )
    create(session, "public.slow(lockstep.events)", max_failures=1)
    first, second = push(session), push(session, "slow")
    worker = db.connect()
    if how == "statement_timeout":
        worker.execute("SET statement_timeout = '200ms'")
    running = start(run, worker)
    if how != "statement_timeout":
        query = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
        pid = worker.info.backend_pid
        wait_until(lambda: session.execute(query, (pid,)).fetchone()[0])
        session.execute(f"SELECT pg_{how}_backend(%s)", (pid,))
    with raises("57P01" if how == "terminate" else "57014"):
        running.result(30)
    if how != "terminate":
        assert worker.info.transaction_status == TransactionStatus.IDLE, "the statement's own transaction has ended"
    assert failed(session) == applied(session) == []
    assert cursor_of(session) is None
    with session.transaction(force_rollback=True):
        assert claim(session, wait=True) == [first, second]
    if how != "terminate":
        worker.execute("RESET statement_timeout")
        assert worker.execute("SELECT current_user, current_setting('search_path')").fetchone() == (
            "postgres",
            '"$user", public',
        )
        assert run(worker, max_events=1) == ("ok", 1, 0, True)


def test_a_caller_that_catches_a_cancel_goes_on_where_it_was(session):
    """A function's exception block catches query_canceled: what came before the block stays, what was in it is gone."""
    session.execute(
        """
        CREATE FUNCTION public.canceled(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.applied (position) VALUES (e.position);
            RAISE 'no more time' USING ERRCODE = 'query_canceled';
        END $$;
        CREATE FUNCTION public.catch() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.bad VALUES ('before');
            BEGIN
                INSERT INTO public.bad VALUES ('inside');
                PERFORM FROM lockstep.projection_run('p');
            EXCEPTION WHEN query_canceled THEN
                INSERT INTO public.bad VALUES ('caught');
            END;
            INSERT INTO public.bad VALUES ('after');
            RETURN current_user;
        END $$;
        """
    )
    create(session, "public.canceled(lockstep.events)")
    push(session)
    assert session.execute("SELECT public.catch()").fetchone() == ("postgres",)
    assert session.info.transaction_status == TransactionStatus.IDLE
    rows = session.execute("SELECT aggregate_id FROM public.bad").fetchall()
    assert rows == [("before",), ("caught",), ("after",)]
    assert failed(session) == applied(session) == []
    assert drain(session) == log(session)


def test_a_lock_timeout_inside_a_handler_is_a_failure_of_the_event(db, session):
    create(session)
    position = push(session)
    blocker = db.connect()
    with blocker.transaction():
        blocker.execute("LOCK TABLE public.applied")
        session.execute("SET lock_timeout = '20ms'")
        assert run(session) == ("failed", 0, 0, True)
    rows = session.execute("SELECT position, sqlstate FROM lockstep.failed_events").fetchall()
    assert rows == [(position, "55P03")]


def test_a_failure_inside_a_callers_exception_block_goes_with_the_block_and_only_with_it(session):
    create(session, retry_after="0", max_failures=3)
    push(session, "good")
    bad = push(session, "bad")
    session.execute(
        """
        INSERT INTO public.bad VALUES ('bad');
        CREATE FUNCTION public.run_in_block(fail boolean) RETURNS text LANGUAGE plpgsql AS $$
        DECLARE said text;
        BEGIN
            BEGIN
                SELECT status INTO said FROM lockstep.projection_run('p');
                IF fail THEN RAISE 'the caller fails'; END IF;
            EXCEPTION WHEN raise_exception THEN
                said := SQLERRM;
            END;
            RETURN said || ' ' || current_user || ' ' || current_setting('search_path');
        END $$
        """
    )
    after = ' postgres "$user", public'
    assert session.execute("SELECT public.run_in_block(true)").fetchone() == ("the caller fails" + after,)
    assert (failed(session), len(applied(session)), cursor_of(session)) == ([], 0, None)
    assert session.execute("SELECT public.run_in_block(false)").fetchone() == ("failed" + after,)
    assert failed(session) == [(bad, 1, "cannot apply bad")]
    assert len(applied(session)) == 1
    assert run(session) == ("failed", 0, 0, True)
    assert run(session) == ("ok", 0, 1, False)


def test_a_failed_run_leaves_the_transaction_as_usable_as_before_and_its_claim_is_gone(session):
    create(session)
    push(session, "good")
    push(session, "bad")
    session.execute("INSERT INTO public.bad VALUES ('bad')")
    with session.transaction():
        session.execute("CREATE TEMP TABLE mine ON COMMIT DROP AS SELECT 1")
        assert run(session) == ("failed", 1, 0, True)
        session.execute("SELECT * FROM mine")
        with raises("LS002"), session.transaction():
            call(session, "projection_advance", name="p")
        assert run(session) == ("backoff", 0, 0, False)
    assert len(applied(session)) == 1


def test_backoff_and_the_count_of_failures_are_shared_by_all_sessions(db, session):
    create(session, retry_after="0", max_failures=5)
    push(session, "bad")
    session.execute("INSERT INTO public.bad VALUES ('bad')")
    assert [run(db.connect()) for _ in range(5)] == [("failed", 0, 0, True)] * 4 + [("ok", 0, 1, False)]
    call(session, "projection_alter", name="p", retry_after="1 hour")
    push(session, "bad")
    assert run(db.connect()) == ("failed", 0, 0, True)
    for _ in range(2):
        other = db.connect()
        assert run(other) == ("backoff", 0, 0, False)
        with other.transaction():
            assert claim(other) == []
            assert call(other, "projection_claim_state", name="p") == [("backoff", False)]
    assert call(db.connect(), "projection_due") == []


def test_a_short_backoff_ends_by_itself_and_success_clears_it(db, session):
    create(session, retry_after="50 milliseconds")
    position = push(session, "bad")
    session.execute("INSERT INTO public.bad VALUES ('bad')")
    assert run(session)[0] == "failed"
    session.execute("DELETE FROM public.bad")
    other = db.connect()
    seen = wait_until(lambda: (result := run(other))[0] == "ok" and result)
    assert seen == ("ok", 1, 0, False)
    assert (failed(session), applied(session)) == ([], [position])


def test_dead_letters_are_retried_and_discarded_over_connections(db, session):
    create(session, max_failures=1)
    mended, dropped, good = push(session, "mended"), push(session, "dropped"), push(session, "good")
    session.execute("INSERT INTO public.bad VALUES ('mended'), ('dropped')")
    assert run(db.connect()) == ("ok", 1, 2, False)
    retrier, operator = db.connect(), db.connect()
    assert call(retrier, "failed_event_retry", name="p", event_position=mended) == [(False,)]
    assert failed(operator)[0] == (mended, 2, "cannot apply mended")
    operator.execute("DELETE FROM public.bad WHERE aggregate_id = 'mended'")
    with retrier.transaction(force_rollback=True):
        assert call(retrier, "failed_event_retry", name="p", event_position=mended) == [(True,)]
    assert [row[0] for row in failed(operator)] == [mended, dropped], "a retry is part of its transaction"
    with retrier.transaction():
        assert call(retrier, "failed_event_retry", name="p", event_position=mended) == [(True,)]
        waiting = start(call, operator, "failed_event_retry", name="p", event_position=mended)
        wait_for_lock_wait(session, operator.info.backend_pid)
    with raises("22023"):
        waiting.result(30)
    call(operator, "failed_event_discard", name="p", event_position=dropped)
    assert (failed(session), applied(session)) == ([], [good, mended])
    for function in ("failed_event_retry", "failed_event_discard"):
        with raises("22023"):
            call(db.connect(), function, name="p", event_position=dropped)
    assert run(db.connect()) == ("ok", 0, 0, False)


def test_a_retry_is_refused_after_a_push_and_without_a_handler(session):
    create(session, max_failures=1)
    position = push(session, "bad")
    session.execute("INSERT INTO public.bad VALUES ('bad')")
    run(session)
    with raises("25000"), session.transaction():
        push(session)
        call(session, "failed_event_retry", name="p", event_position=position)
    session.execute("SELECT lockstep.projection_alter('p', handler => '-')")
    with raises("55000") as caught:
        call(session, "failed_event_retry", name="p", event_position=position)
    assert "projection_alter" in caught.value.diag.message_hint


def test_a_reset_projection_applies_everything_again_and_no_more(db, session):
    create(session, batch_size=3)
    positions = [push(session) for _ in range(8)]
    run_to_the_end(session)
    session.execute("TRUNCATE public.applied")
    call(db.connect(), "projection_reset", name="p", up_to=positions[4])
    run_to_the_end(session)
    assert applied(session) == positions[5:]
    call(db.connect(), "projection_reset", name="p")
    assert drain(session) == positions
