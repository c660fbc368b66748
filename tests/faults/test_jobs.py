"""Jobs as sessions, servers and copies of them see each other."""

import pytest
from psycopg.types.json import Jsonb
from server import wait_for_lock_wait, wait_until
from sessions import call, push, raises, start, start_together


def enqueue(connection, key, kind="a", queue="q", **arguments):
    return call(connection, "job_enqueue", queue=queue, key=key, kind=kind, **arguments)[0]


def claim(connection, holder="w", queue="q", **arguments):
    """Claims; returns (job_id, key, kind, token) of each."""
    named = ", ".join(f"{name} => %({name})s" for name in arguments)
    query = f"SELECT job_id, key, kind, token FROM lockstep.job_claim(%(queue)s, %(holder)s{named and ', ' + named})"
    return connection.execute(query, arguments | {"queue": queue, "holder": holder}).fetchall()


def complete(connection, job):
    return call(connection, "job_complete", job_id=job[0], token=job[3])[0][0]


def rows_read(connection):
    """How many index entries and rows of lockstep.jobs the session has read since the last `forget`."""
    (read,) = connection.execute(
        """SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid))
                  + pg_stat_get_xact_tuples_returned('lockstep.jobs'::regclass)
           FROM pg_index WHERE indrelid = 'lockstep.jobs'::regclass"""
    ).fetchone()
    return read


def forget(connection):
    connection.execute("SELECT pg_stat_force_next_flush()")


def test_of_sixteen_sessions_that_enqueue_the_same_at_once_one_makes_a_job(db):
    sessions = [db.connect() for _ in range(16)]
    for n in range(20):
        calls = [lambda session=session: enqueue(session, f"key {n}") for session in sessions]
        answers = [future.result(30) for future in start_together(calls)]
        assert len({job_id for job_id, _ in answers}) == 1
        assert [enqueued for _, enqueued in answers].count(True) == 1
    assert sessions[0].execute("SELECT count(*), sum(enqueued) FROM lockstep.jobs").fetchone() == (20, 320)


def test_of_sixteen_claims_of_one_key_at_once_one_gets_a_job(db):
    sessions = [db.connect() for _ in range(16)]
    for kind in range(40):
        enqueue(sessions[0], "k", str(kind))
    for kind in range(20):
        calls = [lambda session=session: claim(session, max_jobs=5) for session in sessions]
        claimed = [job for future in start_together(calls) for job in future.result(30)]
        assert [job[2] for job in claimed] == [str(kind)], "in the order of enqueueing"
        assert complete(sessions[0], claimed[0]) == "completed"


def test_an_index_allows_one_job_in_progress_per_key(db):
    session = db.connect()
    for kind in "ab":
        enqueue(session, "k", kind)
    claim(session)
    with raises("23505") as caught:
        session.execute(
            """UPDATE lockstep.jobs SET state = 'in_progress', token = 0, holder = 'x', claimed_until = now(), lane = NULL
               WHERE state = 'ready'"""
        )
    assert caught.value.diag.constraint_name == "jobs_in_progress_key"


def test_a_job_is_enqueued_with_what_its_transaction_writes_or_not_at_all(db):
    session, worker = db.connect(), db.connect()
    with session.transaction(force_rollback=True):
        push(session, "one")
        enqueue(session, "one")
    assert claim(worker) == []
    with session.transaction():
        push(session, "one")
        enqueue(session, "one")
        assert claim(worker) == []
    assert [job[1] for job in claim(worker)] == ["one"]
    assert worker.execute("SELECT count(*) FROM lockstep.events").fetchone() == (1,)


@pytest.mark.parametrize("keyed", [True, False])
def test_a_backlog_of_a_busy_key_costs_a_claim_of_another_next_to_nothing(db, keyed):
    session = db.connect()
    session.execute("SELECT lockstep.job_enqueue('q', 'hot', n::text) FROM generate_series(1, 20000) AS n")
    enqueue(session, "cold" if keyed else None, "cold")
    claim(session)
    session.execute("VACUUM ANALYZE lockstep.jobs")
    forget(session)
    with session.transaction():
        assert [job[2] for job in claim(session)] == ["cold"]
        read = rows_read(session)
    assert 0 < read < 500


