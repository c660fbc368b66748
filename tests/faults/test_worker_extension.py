"""DROP and CREATE EXTENSION, restores and changes of projections while workers run busily."""

import random
import time

import pytest
from server import wait_until
from sessions import call, push, start
from workers import NOTE, Application, Load, Log, pids, sleeps


def reinstall(app):
    app.admin.execute("CREATE EXTENSION lockstep")
    app.allow(app.owner)


def test_dropping_the_extension_while_workers_run_busily_returns_promptly_and_a_new_one_is_served(app):
    """It waits for the batches that run, at most a second each, and no worker waits for it with a lock of its own."""
    log = Log(app.cluster)
    app.turn_on(workers=3)
    dice = random.Random(6)
    for _ in range(8):
        app.admin.execute(f"GRANT EXECUTE ON FUNCTION lockstep.push_event TO {app.owner}")
        app.project("fails", body="PERFORM pg_sleep(0.1); IF random() < 0.5 THEN RAISE 'x'; END IF;" + NOTE, retry_after="1 ms")
        app.project("pushes", body="PERFORM pg_sleep(0.1), lockstep.push_event('r', TG, 'r', tenant => e.tenant);" + NOTE)
        with app.admin.transaction():
            for n in range(30):
                push(app.admin, tenant=str(n % 5))
        wait_until(lambda: len(app.status("pid")) == 3 and len(app.applied("pushes")) > 1)
        time.sleep(dice.uniform(0, 0.3))  # no synchronisation: at any moment of the batches
        begun = time.monotonic()
        app.admin.execute("DROP EXTENSION lockstep CASCADE")
        assert time.monotonic() - begun < 4
        app.admin.execute("TRUNCATE public.applied")
        reinstall(app)
    assert not log.lines("deadlock")
    assert not log.lines("does not exist")
    app.project()
    for n in range(20):
        app.push(str(n))
    app.wait_and_check()


def test_the_processes_stay_while_there_is_no_extension_and_the_log_is_quiet(app):
    app.project()
    app.turn_on(workers=1)
    app.wait_for(app.push())
    launcher = app.launcher()
    app.admin.execute("DROP EXTENSION lockstep CASCADE")
    log = Log(app.cluster)
    looks = sleeps(launcher)
    wait_until(lambda: sleeps(launcher) >= looks + 3)
    assert log.lines() == []
    assert app.launcher() == launcher
    app.admin.execute("TRUNCATE public.applied")
    reinstall(app)
    app.project()
    app.wait_for(app.push())


def test_a_drop_that_is_rolled_back_stops_nothing(app):
    app.project()
    app.turn_on()
    positions = [app.push()]
    app.wait_for(positions)
    app.admin.execute("BEGIN; DROP EXTENSION lockstep CASCADE")
    app.admin.execute("ROLLBACK")
    for _ in range(5):
        positions.append(app.push())
        app.wait_for(positions)


def test_dropping_altering_and_creating_projections_under_load_loses_and_doubles_nothing(app):
    app.project()
    app.turn_on(workers=3)
    with Load(app.db) as load:
        for n in range(30):
            app.project("short", batch_size=1 + n % 3)
            app.as_role("projection_alter", name="p", batch_size=1 + n * 7 % 50)
            wait_until(lambda: app.applied("short"))
            app.as_role("projection_drop", name="short")
            app.admin.execute("DELETE FROM public.applied WHERE projection = 'short'")
    app.wait_and_check()
    assert load.confirmed


def test_pausing_and_resuming_under_load_loses_and_doubles_nothing(app):
    app.project()
    app.turn_on(workers=3)
    with Load(app.db):
        for n in range(40):
            tenant = Load.TENANTS[n % 4] if n % 2 else None
            app.as_role("projection_pause", name="p", tenant=tenant)
            app.as_role("projection_resume", name="p", tenant=tenant)
    app.wait_and_check()


def test_workers_and_clients_that_run_a_projection_together_lose_and_double_nothing(app):
    app.project(batch_size=5)
    app.admin.execute(f"GRANT EXECUTE ON FUNCTION lockstep.projection_run TO {app.owner}")
    app.turn_on(workers=2)
    client = app.db.connect(user=app.owner)
    with Load(app.db):
        statuses = {call(client, "projection_run", name="p", tenant=Load.TENANTS[n % 4])[0][0] for n in range(400)}
    assert statuses <= {"ok", "busy"}
    app.wait_and_check()


