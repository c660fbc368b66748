"""Pushes and claims inside what transactions can be: prepared, deferred, with savepoints and exception blocks."""

from psycopg.types.json import Jsonb
from server import wait_for_lock_wait, wait_until
from sessions import call, claim, claim_and_advance, drain, log, push, raises, start


def test_a_deferred_trigger_that_pushes_at_commit_is_seen_though_a_claim_passed_in_between(db):
    shop, other, worker = db.connect(), db.connect(), db.connect()
    shop.execute(
        """
        SELECT lockstep.projection_create('p');
        CREATE TABLE orders (id text PRIMARY KEY);
        CREATE FUNCTION announce() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM lockstep.push_event('order', NEW.id, 'placed');
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER announce AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION announce();
        """
    )
    shop.execute("BEGIN")
    shop.execute("INSERT INTO orders VALUES ('one'), ('two')")
    between = push(other)
    assert claim_and_advance(worker) == [between]
    shop.execute("COMMIT")
    placed = log(worker)[1:]
    assert len(placed) == 2 and min(placed) > between
    assert drain(worker) == placed


def test_many_sessions_whose_deferred_triggers_push_at_commit_lose_nothing(db):
    sessions = [db.connect() for _ in range(6)]
    worker = db.connect()
    worker.execute(
        """
        SELECT lockstep.projection_create('p');
        CREATE TABLE orders (id int);
        CREATE FUNCTION announce() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM lockstep.push_event('order', NEW.id::text, 'placed');
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER announce AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION announce();
        """
    )

    def place(session, first):
        for n in range(first, first + 20):
            session.execute("INSERT INTO orders VALUES (%s)", (n,))

    running = [start(place, session, number * 20) for number, session in enumerate(sessions)]
    seen = []
    while not all(future.done() for future in running):
        seen += claim_and_advance(worker, barrier=len(seen) % 2 == 0)
    for future in running:
        future.result(0)
    seen += drain(worker)
    assert seen == log(worker)
    assert len(seen) == 120


def push_and_prepare(session, gid, aggregate_id=None):
    """Pushes one event in a transaction that is prepared under this identifier; returns its position."""
    session.execute("BEGIN")
    position = push(session, aggregate_id)
    session.execute(f"PREPARE TRANSACTION '{gid}'")
    return position


def test_a_prepared_push_holds_back_readers_until_it_is_committed(db):
    writer, other, reader, observer = (db.connect() for _ in range(4))
    observer.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    before = push(other)
    prepared = push_and_prepare(writer, db.name)
    after = push(other)
    assert claim_and_advance(reader, "p", barrier=False) == [before]
    waiting = start(claim_and_advance, reader, "q")
    assert wait_for_lock_wait(observer, reader.info.backend_pid)
    assert claim_and_advance(observer, "p", barrier=False) == []
    writer.execute(f"COMMIT PREPARED '{db.name}'")
    assert waiting.result(30) == [before, prepared, after]
    assert drain(observer, "p") == [prepared, after]


def test_a_prepared_push_that_is_rolled_back_leaves_nothing(db):
    writer, other, reader, observer = (db.connect() for _ in range(4))
    observer.execute("SELECT lockstep.projection_create('p')")
    push_and_prepare(writer, db.name, "one")
    after = push(other)
    waiting = start(claim_and_advance, reader)
    wait_for_lock_wait(observer, reader.info.backend_pid)
    other.execute(f"ROLLBACK PREPARED '{db.name}'")
    assert waiting.result(30) == [after]
    with observer.transaction():
        rows = call(observer, "push_event", aggregate_type="order", aggregate_id="one", event_type="added")
    assert rows[0][1] == 1


def test_a_prepared_push_holds_back_readers_after_a_restart_too(cluster, new_database):
    own = cluster()
    database = new_database(own, "prepared")
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    before = push(session)
    prepared = push_and_prepare(session, "held", "one")
    own.restart()
    session, reader, observer = database.connect(), database.connect(), database.connect()
    after = push(session)
    assert claim_and_advance(session, barrier=False) == [before]
    waiting = start(claim_and_advance, reader)
    assert wait_for_lock_wait(observer, reader.info.backend_pid)
    session.execute("COMMIT PREPARED 'held'")
    assert waiting.result(30) == [prepared, after]


def test_a_prepared_push_holds_back_readers_though_its_session_pushes_again(db):
    writer, other, reader = (db.connect() for _ in range(3))
    reader.execute("SELECT lockstep.projection_create('p')")
    before = push(other)
    prepared = push_and_prepare(writer, db.name)
    between = push(other)
    writer.execute("BEGIN")
    again = push(writer)
    assert claim_and_advance(reader, barrier=False) == [before]
    other.execute(f"COMMIT PREPARED '{db.name}'")
    assert claim_and_advance(reader, barrier=False) == [prepared, between]
    writer.execute("COMMIT")
    assert claim_and_advance(reader, barrier=False) == [again]