def test_a_claim_does_not_read_through_jobs_that_are_not_due(db):
    session = db.connect()
    session.execute("SELECT lockstep.job_enqueue('q', NULL, 'a', delay => '1 hour', priority => n % 5) FROM generate_series(1, 20000) AS n")
    enqueue(session, "k", delay="1 microsecond", priority=3)
    session.execute("VACUUM ANALYZE lockstep.jobs")
    forget(session)
    with session.transaction():
        assert [job[1] for job in claim(session)] == ["k"]
        read = rows_read(session)
    assert 0 < read < 100


def test_a_claim_reads_once_past_the_jobs_that_an_open_claim_has(db):
    session, other = db.connect(), db.connect()
    session.execute("SELECT lockstep.job_enqueue('q', NULL, n::text) FROM generate_series(1, 2000) AS n")
    assert claim(session) != []  # plans it
    session.execute("VACUUM ANALYZE lockstep.jobs")
    with other.transaction():
        assert len(claim(other, max_jobs=5000)) == 1999
        forget(session)
        with session.transaction():
            assert claim(session) == []
            read = rows_read(session)
    assert 0 < read < 50_000


def test_a_claim_that_reads_on_past_locked_jobs_keeps_to_the_order_of_age(db):
    session, other = db.connect(), db.connect()
    for kinds, delay in ("a 10", "0"), ("due 30", "1 microsecond"), ("z 10", "0"):
        kind, count = kinds.split()
        session.execute(
            "SELECT lockstep.job_enqueue('q', NULL, %s || n, delay => %s::interval) FROM generate_series(1, %s) AS n", (kind, delay, int(count))
        )
    with other.transaction():
        other.execute("SELECT FROM lockstep.jobs WHERE kind LIKE 'due%' ORDER BY job_id LIMIT 25 FOR UPDATE")
        kinds = [kind for _, _, kind, _ in claim(session, max_jobs=12)]
    assert kinds == [f"a{n}" for n in range(1, 11)] + ["due26", "due27"]


def test_a_claim_that_has_as_many_keys_as_it_can_have_looks_at_no_more(db):
    session = db.connect()
    session.execute("SELECT lockstep.job_enqueue('q', n::text, 'a') FROM generate_series(1, 20000) AS n")
    enqueue(session, None, "last")
    session.execute("VACUUM ANALYZE lockstep.jobs")
    forget(session)
    with session.transaction():
        jobs = claim(session, max_jobs=1500)
        read = rows_read(session)
    assert (len(jobs), jobs[-1][2]) == (1001, "last")
    assert 0 < read < 20_000


def test_a_claim_in_any_tenant_takes_no_look_into_those_where_nothing_is_due(db):
    session = db.connect()
    session.execute(
        "SELECT lockstep.job_enqueue('q', NULL, 'a', delay => '1 hour', tenant => n::text) FROM generate_series(1, 2000) AS n"
    )
    enqueue(session, "k", tenant="999999")
    enqueue(session, "k", delay="1 microsecond", tenant="0")
    session.execute("VACUUM ANALYZE lockstep.jobs")
    forget(session)
    with session.transaction():
        assert len(claim(session, max_jobs=5, tenant=None)) == 2
        read = rows_read(session)
        # A look into a tenant begins with the queue's settings there.
        (looks,) = session.execute("SELECT pg_stat_get_xact_numscans('lockstep.queues_pkey'::regclass)").fetchone()
    assert 0 < read < 30_000
    assert 2 <= looks < 20


def test_acknowledging_by_id_reads_one_row_however_many_are_in_progress(db):
    session = db.connect()
    enqueue(session, "first")
    (first,) = claim(session)
    assert call(session, "job_renew", job_ids=[first[0]], tokens=[first[3]]) == [(first[0],)]  # plans it
    session.execute("SELECT lockstep.job_enqueue('q', n::text, 'a') FROM generate_series(1, 900) AS n")
    assert len(claim(session, max_jobs=900)) == 900
    forget(session)
    with session.transaction():
        assert call(session, "job_guard", job_id=first[0], token=first[3])
        assert call(session, "job_renew", job_ids=[first[0]], tokens=[first[3]]) == [(first[0],)]
        assert complete(session, first) == "completed"
        read = rows_read(session)
    assert 0 < read < 20