def test_a_retried_dead_letter_and_a_reset_are_applied_again(app):
    app.admin.execute("CREATE TABLE public.broken (); GRANT SELECT ON public.broken TO PUBLIC")
    app.project(body="IF to_regclass('public.broken') IS NOT NULL THEN RAISE 'broken'; END IF;" + NOTE, max_failures=1)
    app.turn_on()
    position = app.push()
    wait_until(lambda: app.failures("skipped_at IS NOT NULL") == [(True,)])
    app.admin.execute("DROP TABLE public.broken")
    app.as_role("projection_reset", name="p")
    app.wait_for(position)
    wait_until(lambda: app.failures() == [])
    app.as_role("projection_reset", name="p")
    app.wait_for([position, position])


def test_a_restored_dump_is_served_where_it_left_off(app, tmp_path):
    app.project()
    app.turn_on()
    first = app.push()
    app.wait_for(first)
    app.turn_off()
    second = app.push()
    path, name = tmp_path / "dump", f"{app.db.name}_restored"
    app.cluster.dump(path, app.db.name)
    app.cluster.conf(**{"lockstep.databases": name})
    app.cluster.restore(path, name)
    session = app.cluster.connect(name)
    try:
        wait_until(lambda: app.applied(session=session) == [first, second])
        third = push(session)
        wait_until(lambda: app.applied(session=session) == [first, second, third])
    finally:
        app.cluster.conf(**{"lockstep.databases": ""})
        session.close()
        with app.cluster.connect() as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_standby_runs_no_workers_until_it_is_promoted(own_app):
    app = own_app()
    app.project()
    app.turn_on()
    first = app.push()
    app.wait_for(first)
    standby = app.cluster.standby()
    try:
        second = app.push()
        app.wait_for([first, second])
        app.cluster.wait_for_replay(standby)
        replica = standby.connect(app.db.name)
        assert app.applied(session=replica) == [first, second]
        kinds = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'lockstep%'"
        assert replica.execute(kinds).fetchone() == (0,)
        assert replica.execute("SELECT count(*) FROM lockstep.worker_status").fetchone() == (0,)
        app.turn_off()
        third = app.push()
        app.cluster.wait_for_replay(standby)
        app.cluster.crash()
        standby.promote()
        wait_until(lambda: app.applied(session=replica) == [first, second, third])
        fourth = push(replica)
        wait_until(lambda: app.applied(session=replica) == [first, second, third, fourth])
        assert len(pids(replica, "lockstep launcher")) == 1
    finally:
        standby.destroy()


def test_without_preload_there_are_no_workers_and_the_settings_are_only_words(cluster, new_database):
    own = cluster(**{"lockstep.databases": "app", "lockstep.workers": 4})
    app = Application(new_database(own, "app"))
    app.project()
    position = app.push()
    assert app.admin.execute("SELECT * FROM lockstep.worker_status").fetchall() == []
    assert app.state() == "idle"
    kinds = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'lockstep%'"
    assert app.admin.execute(kinds).fetchone() == (0,)
    assert call(app.admin, "projection_wait", name="p", up_to=position, timeout="50 ms") == [(False,)]
    with app.admin.transaction():
        app.admin.execute(f"GRANT EXECUTE ON FUNCTION lockstep.projection_run TO {app.owner}")
        app.admin.execute(f"SET LOCAL ROLE {app.owner}")
        assert call(app.admin, "projection_run", name="p")[0][:2] == ("ok", 1)
    assert call(app.admin, "projection_wait", name="p", up_to=position, timeout="50 ms") == [(True,)]


def test_without_preload_a_wait_polls(cluster, new_database):
    own = cluster()
    app = Application(new_database(own, "app"))
    app.project()
    app.admin.execute("SET lockstep.poll_interval = '20 ms'")
    waiting = app.db.connect(options="-c lockstep.poll_interval=20ms")
    slow = app.db.connect()
    position = app.push()
    future = start(call, waiting, "projection_wait", name="p", up_to=position, timeout="20 s")
    with slow.transaction():
        call(slow, "projection_claim", name="p")
        call(slow, "projection_advance", name="p")
    assert future.result(2) == [(True,)]


@pytest.mark.parametrize("setting, value", [("lockstep.workers", "65"), ("lockstep.workers", "-1"), ("lockstep.poll_interval", "0")])
def test_a_setting_that_means_nothing_is_refused(worker_server, setting, value):
    with worker_server.connect() as session:
        with pytest.raises(Exception, match="outside the valid range"):
            session.execute(f"ALTER SYSTEM SET {setting} = {value}")
