"""Through PgBouncer in transaction mode: every call may meet another server session."""

import importlib
from pathlib import Path

import pytest
from server import wait_until
from sessions import raises, start


@pytest.fixture
def pooled(db, monkeypatch):
    """A function that connects to the test's database through the pool."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with importlib.import_module("pgbouncer").pgbouncer(db.cluster) as pool:
        yield lambda: pool.connect(db.name)


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