def test_a_clock_far_behind_does_not_hide_what_is_ready_at_once(db):
    session = db.connect()
    enqueue(session, "k")
    session.execute("UPDATE lockstep.jobs SET run_at = run_at + interval '1 hour', created_at = run_at + interval '1 hour'")
    assert [job[1] for job in claim(session)] == ["k"]


def test_a_prepared_claim_keeps_its_jobs(db):
    session, other = db.connect(), db.connect()
    enqueue(session, "k")
    session.execute("BEGIN")
    assert len(claim(session)) == 1
    session.execute("PREPARE TRANSACTION 'claim'")
    assert claim(other) == []
    other.execute("COMMIT PREPARED 'claim'")
    (job_id, token) = other.execute("SELECT job_id, token FROM lockstep.jobs").fetchone()
    assert call(other, "job_complete", job_id=job_id, token=token) == [("completed",)]


def test_a_restored_dump_behaves_the_same(db, cluster, tmp_path):
    session = db.connect()
    session.execute("SELECT lockstep.queue_configure('q', max_in_progress => 3, backoff => '7 seconds'), lockstep.queue_pause('p')")
    for key in ("dead", "busy", "failed", "ready"):
        enqueue(session, key, payload=Jsonb({"key": key}), max_attempts=1 if key == "dead" else 3)
    dead, busy, failed = claim(session, max_jobs=3)
    call(session, "job_fail", job_id=dead[0], token=dead[3], error="no")
    call(session, "job_fail", job_id=failed[0], token=failed[3], error="no", retry_after="0")
    enqueue(session, None, delay="1 hour")
    tables = ("jobs", "dead_jobs", "queues")
    before = {table: session.execute(f"SELECT * FROM lockstep.{table} ORDER BY 1").fetchall() for table in tables}
    db.cluster.dump(tmp_path / "dump", db.name)

    fresh = cluster()
    fresh.restore(tmp_path / "dump", "restored")
    session = fresh.connect("restored")
    assert {table: session.execute(f"SELECT * FROM lockstep.{table} ORDER BY 1").fetchall() for table in tables} == before
    assert enqueue(session, "ready")[1] is False
    assert enqueue(session, "failed")[1] is False
    job_id, enqueued = enqueue(session, "busy", "a")
    assert enqueued is True
    assert job_id > max(row[0] for row in before["jobs"])
    again, ready = claim(session, max_jobs=5)
    assert (again[1], ready[1]) == ("failed", "ready"), "in order; the limit holds, the busy key is busy"
    assert min(again[3], ready[3]) > busy[3], "tokens go on"
    assert complete(session, busy) == "completed"
    assert [job[0] for job in claim(session)] == [job_id]
    assert call(session, "job_requeue", job_id=dead[0]) == [(True,)]


def test_a_crash_hands_no_token_out_again_whatever_synchronous_commit_says(cluster, new_database):
    own = cluster(fsync="on", synchronous_commit="off", wal_writer_delay="10s", bgwriter_lru_maxpages="0")
    database = new_database(own, "crash")
    tokens = []
    for _ in range(3):
        session = database.connect()
        for _ in range(40):  # more than a sequence writes ahead to the WAL
            enqueue(session, None)
            (job,) = claim(session)
            tokens.append(job[3])
        own.crash()
        own.start()
        with database.connect() as session:
            assert session.execute("SELECT max(token) FROM lockstep.jobs").fetchone() == (max(tokens),)
    assert len(set(tokens)) == len(tokens)


