"""Wake-ups: a commit that makes something due is acted on at once, however rarely anybody looks."""

import time

import pytest
from server import wait_until
from sessions import call, push, start
from workers import sleeps

SOON = 0.5  # what is noticed by nothing but a look takes 1 s on average, or 60


@pytest.fixture
def app(app):
    """Without wake-ups nobody looks more than once a second; sessions that wait would look every ten minutes."""
    app.project()
    app.turn_on(poll_interval="60s")
    app.wait_for([app.push("warm"), app.push("warm")], tenant="warm")
    return app


def median_time(app, act, repetitions=9):
    """Half of the repetitions of act, which returns what shall come true, are faster than this.

    The launcher's own look, every second, would find it too, but not so often at once.
    """
    times = []
    for _ in range(repetitions):
        come_true = act()
        begun = time.monotonic()
        wait_until(come_true)
        times.append(time.monotonic() - begun)
    print(sorted(times))
    return sorted(times)[repetitions // 2]


def test_a_commit_that_pushed_is_acted_on_at_once(app):
    def act():
        position = app.push()
        return lambda: position in app.applied(tenant="")

    assert median_time(app, act) < 0.1


def test_a_push_to_a_tenant_that_is_new_is_acted_on_at_once(app):
    tenants = iter(range(100))

    def act():
        position = app.push(f"new {next(tenants)}")
        return lambda: position in app.applied()

    assert median_time(app, act) < 0.1


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "ROLLBACK TO s", "death"])
def test_the_end_of_a_slow_writer_frees_what_waited_behind_it_at_once(app, end):
    observer = app.db.connect()

    def act():
        slow = app.db.connect()
        slow.execute("BEGIN")
        if end == "ROLLBACK TO s":
            slow.execute("SAVEPOINT s")
        push(slow)
        position = app.push()
        looks = sleeps(app.launcher())
        wait_until(lambda: sleeps(app.launcher()) > looks)
        assert position not in app.applied()
        if end == "death":
            observer.execute("SELECT pg_terminate_backend(%s)", (slow.info.backend_pid,))
        else:
            slow.execute(end)
        if end == "ROLLBACK TO s":
            # Its locks are given back, which nobody announces before the transaction's end.
            slow.execute("COMMIT")
        else:
            slow.close()
        return lambda: position in app.applied()

    assert median_time(app, act, 5) < 0.1


def test_a_new_projection_is_run_at_once(app):
    names = iter(f"new{n}" for n in range(100))

    def act():
        name = app.project(next(names))
        return lambda: len(app.applied(name)) == 2

    assert median_time(app, act) < 0.2


def test_resuming_resetting_altering_and_giving_away_a_projection_is_acted_on_at_once(app):
    other = app.role("other")

    def reset():
        count = len(app.applied())
        app.as_role("projection_reset", name="p", tenant="warm")
        return lambda: len(app.applied()) == count + 2

    def resume():
        app.as_role("projection_pause", name="p")
        position = app.push("paused")
        app.as_role("projection_resume", name="p")
        return lambda: position in app.applied(tenant="paused")

    def alter():
        app.as_role("projection_alter", name="p", handler="-")
        position = app.push("altered")
        app.as_role("projection_alter", name="p", handler=f"{app.owner}.p(lockstep.events)")
        return lambda: position in app.applied(tenant="altered")

    for act in (reset, resume, alter):
        assert median_time(app, act) < 0.1, act

    app.as_role("projection_pause", name="p")
    position = app.push("given")
    with app.admin.transaction():
        app.admin.execute(f"GRANT USAGE ON SCHEMA {app.owner} TO {other}")
        app.admin.execute("SELECT lockstep.projection_owner('p', %s::regrole)", (other,))
        app.admin.execute("SELECT lockstep.projection_resume('p')")
    app.wait_for(position, tenant="given", timeout=5)
    assert app.admin.execute("SELECT who FROM public.applied ORDER BY nth DESC LIMIT 1").fetchone() == (other,)


def test_the_end_of_a_prepared_transaction_is_noticed(app):
    for gid, end in (("one", "COMMIT"), ("two", "ROLLBACK")):
        writer = app.db.connect()
        writer.execute("BEGIN")
        inside = push(writer)
        writer.execute(f"PREPARE TRANSACTION '{app.db.name}_{gid}'")
        behind = app.push()
        looks = sleeps(app.launcher())
        wait_until(lambda: sleeps(app.launcher()) > looks)
        assert behind not in app.applied()
        writer.execute(f"{end} PREPARED '{app.db.name}_{gid}'")
        wait_until(lambda: behind in app.applied(), timeout=3)
        assert (inside in app.applied()) == (end == "COMMIT")


def test_projection_wait_is_woken_by_the_commit_of_the_worker(app):
    session = app.db.connect()
    times = []
    for _ in range(20):
        begun = time.monotonic()
        assert call(session, "projection_wait", name="p", up_to=app.push(), timeout="20 s") == [(True,)]
        times.append(time.monotonic() - begun)
    assert max(times) < SOON, times


def test_projection_wait_is_woken_when_the_filter_lets_nothing_through(app):
    app.project("f", event_types=["wanted"])
    session = app.db.connect()
    for _ in range(20):
        begun = time.monotonic()
        assert call(session, "projection_wait", name="f", up_to=app.push(), timeout="20 s") == [(True,)]
        assert time.monotonic() - begun < SOON


def test_projection_wait_is_woken_when_the_last_events_are_none_of_the_projections(app):
    app.project("f", event_types=["wanted"])
    session = app.db.connect()
    for _ in range(5):
        with app.admin.transaction():
            app.push(event_type="wanted")
            last = app.push(event_type="other")
        begun = time.monotonic()
        assert call(session, "projection_wait", name="f", up_to=last, timeout="20 s") == [(True,)]
        assert time.monotonic() - begun < SOON


def test_sessions_that_wait_for_different_things_are_all_woken(app):
    app.project("q")
    sessions = [app.db.connect() for _ in range(12)]
    slow = app.db.connect()
    slow.execute("BEGIN")
    positions = {tenant: push(slow, tenant=tenant) for tenant in ("a", "b", "c")}
    waits = [
        start(call, session, "projection_wait", name="pq"[n % 2], up_to=positions["abc"[n % 3]], tenant="abc"[n % 3], timeout="20 s")
        for n, session in enumerate(sessions)
    ]
    pids = [session.info.backend_pid for session in sessions]
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY (%s) AND wait_event_type = 'Extension'"
    wait_until(lambda: app.admin.execute(asleep, (pids,)).fetchone()[0] == len(pids))
    begun = time.monotonic()
    slow.execute("COMMIT")
    assert [wait.result(30) for wait in waits] == [[(True,)]] * len(waits)
    assert time.monotonic() - begun < SOON


def test_every_one_of_many_pushes_in_a_row_by_many_sessions_is_applied_at_once(app):
    """Nothing is forgotten between a look and a sleep: no event waits for the look every second."""
    sessions = [app.db.connect() for _ in range(4)]

    def push_some(session, tenant):
        late = 0
        for _ in range(100):
            position = push(session, tenant=tenant)
            begun = time.monotonic()
            query = "SELECT EXISTS (SELECT FROM public.applied WHERE tenant = %s AND position = %s)"
            wait_until(lambda: session.execute(query, (tenant, position)).fetchone()[0])
            late += time.monotonic() - begun > 0.4
        return late

    results = [start(push_some, session, f"t{n % 2}") for n, session in enumerate(sessions)]
    assert [result.result(100) for result in results] == [0] * 4
