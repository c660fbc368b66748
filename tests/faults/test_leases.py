"""Leases over real connections: who wins, what waits, what survives a crash, a failover, a dump."""

import time
from datetime import timedelta
from threading import Event

import pytest
from sessions import call, raises, start, start_together
from server import wait_for_lock_wait, wait_until


def acquire(session, holder, name="job", **arguments):
    """The row of lease_acquire: acquired, token, held_by, expires_at, renew_before."""
    return call(session, "lease_acquire", name=name, holder=holder, **arguments)[0]


def token_of(session, holder, name="job", **arguments):
    row = acquire(session, holder, name, **arguments)
    assert row[0], row
    return row[1]


def renew(session, token, name="job", **arguments):
    return call(session, "lease_renew", name=name, token=token, **arguments)[0]


def release(session, token, name="job"):
    return call(session, "lease_release", name=name, token=token)[0][0]


def guard(session, token, name="job"):
    call(session, "lease_guard", name=name, token=token)


def expire(session, name="job"):
    session.execute(
        "UPDATE lockstep.leases SET expires_at = clock_timestamp() - interval '1 second' WHERE name = %s", (name,)
    )


def status(session, *columns, name="job"):
    row = session.execute(f"SELECT {', '.join(columns)} FROM lockstep.lease_status WHERE name = %s", (name,)).fetchone()
    return row[0] if len(columns) == 1 else row


def clock(session):
    return session.execute("SELECT clock_timestamp()").fetchone()[0]


def test_of_100_sessions_at_once_on_one_name_one_wins(db):
    sessions = [db.connect() for _ in range(100)]
    calls = [lambda n=n, s=s: acquire(s, f"holder-{n}") for n, s in enumerate(sessions)]
    answers = [future.result(60) for future in start_together(calls)]
    assert [answer[0] for answer in answers].count(True) == 1
    assert all(answer[1] is None for answer in answers if not answer[0])
    expire(sessions[0])
    answers = [future.result(60) for future in start_together(calls)]
    assert [answer[0] for answer in answers].count(True) == 1


def test_100_sessions_at_once_on_100_names_all_win_with_tokens_of_their_own(db):
    sessions = [db.connect() for _ in range(100)]
    calls = [lambda n=n, s=s: acquire(s, "holder", name=f"job-{n}") for n, s in enumerate(sessions)]
    answers = [future.result(60) for future in start_together(calls)]
    assert all(answer[0] for answer in answers)
    assert len({answer[1] for answer in answers}) == 100


@pytest.mark.parametrize("end", ["ROLLBACK", "COMMIT"])
def test_a_renewal_that_waited_for_a_row_lock_has_its_full_ttl(db, end):
    blocker, holder = db.connect(), db.connect()
    token = token_of(holder, "a", ttl="20 s")
    blocker.execute("BEGIN")
    blocker.execute("UPDATE lockstep.leases SET metadata = '1'")
    waiting = start(renew, holder, token, ttl="10 s")
    wait_for_lock_wait(blocker, holder.info.backend_pid)
    begun = clock(blocker)
    wait_until(lambda: clock(blocker) - begun > timedelta(seconds=1))
    ended = clock(blocker)
    blocker.execute(end)
    word, expires_at, renew_before = waiting.result(10)
    assert word == "renewed"
    assert expires_at >= ended + timedelta(seconds=10)
    assert renew_before >= ended + timedelta(seconds=5)


def test_a_renewal_during_whose_wait_the_lease_expired_does_not_revive_it(db):
    blocker, holder = db.connect(), db.connect()
    token = token_of(holder, "a", ttl="1 second")
    blocker.execute("BEGIN")
    blocker.execute("SELECT FROM lockstep.leases FOR UPDATE")
    waiting = start(renew, holder, token)
    wait_for_lock_wait(blocker, holder.info.backend_pid)
    wait_until(lambda: status(blocker, "state") == "expired")
    blocker.execute("ROLLBACK")
    assert waiting.result(10) == ("expired", None, None)
    with raises("LS003"):
        guard(holder, token)