def test_enqueuers_in_opposite_orders_deadlock_and_both_works_are_kept(db):
    one, two, observer = db.connect(), db.connect(), db.connect()
    one.execute("BEGIN")
    two.execute("BEGIN")
    enqueue(one, "a")
    enqueue(two, "b")
    waiting = start(enqueue, one, "b")
    wait_for_lock_wait(observer, one.info.backend_pid)
    answers = []
    for connection, future in ((two, start(enqueue, two, "a")), (one, waiting)):
        try:
            answers.append(future.result(30)[1])
            connection.execute("COMMIT")
        except Exception as error:
            assert error.sqlstate == "40P01"
            connection.execute("ROLLBACK")
            answers.append(None)
    assert answers.count(None) == 1
    assert sorted(observer.execute("SELECT key FROM lockstep.jobs").fetchall()) == [("a",), ("b",)]


def test_a_worker_that_is_killed_keeps_its_claim_until_it_expires_and_then_loses_it(db):
    worker, other, observer = db.connect(), db.connect(), db.connect()
    enqueue(observer, "k")
    (job,) = claim(worker, ttl="500 milliseconds")
    observer.execute("SELECT pg_terminate_backend(%s)", (worker.info.backend_pid,))
    assert claim(other) == []
    (again,) = wait_until(lambda: claim(other, holder="other"))
    assert again[0] == job[0]
    assert again[3] > job[3]
    assert complete(observer, job) == "lost"
    assert complete(other, again) == "completed"


def test_thousands_of_keyless_jobs_are_claimed_at_once_and_keys_within_the_lock_table(db):
    session = db.connect()
    session.execute("SELECT lockstep.job_enqueue('q', NULL, 'a') FROM generate_series(1, 5000)")
    session.execute("SELECT lockstep.job_enqueue('r', n::text, 'a') FROM generate_series(1, 2500) AS n")
    assert len(claim(session, max_jobs=10_000)) == 5000
    assert [len(claim(session, queue="r", max_jobs=10_000)) for _ in range(3)] == [1000, 1000, 500]


JOB_WORKER = (
    "GRANT USAGE ON SCHEMA lockstep TO {role}",
    "GRANT EXECUTE ON FUNCTION lockstep.job_enqueue, lockstep.job_claim, lockstep.job_complete TO {role}",
    "GRANT EXECUTE ON PROCEDURE lockstep.job_wait TO {role}",
)


def test_a_role_with_execute_needs_no_rights_on_the_tables(db, roles):
    worker = roles.connect(roles.create("worker", *JOB_WORKER))
    enqueue(worker, "k")
    assert worker.execute("CALL lockstep.job_wait('q', '1 second')").fetchone() == (True,)
    (job,) = claim(worker)
    assert complete(worker, job) == "completed"
    for statement in ("SELECT FROM lockstep.jobs", "DELETE FROM lockstep.jobs", "SELECT lockstep.job_reap()"):
        with raises("42501"):
            worker.execute(statement)


def test_a_search_path_of_the_callers_does_not_reach_into_job_wait(db, roles):
    role = roles.create("worker", *JOB_WORKER, "CREATE SCHEMA {role} AUTHORIZATION {role}")
    worker = roles.connect(role)
    worker.execute(
        f"""
        CREATE FUNCTION {role}.trap(text, text) RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'reached as %', current_user; END $$;
        CREATE OPERATOR {role}.= (LEFTARG = text, RIGHTARG = text, FUNCTION = {role}.trap);
        SET search_path = {role}, pg_temp, pg_catalog, lockstep;
        """
    )
    enqueue(worker, "k")
    assert worker.execute("CALL lockstep.job_wait('q', '1 second')").fetchone() == (True,)


def test_a_session_that_claims_of_any_tenant_comes_back_to_the_one_that_it_served_last(db):
    session = db.connect()
    for tenant in "ababbb":
        session.execute("SELECT lockstep.job_enqueue('turns', NULL, 'work', tenant => %s)", (tenant,))
    claimed = [session.execute("SELECT tenant FROM lockstep.job_claim('turns', 'w', tenant => NULL)").fetchall() for _ in range(7)]
    tenants = [row[0] for rows in claimed for row in rows]
    assert "".join(tenants) in ("ababbb", "bababb")