def test_the_horizon_does_not_pass_a_push_while_its_locks_move_to_a_prepared_transaction(cluster, new_database):
    """PREPARE TRANSACTION moves them one part of the lock table after the other. Here there are many, so that it takes a while."""
    rounds, locks, watchers = 6, 40_000, 2
    database = new_database(cluster(max_locks_per_transaction=2000), "moving")
    writer, other, *readers = (database.connect() for _ in range(2 + watchers))
    other.execute(
        """
        -- Whether the horizon passed the position before somebody let go of the advisory lock 0.
        CREATE FUNCTION passes(at numeric) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(-pg_backend_pid());
            LOOP
                IF lockstep.horizon() >= at THEN
                    RETURN true;
                ELSIF pg_try_advisory_xact_lock_shared(0) THEN
                    RETURN false;
                END IF;
            END LOOP;
        END $$
        """
    )
    for number in range(rounds):
        writer.execute("BEGIN")
        push(writer)
        writer.execute("SELECT count(pg_advisory_xact_lock(n)) FROM generate_series(1, %s) AS n", (locks,))
        above = push(other)
        other.execute("SELECT pg_advisory_lock(0)")
        watching = [start(reader.execute, "SELECT passes(%s)", (above,)) for reader in readers]
        for reader in readers:
            assert wait_until(lambda pid=reader.info.backend_pid: is_locked(other, -pid))
        writer.execute(f"PREPARE TRANSACTION 'moved {number}'")
        other.execute("SELECT pg_advisory_unlock(0)")
        assert [future.result(60).fetchone()[0] for future in watching] == [False] * watchers
        writer.execute(f"COMMIT PREPARED 'moved {number}'")


def is_locked(observer, key):
    """Whether somebody holds the advisory lock."""
    query = "SELECT NOT pg_try_advisory_xact_lock(%s)"
    return observer.execute(query, (key,)).fetchone()[0]


def test_a_push_in_an_exception_block_that_rolls_back_is_no_push(db):
    session = db.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    session.execute(
        """
        DO $$
        BEGIN
            PERFORM lockstep.push_event('order', 'one', 'first');
            BEGIN
                PERFORM lockstep.push_event('order', 'one', 'undone');
                PERFORM lockstep.push_event('order', 'two', 'undone');
                RAISE EXCEPTION 'changed my mind';
            EXCEPTION WHEN raise_exception THEN
                NULL;
            END;
            PERFORM lockstep.push_event('order', 'one', 'last');
        END $$
        """
    )
    rows = session.execute(
        "SELECT aggregate_id, sequence, event_type FROM lockstep.events ORDER BY position"
    ).fetchall()
    assert rows == [("one", 1, "first"), ("one", 2, "last")]
    assert drain(session) == log(session)


def test_nobody_waits_for_a_push_that_was_rolled_back_to_a_savepoint(db):
    writer, other = db.connect(), db.connect(options="-c statement_timeout=20s")
    other.execute("SELECT lockstep.projection_create('p')")
    writer.execute("BEGIN")
    writer.execute("SAVEPOINT before")
    push(writer, "one")
    writer.execute("ROLLBACK TO before")
    after = push(other, "one")
    assert claim_and_advance(other) == [after]
    assert call(other, "horizon") == [(after,)]
    later = push(writer, "two")
    writer.execute("COMMIT")
    assert drain(other) == [later]


def test_a_push_in_a_savepoint_that_is_released_counts_from_its_own_start(db):
    writer, other, reader, observer = (db.connect() for _ in range(4))
    observer.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    writer.execute("BEGIN")
    with writer.transaction():
        first = push(writer)
    after = push(other)
    with writer.transaction():
        last = push(writer)
    assert first < after < last
    assert claim_and_advance(reader, barrier=False) == []
    waiting = start(claim_and_advance, reader, "q")
    wait_for_lock_wait(observer, reader.info.backend_pid)
    writer.execute("COMMIT")
    assert waiting.result(30) == [first, after, last]
    assert drain(observer) == [first, after, last]


def test_plpgsql_catches_a_sequence_conflict_by_its_sqlstate_with_its_fields(db):
    session = db.connect()
    push(session, "one")
    session.execute(
        """
        CREATE FUNCTION try_push(OUT state text, OUT message text, OUT detail text, OUT hint text)
        LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM lockstep.push_event('order', 'one', 'added', expected_sequence => 5);
        EXCEPTION WHEN SQLSTATE 'LS001' THEN
            GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
                detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
        END $$
        """
    )
    state, message, detail, hint = session.execute("SELECT * FROM try_push()").fetchone()
    assert state == "LS001"
    assert message == 'aggregate "order/one" is at sequence 1, expected 5'
    assert detail == "Actual sequence 1, expected 5."
    assert hint


