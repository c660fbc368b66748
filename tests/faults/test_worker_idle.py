"""What workers cost when there is nothing to do, and what the server's own book-keeping learns of them."""

import time

import pytest
from server import wait_until
from sessions import call, push
from workers import Log, all_pids, pids, sleeps

SECONDS = 5
QUIET = {"wal_level": "minimal", "max_wal_senders": 0, "autovacuum": "off", "checkpoint_timeout": "1h"}


@pytest.fixture
def app(own_app):
    """Nothing else in this server writes WAL by itself."""
    app = own_app(**QUIET)
    for n in range(3):
        app.project(f"p{n}")
    app.project("filtered", event_types=["none"])
    app.project("failing", body="RAISE 'never';", retry_after="4 minutes")
    app.admin.execute("SELECT lockstep.projection_create('no_handler')")
    app.turn_on(workers=3)
    for n in range(50):
        app.push(str(n % 10))
    wait_until(lambda: all(len(app.applied(f"p{n}")) == 50 for n in range(3)))
    wait_until(lambda: all(app.state("filtered", str(n)) == "idle" for n in range(10)))
    wait_until(lambda: len(app.failures()) == 10)
    wait_until(lambda: {state for (state,) in app.status("state")} == {"idle"})
    return app


def measure(app):
    """(transaction id, WAL position, sleeps of our processes, seconds of CPU time of our processes)"""
    xid, wal = app.admin.execute(
        "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_wal_insert_lsn() - '0/0'"
    ).fetchone()
    processes = all_pids(app.admin)
    return xid, wal, {pid: sleeps(pid) for pid in processes}, sum(cpu(pid) for pid in processes)


def cpu(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_an_idle_server_does_nothing_measurable(app):
    # Looks after the last commit may set hint bits, which can write a page's image once.
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 3)
    log, before = Log(app.cluster), measure(app)
    time.sleep(SECONDS)  # what is measured is that nothing happens meanwhile
    after = measure(app)
    assert after[0] == before[0], "transaction ids were assigned"
    assert after[1] == before[1], "WAL was written"
    assert after[2].keys() == before[2].keys(), "processes came or went"
    wakeups = {pid: (after[2][pid] - before[2][pid]) / SECONDS for pid in after[2]}
    print(wakeups, after[3] - before[3])
    assert sum(wakeups.values()) <= 3
    for pid in [app.supervisor(), *app.workers()]:
        assert wakeups[pid] <= 0.2
    assert after[3] - before[3] <= 0.02 * SECONDS
    assert log.lines() == []


def test_a_wait_for_a_database_that_is_not_there_writes_nothing(app):
    app.cluster.conf(**{"lockstep.databases": f"{app.db.name}, nowhere"})
    supervisor = app.supervisor()
    looks = sleeps(supervisor)
    wait_until(lambda: sleeps(supervisor) >= looks + 2)
    log, before = Log(app.cluster), measure(app)
    looks = sleeps(supervisor)
    wait_until(lambda: sleeps(supervisor) >= looks + 3)
    after = measure(app)
    assert after[:2] == before[:2]
    assert log.lines() == []


def test_what_wakes_the_launcher_for_nothing_writes_nothing(app):
    """Pushes that are rolled back: the launcher looks, and no worker is bothered."""
    batches = app.admin.execute("SELECT sum(batches) FROM lockstep.worker_status").fetchone()
    session = app.db.connect()
    for n in range(20):
        with session.transaction(force_rollback=True):
            push(session, tenant=str(n % 10))
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 2)
    assert app.admin.execute("SELECT sum(batches) FROM lockstep.worker_status").fetchone() == batches


def test_nobody_holds_back_vacuum_while_idle(app):
    rows = app.admin.execute(
        "SELECT backend_xid, backend_xmin, xact_start FROM pg_stat_activity WHERE backend_type LIKE 'lockstep %'"
    )
    assert len(pids(app.admin, "lockstep worker")) >= 1
    assert set(rows.fetchall()) == {(None, None, None)}


def test_rows_that_a_handler_writes_are_in_the_statistics_that_autovacuum_goes_by(app):
    query = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'applied'"
    wait_until(lambda: app.admin.execute(query).fetchone() == (150,), timeout=3)
    app.push()
    wait_until(lambda: app.admin.execute(query).fetchone() == (153,), timeout=3)
    calls = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    assert app.admin.execute(calls).fetchone()[0] > 0


def test_a_busy_worker_reports_its_rows_while_it_is_busy(app):
    """It need not become idle first."""
    app.project("slow", body="PERFORM pg_sleep(0.1); INSERT INTO public.applied (projection) VALUES ('slow');", batch_size=5)
    before = app.admin.execute("SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'applied'").fetchone()[0]
    query = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'applied'"
    wait_until(lambda: app.admin.execute(query).fetchone()[0] > before, timeout=10)
    assert app.admin.execute("SELECT count(*) FROM public.applied WHERE projection = 'slow'").fetchone()[0] < 50


@pytest.mark.parametrize("tenants", [2000])
def test_many_tenants_cost_an_idle_server_little(own_app, tenants):
    app = own_app(**QUIET)
    app.project()
    app.project("q")
    session = app.db.connect()
    with session.transaction():
        for n in range(tenants):
            push(session, tenant=str(n))
    app.turn_on()
    app.wait_and_check(("p", "q"))
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 2)
    before = cpu(app.launcher())
    time.sleep(SECONDS)  # what is measured is a rate
    used = (cpu(app.launcher()) - before) / SECONDS
    print(f"{used:.3f} of a processor")
    assert used < 0.05


def memory(pid):
    """Kilobytes that are the process's own."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


@pytest.mark.parametrize("kind", ["good", "fails", "fails at commit"])
def test_launcher_and_worker_do_not_grow(own_app, kind):
    app = own_app(**QUIET)
    app.admin.execute("CREATE TABLE public.kept (id text CONSTRAINT once UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    app.admin.execute("GRANT INSERT ON public.kept TO PUBLIC; INSERT INTO public.kept VALUES ('taken')")
    body = {"good": "", "fails": "RAISE 'never';", "fails at commit": "INSERT INTO public.kept VALUES ('taken');"}[kind]
    app.project(body=body, max_failures=1)
    app.turn_on(workers=1)

    def push_some(count):
        for n in range(count):
            last = app.push(str(n % 7))
        assert call(app.admin, "projection_wait", name="p", up_to=last, timeout="60 s", tenant=str((count - 1) % 7)) == [(True,)]

    push_some(300)
    wait_until(app.workers)
    before = {pid: memory(pid) for pid in (app.launcher(), app.worker())}
    push_some(1500)
    grown = {pid: memory(pid) - before[pid] for pid in (app.launcher(), app.worker())}
    print(grown)
    assert max(grown.values()) < 600