def test_a_same_holders_acquisition_that_waited_for_a_release_gets_a_new_token(db):
    releasing, holder = db.connect(), db.connect()
    token = token_of(holder, "a")
    releasing.execute("BEGIN")
    assert release(releasing, token)
    waiting = start(acquire, holder, "a")
    wait_for_lock_wait(db.connect(), holder.info.backend_pid)
    releasing.execute("COMMIT")
    acquired, new, *_ = waiting.result(10)
    # The other transaction holds the lease's lock until it ends, so it may be too early for a takeover: refused, never revived.
    assert (acquired and new > token) or new is None


def test_a_take_by_the_holder_itself_keeps_to_its_timeout_while_a_renewal_is_in_flight(db):
    renewing, holder = db.connect(), db.connect(options="-c lock_timeout=5s")
    token = token_of(holder, "a")
    renewing.execute("BEGIN")
    renewing.execute("SELECT lockstep.lease_renew('job', %s)", (token,))
    take = "CALL lockstep.lease_take('job', 'a', '10 seconds', '200 milliseconds')"
    assert holder.execute(take).fetchone()[0] is False
    renewing.execute("COMMIT")
    assert holder.execute(take).fetchone()[:2] == (True, token)


def test_a_renewal_that_finds_its_lease_expired_after_a_wait_does_not_deadlock_a_theft(db):
    first, second, thief = db.connect(), db.connect(), db.connect(options="-c lock_timeout=300ms")
    token = token_of(first, "a")
    first.execute("BEGIN")
    first.execute("SELECT lockstep.lease_renew('job', %s)", (token,))
    second.execute("BEGIN")
    waiting = start(renew, second, token)
    wait_for_lock_wait(db.connect(), second.info.backend_pid)
    first.execute("UPDATE lockstep.leases SET expires_at = clock_timestamp() + interval '50 ms'")
    first.execute("SELECT pg_sleep(0.1)")
    first.execute("COMMIT")
    assert waiting.result(10)[0] == "expired"
    with raises("55P03") as caught:
        thief.execute("SELECT lockstep.lease_steal('job', 'b', '1 s', 'test')")
    assert str(second.info.backend_pid) in caught.value.diag.message_hint
    second.execute("COMMIT")
    thief.execute("SELECT lockstep.lease_steal('job', 'b', '1 s', 'test')")


def test_an_acquisition_and_a_refusal_never_wait_for_a_row_lock(db):
    blocker, other = db.connect(), db.connect(options="-c lock_timeout=100ms")
    token_of(blocker, "a")
    blocker.execute("BEGIN")
    blocker.execute("SELECT FROM lockstep.leases FOR UPDATE")
    assert acquire(other, "b")[0] is False
    expire(blocker)
    assert acquire(other, "b")[0] is False
    blocker.execute("COMMIT")
    assert acquire(other, "b")[0] is True


def test_a_theft_that_times_out_names_the_pids_of_the_guards(db):
    guards = [db.connect(), db.connect()]
    token = token_of(guards[0], "a")
    for session in guards:
        session.execute("BEGIN")
        guard(session, token)
    thief = db.connect(options="-c lock_timeout=100ms")
    with raises("55P03") as caught:
        call(thief, "lease_steal", name="job", holder="b", ttl="10 s", reason="test")
    diagnostics = caught.value.diag
    for session in guards:
        assert str(session.info.backend_pid) in diagnostics.message_hint
    assert '"job"' in diagnostics.message_primary
    assert sorted(status(thief, "guarding_pids")) == sorted(session.info.backend_pid for session in guards)
    guards[0].execute("COMMIT")
    guards[1].execute("COMMIT")
    assert status(thief, "guarding_pids") == []
    assert call(thief, "lease_steal", name="job", holder="b", ttl="10 s", reason="test")[0][0]


def test_a_guard_of_a_session_that_is_killed_ends(db):
    guarding, other = db.connect(), db.connect()
    token = token_of(other, "a")
    guarding.execute("BEGIN")
    guard(guarding, token)
    expire(other)
    assert acquire(other, "b")[0] is False
    other.execute("SELECT pg_terminate_backend(%s)", (guarding.info.backend_pid,))
    wait_until(lambda: status(other, "guarding_pids") == [])
    assert acquire(other, "b")[0] is True


