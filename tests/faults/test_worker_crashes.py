"""Workers, launchers and the supervisor are killed, terminated, and shut down with their server, under load.

Afterwards every event was applied once, in order. Nothing but the protocol sees to that: the table that the handler writes to has
no unique constraint.
"""

import os
import random
import time

import psycopg
import pytest
from server import wait_until
from workers import KINDS, NOTE, Load, Log, all_pids, pids

PROJECTIONS = ("p", "q")
SOON = 10.0  # "within seconds", on a busy machine


@pytest.fixture
def app(own_app):
    app = own_app()
    for projection in PROJECTIONS:
        app.project(projection)
    return app.turn_on()


def progress(app):
    """Waits until something is applied that was not when this began."""

    def count():
        try:
            return app.admin.execute("SELECT COALESCE(max(nth), 0), count(*) FROM public.applied").fetchone()
        except psycopg.OperationalError:
            app.cluster.wait_for_connections()
            app.reconnect()
            return None

    before = wait_until(count)
    wait_until(lambda: (now := count()) and now > before, SOON)


SLEEP = "IF current_setting('test.sleep', true) = 'on' THEN PERFORM pg_sleep(600); END IF;" + NOTE


def let_a_handler_sleep(app):
    """A handler sleeps for ten minutes, until the server starts again."""
    app.handler("p", SLEEP)
    app.cluster.conf(**{"test.sleep": "on"})
    app.push()
    app.wait_for_handler("Timeout")
    app.cluster.conf_later(**{"test.sleep": "off"})


def check(app, load):
    log = app.wait_and_check(PROJECTIONS)
    assert load.confirmed <= set(log), "a push was confirmed and is lost"
    assert len(log) > 20


def test_after_kill_9_of_any_process_50_times_nothing_is_lost_or_doubled(app):
    dice, killed, slowest = random.Random(4), dict.fromkeys(KINDS, 0), 0.0
    with Load(app.db) as load:
        progress(app)
        while sum(killed.values()) < 50:
            kind = dice.choices(KINDS, (1, 2, 4))[0]
            victim = dice.choice(wait_until(lambda kind=kind: pids(app.admin, kind), SOON))
            time.sleep(dice.uniform(0, 0.1))  # no synchronisation: the kill shall meet any moment of a batch
            try:
                app.cluster.kill_backend(victim)
            except ValueError:
                continue  # it has ended meanwhile
            killed[kind] += 1
            begun = time.monotonic()
            app.cluster.wait_for_connections()
            app.reconnect()
            progress(app)
            slowest = max(slowest, time.monotonic() - begun)
    assert min(killed.values()) >= 3
    print(f"killed {killed}, the slowest return took {slowest:.1f} s")
    check(app, load)


def test_after_termination_of_any_process_nothing_is_lost_or_doubled(app):
    dice = random.Random(5)
    with Load(app.db) as load:
        progress(app)
        for kind in dice.sample(KINDS[:1] * 2 + KINDS[1:2] * 3 + KINDS[2:] * 15, 20):
            victim = dice.choice(wait_until(lambda kind=kind: pids(app.admin, kind), SOON))
            app.admin.execute("SELECT pg_terminate_backend(%s)", (victim,))
            wait_until(lambda victim=victim: not os.path.exists(f"/proc/{victim}"))
            wait_until(lambda kind=kind: pids(app.admin, kind), SOON)
            progress(app)
    check(app, load)


def test_a_launcher_that_ends_after_its_supervisor_did_is_started_again(app):
    """The supervisor that asked for it, and would have been told of its end, is gone."""
    launcher, supervisor = app.launcher(), app.supervisor()
    app.admin.execute("SELECT pg_terminate_backend(%s)", (supervisor,))
    wait_until(lambda: pids(app.admin, "lockstep supervisor") not in ([], [supervisor]))
    assert app.launcher() == launcher, "launchers survive their supervisor"
    app.admin.execute("SELECT pg_terminate_backend(%s)", (launcher,))
    wait_until(lambda: pids(app.admin, "lockstep launcher") not in ([], [launcher]), SOON)
    app.push()
    app.wait_and_check(PROJECTIONS, timeout=SOON)


def test_the_settings_are_followed_after_the_supervisor_was_ended(app):
    app.wait_for(app.push())
    supervisor = app.supervisor()
    app.admin.execute("SELECT pg_terminate_backend(%s)", (supervisor,))
    wait_until(lambda: pids(app.admin, "lockstep supervisor") not in ([], [supervisor]))
    app.turn_off()
    app.turn_on()
    app.push()
    app.wait_and_check(PROJECTIONS, timeout=SOON)


def test_a_launcher_that_is_ended_again_and_again_is_back_within_seconds(app):
    for _ in range(4):
        app.push()
        app.wait_and_check(PROJECTIONS, timeout=SOON)
        launcher = app.launcher()
        app.admin.execute("SELECT pg_terminate_backend(%s)", (launcher,))
        wait_until(lambda launcher=launcher: pids(app.admin, "lockstep launcher") not in ([], [launcher]), timeout=3)


def test_the_number_of_workers_is_kept_when_the_launcher_ends_while_they_work(app):
    log = Log(app.cluster)
    for projection in PROJECTIONS:
        app.handler(projection, NOTE + "PERFORM pg_advisory_xact_lock_shared(4711);")
    gate = app.db.connect()
    gate.execute("SELECT pg_advisory_lock(4711)")
    for tenant in "abcd":
        app.push(tenant)
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 4711"
    wait_until(lambda: app.admin.execute(waiting).fetchone()[0] == 2)
    launcher = app.launcher()
    app.admin.execute("SELECT pg_terminate_backend(%s)", (launcher,))
    wait_until(lambda: len(log.lines("launcher", "started")) == 1, SOON)
    assert len(app.workers()) == 2, "those that run are counted"
    gate.execute("SELECT pg_advisory_unlock(4711)")
    app.wait_and_check(PROJECTIONS, timeout=SOON)
    wait_until(lambda: len(app.status("worker")) <= 2)


def test_after_immediate_shutdowns_under_load_nothing_is_lost_or_doubled(app):
    with Load(app.db) as load:
        for _ in range(5):
            progress(app)
            app.cluster.stop("immediate")
            app.cluster.start()
            app.reconnect()
    check(app, load)


@pytest.mark.parametrize("mode", ["fast", "smart"])
def test_a_shutdown_ends_a_handler_that_sleeps_at_once(app, mode):
    let_a_handler_sleep(app)
    before = all_pids(app.admin)
    app.admin.close()
    for connection in app.db._connections:
        connection.close()
    begun = time.monotonic()
    app.cluster.stop(mode)
    assert time.monotonic() - begun < 5
    assert not any(os.path.exists(f"/proc/{pid}") for pid in before)
    app.cluster.start()
    app.reconnect()
    app.wait_and_check(PROJECTIONS, timeout=SOON)


def test_a_restart_under_load_loses_and_doubles_nothing(app):
    with Load(app.db) as load:
        for _ in range(3):
            progress(app)
            app.cluster.restart()
            app.reconnect()
    check(app, load)


def test_a_worker_whose_postmaster_is_killed_ends(app):
    let_a_handler_sleep(app)
    before = all_pids(app.admin)
    app.cluster.crash()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in before))
    app.cluster.start()
    app.reconnect()
    app.wait_and_check(PROJECTIONS, timeout=SOON)