def test_plpgsql_catches_a_taken_key_as_unique_violation_with_its_constraint(db):
    session = db.connect()
    events = [
        {
            "aggregate_type": "user",
            "aggregate_id": name,
            "event_type": "registered",
            "unique": [{"op": "add", "scope": "email", "value": "x@example.org"}],
        }
        for name in ("one", "two")
    ]
    call(session, "push_events", events=Jsonb(events[:1]))
    session.execute(
        """
        CREATE FUNCTION try_push(events jsonb, OUT name text, OUT detail text) LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM lockstep.push_events(events);
        EXCEPTION WHEN unique_violation THEN
            GET STACKED DIAGNOSTICS name = CONSTRAINT_NAME, detail = PG_EXCEPTION_DETAIL;
        END $$
        """
    )
    name, detail = session.execute("SELECT * FROM try_push(%s)", (Jsonb(events[1:]),)).fetchone()
    assert name == "unique_keys_pkey"
    assert detail == "Key (tenant, scope, value)=(, email, x@example.org) already exists."


def test_an_error_inside_a_transaction_aborts_it_as_any_error_does(db):
    session = db.connect()
    session.execute("BEGIN")
    push(session, "one")
    with raises("LS001"):
        push(session, "one", expected_sequence=0)
    with raises("25P02"):
        push(session, "one")
    session.execute("ROLLBACK")
    assert log(session) == []


def test_a_claim_and_a_writer_that_need_each_other_are_a_deadlock_that_postgresql_ends(db):
    writer, worker, observer = db.connect(), db.connect(), db.connect()
    observer.execute("SELECT lockstep.projection_create('p')")
    observer.execute("CREATE TABLE model AS SELECT 1 AS n")
    writer.execute("BEGIN")
    push(writer)
    worker.execute("BEGIN")
    worker.execute("UPDATE model SET n = 2")
    claiming = start(claim, worker)
    wait_for_lock_wait(observer, worker.info.backend_pid)
    updating = start(writer.execute, "UPDATE model SET n = 3")
    with raises("40P01"):
        for future in (claiming, updating):
            future.result(30)


def test_the_extension_can_be_dropped_and_created_again_in_one_session(db):
    session = db.connect()
    for _ in range(2):
        session.execute("SELECT lockstep.projection_create('p')")
        position = push(session, "one")
        assert call(session, "barrier") == [(position,)]
        assert drain(session) == [position] == log(session)
        session.execute("DROP EXTENSION lockstep")
        session.execute("CREATE EXTENSION lockstep")


def test_another_session_may_drop_the_extension_and_create_it_again(db):
    """What a session knows of the tables is true until PostgreSQL says otherwise, also in a transaction that is open."""
    session, other = db.connect(), db.connect()
    for begin, end in (("", ""), ("BEGIN", "COMMIT")):
        session.execute("SELECT lockstep.lease_acquire('l', 'h'), lockstep.job_enqueue('q', 'k', 'a')")
        session.execute("SELECT lockstep.job_complete(job_id, token) FROM lockstep.job_claim('q', 'w')")
        push(session)
        session.execute(begin)
        other.execute("DROP EXTENSION lockstep; CREATE EXTENSION lockstep")
        assert push(session) == 1
        assert session.execute("SELECT count(*) FROM lockstep.job_claim('q', 'w')").fetchone() == (0,)
        assert session.execute("SELECT status FROM lockstep.lease_renew('l', 1)").fetchone() == ("unknown",)
        session.execute(end)


def test_serializable_pushes_to_different_aggregates_do_not_abort_each_other(db):
    """A look at the end of the log in each push would: every other push of the tenant inserts there."""
    admin = db.connect()
    # A log large enough that two aggregates are not neighbours in the primary key.
    admin.execute(
        """INSERT INTO lockstep.events
           SELECT '', n, 'order', md5(n::text), 1, 'x', NULL, NULL, NULL, now() FROM generate_series(1, 20000) AS n"""
    )
    admin.execute("SELECT setval('lockstep.ticket', 20000)")
    admin.execute("ANALYZE lockstep.events")
    first, second = db.connect(), db.connect()
    for session in (first, second):
        push(session)  # a backend's first push to a tenant does look
    for round in range(20):
        for session, aggregate in ((first, f"a{round}"), (second, f"f{round}")):
            session.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
            push(session, aggregate)
        first.execute("COMMIT")
        second.execute("COMMIT")


def test_a_repeatable_read_statement_may_push_to_one_aggregate_twice(db):
    session = db.connect()
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    rows = session.execute(
        "SELECT (lockstep.push_event('order', 'a', 'x')).sequence FROM generate_series(1, 2)"
    ).fetchall()
    session.execute("COMMIT")
    assert rows == [(1,), (2,)]


def test_writers_names_a_prepared_transaction_by_its_gid(db):
    session = db.connect()
    push(session)
    session.execute("BEGIN")
    push(session)
    gid = f"{db.name}_writer"
    session.execute(f"PREPARE TRANSACTION '{gid}'")
    rows = session.execute(
        """SELECT tenant, pid, gid, transaction_start < clock_timestamp(), least_position FROM lockstep.writers"""
    ).fetchall()
    assert rows == [("", None, gid, True, 2)]
    session.execute(f"COMMIT PREPARED '{gid}'")
    assert session.execute("SELECT count(*) FROM lockstep.writers").fetchone() == (0,)