def test_no_takeover_between_the_check_and_the_commit(cluster, new_database):
    # A COMMIT that waits for a standby that is not there has checked, and is not visible yet.
    own = cluster()
    database = new_database(own, "window")
    writer, probe = database.connect(), database.connect()
    other = database.connect(options="-c synchronous_commit=local")
    token = token_of(writer, "a")
    writer.execute("CREATE TABLE data (writer text)")
    writer.execute("CREATE TABLE probes ()")

    def waits_for_a_standby(session):
        row = other.execute("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", (session.info.backend_pid,))
        return row.fetchone() == ("SyncRep",)

    def commit_until_one_waits():
        while not ended.is_set():
            probe.execute("INSERT INTO probes DEFAULT VALUES")

    # Commits wait from when the checkpointer has read the setting: later than when a session shows it.
    ended = Event()
    own.conf(synchronous_standby_names="nobody")
    probing = start(commit_until_one_waits)
    wait_until(lambda: waits_for_a_standby(probe))
    writer.execute("BEGIN")
    call(writer, "lease_guard_at_commit", name="job", token=token)
    writer.execute("INSERT INTO data VALUES ('a')")
    committing = start(writer.execute, "COMMIT")
    wait_until(lambda: waits_for_a_standby(writer))
    expire(other)
    assert acquire(other, "b")[0] is False
    assert status(other, "guarding_pids") == [writer.info.backend_pid]
    assert other.execute("SELECT count(*) FROM data").fetchone() == (0,)
    ended.set()
    own.conf(synchronous_standby_names="")
    committing.result(20)
    probing.result(20)
    assert other.execute("SELECT count(*) FROM data").fetchone() == (1,)
    assert acquire(other, "b")[0] is True


def test_a_counter_under_a_lease_loses_no_update_of_16_sessions(db):
    session = db.connect()
    session.execute("CREATE TABLE counter (n int); INSERT INTO counter VALUES (0)")
    rounds = 20

    def work(number):
        worker = db.connect()
        worker.execute("SET lockstep.poll_interval = '1ms'")
        for _ in range(rounds):
            acquired, token, *_ = worker.execute(
                "CALL lockstep.lease_take('counter', %s, '30 s', '2 minutes')", (f"worker-{number}",)
            ).fetchone()
            assert acquired
            # Neither one statement nor a lock: without the lease updates would be lost.
            (n,) = worker.execute("SELECT n FROM counter").fetchone()
            worker.execute("UPDATE counter SET n = %s", (n + 1,))
            assert release(worker, token, "counter")

    for future in [start(work, number) for number in range(16)]:
        future.result(120)
    assert session.execute("SELECT n FROM counter").fetchone() == (16 * rounds,)


def test_a_crash_keeps_the_lease_and_repeats_no_token_without_synchronous_commit(cluster, new_database):
    own = cluster(fsync="on", synchronous_commit="off", wal_writer_delay="10s", bgwriter_lru_maxpages="0")
    database = new_database(own, "crash")
    tokens = []
    for n in range(4):
        session = database.connect()
        for _ in range(5):
            tokens.append(token_of(session, "a", name="again"))
            assert release(session, tokens[-1], "again")
        tokens.append(token_of(session, f"holder-{n}", name=f"job-{n}", ttl="1 hour"))
        before = session.execute("SELECT holder, token, expires_at, ttl FROM lockstep.leases WHERE ttl > '1 min' ORDER BY name")
        before = before.fetchall()
        own.crash()
        own.start()
        session = database.connect()
        after = session.execute("SELECT holder, token, expires_at, ttl FROM lockstep.leases WHERE ttl > '1 min' ORDER BY name")
        assert after.fetchall() == before
        assert renew(session, tokens[-1], f"job-{n}")[0] == "renewed"
    assert len(before) == 4
    assert tokens == sorted(set(tokens))


