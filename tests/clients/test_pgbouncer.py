"""Through PgBouncer in transaction mode: every call may meet another server session, and in a pool of one that of everybody."""

import contextlib
import importlib
import os
import socket
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from server import wait_until
from sessions import call, claim, push, raises, start


@pytest.fixture
def pool(db, monkeypatch):
    """Starts a pooler: `pool(default_pool_size=1)`."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with contextlib.ExitStack() as poolers:
        yield lambda **settings: poolers.enter_context(importlib.import_module("pgbouncer").pgbouncer(db.cluster, **settings))


@pytest.fixture
def pooled(db, pool):
    """A function that connects to the test's database through a pool."""
    pooler = pool()
    return lambda: pooler.connect(db.name)


@pytest.fixture
def single(db, pool):
    """A function that connects to the test's database through a pool of one server connection."""
    pooler = pool(default_pool_size=1, admin_users="postgres")

    def connect(dbname=db.name, **options):
        return pooler.connect(dbname, **options)

    return connect


def test_a_lease_is_waited_for_guarded_renewed_and_released_through_the_pool(db, pooled):
    observer, holder, waiter = db.connect(), pooled(), pooled()
    observer.execute("CREATE TABLE data (writer text)")
    acquired, token = holder.execute("SELECT acquired, token FROM lockstep.lease_acquire('job', 'a')").fetchone()
    assert acquired
    take = "CALL lockstep.lease_take('job', 'b', '1 minute', '30 s')"
    taken = start(lambda: waiter.execute(take).fetchone())
    wait_until(lambda: observer.execute("SELECT waiting_pids <> '{}' FROM lockstep.lease_status").fetchone() == (True,))
    with holder.transaction():
        holder.execute("SELECT lockstep.lease_guard('job', %s)", (token,))
        holder.execute("INSERT INTO data VALUES ('a')")
    assert holder.execute("SELECT status FROM lockstep.lease_renew('job', %s)", (token,)).fetchone() == ("renewed",)
    assert holder.execute("SELECT lockstep.lease_release('job', %s)", (token,)).fetchone() == (True,)
    acquired, new, *_ = taken.result(20)
    assert acquired and new > token
    with raises("LS003"), holder.transaction():
        holder.execute("SELECT lockstep.lease_guard_at_commit('job', %s)", (token,))
        holder.execute("INSERT INTO data VALUES ('a')")
    with waiter.transaction():
        waiter.execute("SELECT lockstep.lease_guard_at_commit('job', %s)", (new,))
        waiter.execute("INSERT INTO data VALUES ('b')")
    assert observer.execute("SELECT writer FROM data ORDER BY 1").fetchall() == [("a",), ("b",)]
    with raises("2D000"), waiter.transaction():
        waiter.execute(take)


def test_what_belongs_to_a_session_is_the_next_clients(single):
    one, other = single(), single()

    def both(query):
        return one.execute(query).fetchone(), other.execute(query).fetchone()

    assert both("SELECT pg_try_advisory_lock(1)") == ((True,), (True,))  # so it excludes nobody
    one.execute("LISTEN somewhere")
    assert other.execute("SELECT pg_listening_channels()").fetchone() == ("somewhere",)
    with one.transaction():
        one.execute("SET LOCAL lock_timeout = '1s'")
    assert both("SHOW lock_timeout") == (("0",), ("0",))
    one.execute("SET lock_timeout = '1s'")
    assert both("SHOW lock_timeout") == (("1s",), ("1s",))


def test_statements_prepared_under_a_name_collide(single):
    one, other = single(prepare_threshold=0), single(prepare_threshold=0)
    query = "SELECT * FROM lockstep.push_event('order', %s, 'placed')"
    one.execute(query, ("one",))
    with raises("42P05"):
        other.execute(query, ("other",))


def test_a_limit_in_a_connection_string_is_refused_and_the_databases_holds(db, single):
    with pytest.raises(psycopg.OperationalError, match="unsupported startup parameter"):
        single(options="-c lock_timeout=1s")
    session = db.connect()
    session.execute(sql.SQL("ALTER DATABASE {} SET lock_timeout = '1ms'").format(sql.Identifier(db.name)))
    session.execute("SELECT lockstep.projection_create('p')")
    session.execute("BEGIN")
    claim(session)
    with raises("55P03"):
        claim(single(), wait=True)


def test_who_waits_in_lease_take_occupies_a_server_connection(db, single):
    session, waiter, other = db.connect(), single(), single()
    console = single("pgbouncer", row_factory=dict_row)
    (token,) = session.execute("SELECT token FROM lockstep.lease_acquire('job', 'a')").fetchone()
    taken = start(lambda: waiter.execute("CALL lockstep.lease_take('job', 'b', '1 minute', '1 minute')").fetchone())
    wait_until(lambda: session.execute("SELECT waiting_pids <> '{}' FROM lockstep.lease_status").fetchone() == (True,))
    pushed = start(lambda: push(other))
    wait_until(lambda: any(row["cl_waiting"] for row in console.execute("SHOW POOLS")))
    assert not pushed.done()
    session.execute("SELECT lockstep.lease_release('job', %s)", (token,))
    assert taken.result(30)[0]
    assert pushed.result(30) > 0


def test_a_client_that_dies_in_a_transaction_frees_its_claim(db, pooled):
    session, worker = db.connect(), pooled()
    session.execute("SELECT lockstep.projection_create('p')")
    position = push(session)
    worker.execute("BEGIN")
    assert claim(worker) == [position]
    assert claim(session) == []
    with socket.socket(fileno=os.dup(worker.pgconn.socket)) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    assert wait_until(lambda: claim(session)) == [position]


def test_a_cancel_through_the_pool_ends_a_wait(db, pooled):
    session, worker = db.connect(), pooled()
    session.execute("SELECT lockstep.projection_create('p')")
    session.execute("BEGIN")
    claim(session)
    observer, claimed = db.connect(), start(lambda: claim(worker, wait=True))
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    wait_until(lambda: observer.execute(query).fetchone() == (1,))
    worker.cancel()
    with raises("57014"):
        claimed.result(30)


def test_a_projection_is_run_and_waited_for_through_the_pool(db, pooled):
    session, runner, waiter = db.connect(), pooled(), pooled()
    session.execute(
        """CREATE TABLE seen (position numeric);
        CREATE FUNCTION see(event lockstep.events) RETURNS void LANGUAGE sql
            BEGIN ATOMIC INSERT INTO seen VALUES (event.position); END;
        SELECT lockstep.projection_create('seen', handler => 'see(lockstep.events)')"""
    )
    position = push(session)
    waited = start(lambda: call(waiter, "projection_wait", name="seen", up_to=position, timeout="1 minute"))
    assert runner.execute("SELECT status, processed FROM lockstep.projection_run('seen')").fetchone() == ("ok", 1)
    assert waited.result(30) == [(True,)]