def test_a_promoted_standby_knows_holder_token_and_expiry_and_repeats_no_token(pair):
    database, standby = pair
    session = database.connect()
    tokens = [token_of(session, "a", ttl="1 hour"), token_of(session, "a", name="other")]
    row = "SELECT holder, token, expires_at FROM lockstep.leases ORDER BY name"
    before = session.execute(row).fetchall()
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    assert replica.execute(row).fetchall() == before
    assert status(replica, "holder", "state", "guarding_pids", "waiting_pids") == ("a", "held", [], [])
    for refused in (
        "lease_acquire('job', 'b')",
        "lease_renew('job', 1)",
        "lease_release('job', 1)",
        "lease_guard('job', 1)",
        "lease_guard_at_commit('job', 1)",
        "lease_steal('job', 'b', '1 s', 'test')",
        "lease_delete_expired('0')",
    ):
        with raises("25006"):
            replica.execute(f"SELECT lockstep.{refused}")
    with raises("25006"):
        replica.execute("CALL lockstep.lease_take('job', 'b', '1 s', '1 s')")
    database.cluster.crash()
    standby.promote()
    session = standby.connect(database.name)
    assert session.execute(row).fetchall() == before
    assert acquire(session, "b")[0] is False
    assert renew(session, tokens[0], ttl="1 hour")[0] == "renewed"
    assert release(session, tokens[0])
    assert token_of(session, "b") > max(tokens)


def test_a_restore_goes_on_with_greater_tokens_of_deleted_leases_too(db, cluster, tmp_path):
    session = db.connect()
    held = token_of(session, "a", ttl="1 hour")
    deleted = token_of(session, "a", name="deleted")
    assert release(session, deleted, "deleted")
    assert call(session, "lease_delete_expired", older_than="0") == [(1,)]
    db.cluster.dump(tmp_path / "dump", db.name)
    fresh = cluster()
    fresh.restore(tmp_path / "dump", "restored")
    session = fresh.connect("restored")
    guard(session, held)
    assert acquire(session, "b")[0] is False
    assert token_of(session, "b", name="deleted") > deleted


def test_after_a_failover_that_lost_commits_the_lost_tokens_do_not_come_again(pair):
    database, standby = pair
    session = database.connect()
    kept = token_of(session, "a")
    database.cluster.wait_for_replay(standby)
    standby.stop("immediate")
    expire(session)
    lost = [token_of(session, "b")]
    for _ in range(40):
        assert release(session, lost[-1])
        lost.append(token_of(session, "b"))
    database.cluster.crash()
    standby.start()
    standby.promote()
    session = standby.connect(database.name)
    session.execute("SELECT lockstep.after_data_loss()")
    for token in (kept, *lost):
        with raises("LS003"):
            guard(session, token)
        assert renew(session, token)[0] == "lost"
    expire(session)
    assert token_of(session, "b") > max(lost)


def next_multixact(session):
    session.execute("CHECKPOINT")
    return session.execute("SELECT next_multixact_id FROM pg_control_checkpoint()").fetchone()[0]


def test_guards_and_renewals_cost_no_multixact_and_renewals_are_hot(db):
    session, other = db.connect(), db.connect()
    token = token_of(session, "a")
    before = next_multixact(session)
    for _ in range(20):
        with session.transaction(), other.transaction():
            guard(session, token)
            guard(other, token)
            assert renew(other, token)[0] == "renewed"
            guard(session, token)
    for _ in range(200):
        renew(session, token)
    assert next_multixact(session) == before
    session.execute("SELECT pg_stat_force_next_flush()")
    other.execute("SELECT pg_stat_force_next_flush()")

    def all_hot():
        updates, hot = session.execute(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'leases'"
        ).fetchone()
        return updates >= 220 and updates == hot

    wait_until(all_hot)


def test_a_lease_client_needs_no_rights_on_the_table(db, roles):
    role = roles.create(
        "client",
        "GRANT USAGE ON SCHEMA lockstep TO {role}",
        "GRANT EXECUTE ON FUNCTION lockstep.lease_acquire, lockstep.lease_renew, lockstep.lease_release,"
        " lockstep.lease_guard, lockstep.lease_guard_at_commit TO {role}",
        "GRANT EXECUTE ON PROCEDURE lockstep.lease_take TO {role}",
        "CREATE SCHEMA {role} AUTHORIZATION {role}",
    )
    client = roles.connect(role)
    # An operator of the role's own making, found first by its search_path, runs with nobody else's rights.
    client.execute(
        f"""CREATE FUNCTION {role}.betray(text, text) RETURNS boolean LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'found by %', current_user; END $$;
            CREATE OPERATOR {role}.= (FUNCTION = {role}.betray, LEFTARG = text, RIGHTARG = text);
            SET search_path = {role}, pg_catalog"""
    )
    acquired, token, *_ = client.execute("CALL lockstep.lease_take('job', 'a', '10 s', '1 s')").fetchone()
    assert acquired
    with client.transaction():
        call(client, "lease_guard_at_commit", name="job", token=token)
    with raises("LS003"), client.transaction():
        call(client, "lease_guard_at_commit", name="job", token=token + 1)
    assert client.execute("SELECT current_user::text").fetchone() == (role,)
    for refused in (
        "SELECT FROM lockstep.leases",
        "SELECT lockstep.lease_steal('job', 'b', '1 s', 'test')",
        "SELECT nextval('lockstep.token')",
    ):
        with raises("42501"):
            client.execute(refused)


TAKE = "CALL lockstep.lease_take('job', %s, '1 minute', %s)"


def waits(observer, name="job"):
    return status(observer, "waiting_pids", name=name)


def take(session, holder, timeout="30 s"):
    return session.execute(TAKE, (holder, timeout)).fetchone()


@pytest.fixture(params=["preloaded", "polling"])
def either(request, db, cluster, new_database):
    """A database on a server with the library preloaded, or without."""
    if request.param == "polling":
        return db
    return new_database(cluster(shared_preload_libraries="lockstep"), "preloaded")


def test_lease_take_holds_no_snapshot_and_no_transaction_id_while_it_waits(either):
    holder, waiter, observer = either.connect(), either.connect(), either.connect()
    token = token_of(holder, "a", ttl="1 hour")
    taken = start(take, waiter, "b")
    wait_until(lambda: waits(observer) == [waiter.info.backend_pid])
    seen = set()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        seen.add(
            observer.execute(
                "SELECT backend_xmin::text, backend_xid::text FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Extension'",
                (waiter.info.backend_pid,),
            ).fetchone()
        )
    assert (None, None) in seen
    assert seen <= {(None, None), None}
    assert release(holder, token)
    acquired, new, expires_at, renew_before = taken.result(20)
    assert acquired and new > token
    assert expires_at - renew_before == timedelta(seconds=30)
    assert status(observer, "holder", "token", "waiting_pids") == ("b", new, [])


def test_lease_take_is_woken_by_a_release_when_preloaded(cluster, new_database):
    own = cluster(shared_preload_libraries="lockstep", **{"lockstep.poll_interval": "60s"})
    database = new_database(own, "woken")
    holder, waiter = database.connect(), database.connect()
    for _ in range(3):
        token = token_of(holder, "a", ttl="1 hour")
        taken = start(take, waiter, "b")
        wait_until(lambda: waits(holder) == [waiter.info.backend_pid])
        assert release(holder, token)
        assert taken.result(10)[0]
        expire(holder)


def test_lease_take_is_woken_by_the_end_of_an_acquisition_that_is_rolled_back(cluster, new_database):
    own = cluster(shared_preload_libraries="lockstep", **{"lockstep.poll_interval": "5s"})
    database = new_database(own, "woken")
    holder, waiter = database.connect(), database.connect()
    token_of(holder, "a")
    expire(holder)
    holder.execute("BEGIN")
    token_of(holder, "c")
    begun = time.monotonic()
    taken = start(take, waiter, "b")
    wait_until(lambda: waits(holder) == [waiter.info.backend_pid])
    holder.execute("ROLLBACK")
    assert taken.result(10)[0]
    assert time.monotonic() - begun < 4


def test_lease_take_gets_an_expired_lease_when_it_expires_and_not_at_the_next_poll(db):
    holder, waiter = db.connect(), db.connect()
    waiter.execute("SET lockstep.poll_interval = '60s'")
    expires_at = acquire(holder, "a", ttl="1 second")[3]
    acquired, _, new_expiry, _ = take(waiter, "b")
    assert acquired
    assert timedelta(0) <= new_expiry - timedelta(minutes=1) - expires_at < timedelta(seconds=1)


def test_lease_take_gives_up_at_its_timeout(either):
    holder, waiter = either.connect(), either.connect()
    token_of(holder, "a", ttl="1 hour")
    begun = time.monotonic()
    assert take(waiter, "b", "300 ms") == (False, None, None, None)
    assert 0.3 <= time.monotonic() - begun < 5
    assert waits(holder) == []


def test_lease_take_obeys_cancel_and_statement_timeout(db):
    holder, waiter = db.connect(), db.connect()
    token_of(holder, "a", ttl="1 hour")
    taken = start(take, waiter, "b")
    wait_until(lambda: waits(holder) == [waiter.info.backend_pid])
    holder.execute("SELECT pg_cancel_backend(%s)", (waiter.info.backend_pid,))
    with raises("57014"):
        taken.result(10)
    assert waits(holder) == []
    waiter.execute("SET statement_timeout = '200ms'")
    with raises("57014"):
        take(waiter, "b")
    assert take(db.connect(), "a", "1 s")[0], "the holder itself"


def test_a_waiter_that_is_killed_leaves_nothing(db):
    holder, waiter = db.connect(), db.connect()
    token = token_of(holder, "a", ttl="1 hour")
    start(take, waiter, "b")
    wait_until(lambda: waits(holder) == [waiter.info.backend_pid])
    holder.execute("SELECT pg_terminate_backend(%s)", (waiter.info.backend_pid,))
    wait_until(lambda: waits(holder) == [])
    assert release(holder, token)
    assert acquire(holder, "c")[0] is True


def test_of_many_that_wait_each_gets_the_lease_in_its_turn(either):
    holder = either.connect()
    token = token_of(holder, "a", ttl="1 hour")

    def wait_and_release(number):
        session = either.connect()
        acquired, taken, *_ = take(session, f"waiter-{number}")
        assert acquired
        assert release(session, taken)
        return taken

    futures = [start(wait_and_release, number) for number in range(8)]
    wait_until(lambda: len(waits(holder)) == 8)
    assert release(holder, token)
    tokens = [future.result(30) for future in futures]
    assert len(set(tokens)) == 8 and min(tokens) > token


def test_lease_take_waits_through_a_guard_of_the_former_holder(either):
    holder, waiter, observer = either.connect(), either.connect(), either.connect()
    token = token_of(holder, "a")
    holder.execute("BEGIN")
    guard(holder, token)
    assert release(observer, token)
    taken = start(take, waiter, "b")
    wait_until(lambda: waits(observer) == [waiter.info.backend_pid])
    holder.execute("COMMIT")
    assert taken.result(10)[0]


@pytest.mark.parametrize(
    "block",
    [
        "BEGIN; CALL lockstep.lease_take('job', 'a', '1 s', '1 s')",
        "SELECT 1; CALL lockstep.lease_take('job', 'a', '1 s', '1 s')",
    ],
)
def test_lease_take_in_a_transaction_is_2d000(db, block):
    session = db.connect()
    with raises("2D000") as caught:
        session.execute(block)
    assert "lease_take" in caught.value.diag.message_primary


def test_lease_take_inside_a_do_block_outside_a_transaction_works(db):
    session = db.connect()
    session.execute(
        """DO $$
           DECLARE acquired boolean; token bigint; expires_at timestamptz; renew_before timestamptz;
           BEGIN
               CALL lockstep.lease_take('job', 'a', '1 minute', '1 s', acquired, token, expires_at, renew_before);
               ASSERT acquired AND token > 0 AND renew_before < expires_at;
               CALL lockstep.lease_take('job', 'b', '1 minute', '100 ms', acquired, token, expires_at, renew_before);
               ASSERT NOT acquired AND token IS NULL;
           END $$"""
    )
    assert status(session, "holder") == "a"


def test_null_and_bad_arguments_of_lease_take_are_refused_by_name(db):
    session = db.connect()
    valid = {"name": "'job'", "holder": "'a'", "ttl": "'1 s'", "timeout": "'1 s'"}
    for argument in valid:
        for value, state in (("NULL", "22004"), ("'-1 s'" if argument in ("ttl", "timeout") else "''", "22023")):
            values = ", ".join((valid | {argument: value}).values())
            with raises(state) as caught:
                session.execute(f"CALL lockstep.lease_take({values})")
            assert argument in caught.value.diag.message_primary
