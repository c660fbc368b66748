"""Workers in the server: they start, follow the settings, show what they do, and stop."""

import pytest
from psycopg import sql
from server import wait_until
from sessions import call, push
from workers import NOTE, Log, all_pids, pids, sleeps

BLOCK = "PERFORM pg_advisory_xact_lock_shared(4711);"


@pytest.fixture
def gate(app):
    """A lock that handlers with BLOCK wait for, held; `gate.execute("SELECT pg_advisory_unlock(4711)")` opens it."""
    session = app.db.connect()
    session.execute("SELECT pg_advisory_lock(4711)")
    yield session
    session.close()


def open_gate(gate):
    gate.execute("SELECT pg_advisory_unlock(4711)")


def running(app):
    return app.admin.execute("SELECT count(*) FROM lockstep.worker_status WHERE state = 'running'").fetchone()[0]


def waiting_handlers(app):
    return app.admin.execute("SELECT count(*) FROM lockstep.worker_status WHERE wait_event_type = 'Lock'").fetchone()[0]


# Starting


@pytest.mark.parametrize("order", ["push first", "projection first", "workers last"])
def test_what_is_pushed_is_applied_with_no_client(app, order):
    if order != "workers last":
        app.turn_on()
        app.launcher()
    if order == "projection first":
        app.project()
        positions = [app.push() for _ in range(3)]
    else:
        positions = [app.push() for _ in range(3)]
        app.project()
    if order == "workers last":
        app.turn_on()
    app.wait_for(positions)
    assert app.admin.execute("SELECT DISTINCT pid FROM public.applied").fetchone()[0] in app.workers()


def test_a_handler_may_take_a_batch_as_an_array(app):
    body = "INSERT INTO public.applied (projection, tenant, position) SELECT TG, x.tenant, x.position FROM unnest(e) AS x;"
    app.project(body=body, argument="lockstep.events[]")
    app.turn_on()
    app.wait_for([app.push() for _ in range(5)])


def test_only_what_the_filter_lets_through_is_applied_and_the_cursor_goes_past_the_rest(app):
    app.turn_on()
    app.project(event_types=["wanted"])
    for number in range(20):
        last = app.push(event_type="wanted" if number % 5 == 0 else "other")
    wait_until(lambda: call(app.admin, "projection_wait", name="p", up_to=last)[0][0])
    assert len(app.applied()) == 4


def test_a_projection_without_a_handler_is_left_alone(app):
    app.turn_on()
    app.as_role("projection_create", name="q")
    app.project()
    app.wait_for([app.push() for _ in range(3)])
    assert app.admin.execute("SELECT count(*) FROM lockstep.projection_cursors WHERE projection = 'q'").fetchone()[0] == 0


def test_the_extension_may_be_created_in_a_database_whose_workers_are_on(app):
    app.admin.execute("DROP EXTENSION lockstep CASCADE")
    app.turn_on()
    app.launcher()
    app.admin.execute("CREATE EXTENSION lockstep")
    app.allow(app.owner)
    app.project()
    app.wait_for(app.push())


# lockstep.databases


def test_a_database_that_does_not_exist_yet_is_mentioned_once_and_served_when_it_does(worker_server, new_database):
    log, name, database = Log(worker_server), "later", None
    worker_server.conf(**{"lockstep.databases": name})
    try:
        log.wait_for(name, "does not exist")
        with worker_server.connect() as observer:
            (supervisor,) = pids(observer, "lockstep supervisor")
            looks = sleeps(supervisor)
            wait_until(lambda: sleeps(supervisor) >= looks + 3)
        assert len(log.lines(name, "does not exist")) == 1
        database = new_database(worker_server, name)
        with database.connect() as observer:
            wait_until(lambda: pids(observer, "lockstep launcher"))
        assert not log.lines("FATAL")
    finally:
        worker_server.conf(**{"lockstep.databases": ""})
        if database:
            database.drop()


def test_a_database_may_be_dropped_by_force_and_made_again(app, new_database):
    app.project()
    app.turn_on()
    app.wait_for(app.push())
    name, log = app.db.name, Log(app.cluster)
    with app.cluster.connect() as admin:
        for _ in range(2):
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
            log.wait_for(name, "does not exist")
            log = Log(app.cluster)
            app.db = new_database(app.cluster, name)
            app.reconnect()
            app.make_table()
            app.allow(app.owner)
            app.admin.execute(f"CREATE SCHEMA {app.owner} AUTHORIZATION {app.owner}")
            app.project()
            app.wait_for(app.push())


def test_databases_are_added_and_removed_by_a_reload(app, new_database):
    other = new_database(app.cluster, f"{app.db.name}_other")
    session = other.connect()

    def databases():
        rows = app.admin.execute("SELECT datname FROM pg_stat_activity WHERE backend_type = 'lockstep launcher'")
        return {name for (name,) in rows}

    app.project()
    app.turn_on()
    app.wait_for(app.push())
    try:
        app.cluster.conf(**{"lockstep.databases": f"{app.db.name}, {other.name}"})
        wait_until(lambda: databases() == {app.db.name, other.name})
        app.cluster.conf(**{"lockstep.databases": other.name})
        wait_until(lambda: databases() == {other.name} and not app.workers())
        assert app.state() is not None and app.status("pid") == []
        behind = app.push()
        app.cluster.conf(**{"lockstep.databases": app.db.name})
        wait_until(lambda: databases() == {app.db.name})
        app.wait_for([*app.applied()[:1], behind])
        assert session.execute("SELECT count(*) FROM lockstep.worker_status").fetchone()[0] == 0
    finally:
        app.turn_off()
        other.drop()


def test_a_database_that_is_removed_and_added_again_at_once_goes_on(app):
    app.project()
    app.turn_on()
    app.launcher()
    for _ in range(5):
        app.cluster.conf(**{"lockstep.databases": ""})
        app.cluster.conf(**{"lockstep.databases": app.db.name})
        position = app.push()
        wait_until(lambda: position in app.applied())
    app.check()


def test_a_launcher_that_is_told_to_stop_lets_a_running_batch_end_and_no_other_begin(app, gate):
    app.project(body="INSERT INTO public.applied (position) VALUES (1);" + BLOCK)
    app.turn_on(workers=1)
    app.push("a")
    pid = app.wait_for_handler()
    app.push("b")
    app.cluster.conf(**{"lockstep.databases": ""})
    wait_until(lambda: not pids(app.admin, "lockstep launcher"))
    assert app.workers() == [pid]
    open_gate(gate)
    wait_until(lambda: not app.workers())
    assert app.admin.execute("SELECT count(*) FROM public.applied").fetchone()[0] == 1


@pytest.mark.parametrize("name", ["Mixed Case", "with, comma", 'with "quotes"', "ä" * 31])
def test_names_of_databases_may_need_quotes(worker_server, new_database, name):
    other, database = new_database(worker_server, "plain"), new_database(worker_server, name)
    quoted = name.replace('"', '""')
    worker_server.conf(**{"lockstep.databases": f'plain, "{quoted}", plain'})
    try:
        for session in (database.connect(), other.connect()):
            wait_until(lambda session=session: len(pids(session, "lockstep launcher")) == 1)
    finally:
        worker_server.conf(**{"lockstep.databases": ""})
        database.drop()
        other.drop()


# lockstep.workers


def test_the_number_of_workers_follows_the_setting(app, gate):
    app.project(body=BLOCK + NOTE)
    app.turn_on(workers=2)
    for tenant in "abcdefgh":
        app.push(tenant)
    wait_until(lambda: waiting_handlers(app) == 2)
    assert len(app.workers()) == 2
    app.cluster.conf(**{"lockstep.workers": 5})
    wait_until(lambda: waiting_handlers(app) == 5)
    assert len(app.workers()) == 5 and running(app) == 5
    app.cluster.conf(**{"lockstep.workers": 1})
    open_gate(gate)
    app.wait_and_check()
    wait_until(lambda: len(app.workers()) == 1)
    app.cluster.conf(**{"lockstep.workers": 0})
    wait_until(lambda: not app.workers())
    app.push("i")
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 3)
    assert app.workers() == [] and len(app.applied()) == 8
    app.cluster.conf(**{"lockstep.workers": 1})
    app.wait_and_check()


def test_a_worker_that_has_more_to_do_ends_when_there_are_to_be_fewer(app):
    for projection in ("p", "q"):
        app.project(projection, body="PERFORM pg_sleep(0.01);" + NOTE, batch_size=1)
    session = app.db.connect()
    with session.transaction():
        for _ in range(1000):
            push(session)
    app.turn_on(workers=2)
    wait_until(lambda: len(app.applied("p")) > 10 and len(app.applied("q")) > 10)
    assert len(app.workers()) == 2
    app.cluster.conf(**{"lockstep.workers": 1})
    wait_until(lambda: len(app.workers()) == 1)
    assert len(app.applied("p")) < 1000 and len(app.applied("q")) < 1000


def test_where_no_process_can_be_had_the_log_says_so_once_and_work_goes_on_when_there_is_one(own_app):
    app = own_app(max_worker_processes=4)  # one is PostgreSQL's own: the logical replication launcher
    log = Log(app.cluster)
    app.project(body=BLOCK + NOTE)
    gate = app.db.connect()
    gate.execute("SELECT pg_advisory_lock(4711)")
    app.turn_on(workers=3)
    for tenant in "abc":
        app.push(tenant)
    app.wait_for_handler()
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 3)
    assert len(log.lines("max_worker_processes")) == 1
    assert len(app.workers()) == 1
    open_gate(gate)
    app.wait_and_check()


# What they show


def test_processes_show_themselves_in_pg_stat_activity(app, gate):
    app.project("orders", body=BLOCK)
    app.turn_on(workers=1)
    app.push("blue")
    pid = app.wait_for_handler()
    rows = app.admin.execute(
        """SELECT backend_type, datname, NULLIF(usename, 'postgres'), application_name FROM pg_stat_activity
           WHERE backend_type LIKE 'lockstep %' ORDER BY backend_type"""
    ).fetchall()
    database = app.db.name
    assert rows == [
        ("lockstep launcher", database, None, f"lockstep launcher {database}"),
        ("lockstep supervisor", None, None, "lockstep supervisor"),
        ("lockstep worker", database, app.owner, "lockstep worker 1"),
    ]
    state, query, event = app.admin.execute(
        "SELECT state, query, wait_event_type || '/' || wait_event FROM pg_stat_activity WHERE pid = %s", (pid,)
    ).fetchone()
    assert state == "active" and event == "Lock/advisory"
    assert "orders" in query and "blue" in query
    open_gate(gate)
    wait_until(lambda: app.state("orders", "blue") == "idle")

    def events():
        rows = app.admin.execute(
            """SELECT backend_type, wait_event_type, wait_event FROM pg_stat_activity
               WHERE backend_type LIKE 'lockstep %' ORDER BY backend_type"""
        ).fetchall()
        return [(kind, f"{type}/{event}") for kind, type, event in rows]

    named = app.admin.info.server_version >= 170000
    names = {kind: "Extension/Lockstep" + kind.split()[1].title() if named else "Extension/Extension" for kind, _ in events()}
    wait_until(lambda: events() == sorted(names.items()))
    state = app.admin.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()[0]
    assert state == "idle"


def test_worker_status_shows_what_a_worker_does_and_has_done(app, gate):
    app.project(body="IF e.event_type = 'bad' THEN RAISE 'no %', e.event_type; END IF;" + BLOCK, retry_after="1 minute")
    app.turn_on(workers=1)
    app.push("blue")
    pid = app.wait_for_handler()
    columns = "worker, pid, owner, state, projection, tenant, batches, events, errors, last_error, restarts"
    assert app.status(columns) == [(1, pid, app.owner, "running", "p", "blue", 0, 0, 0, None, 0)]
    assert app.status("batch_age BETWEEN '0' AND '1 minute'", "started_at < clock_timestamp()") == [(True, True)]
    assert app.status("wait_event_type", "wait_event") == [("Lock", "advisory")]
    assert app.state(tenant="blue") == "running"

    open_gate(gate)
    wait_until(lambda: app.status("state") == [("idle",)])
    assert app.status(columns) == [(1, pid, app.owner, "idle", None, None, 1, 1, 0, None, 0)]
    assert app.status("batch_age", "events_per_second > 0") == [(None, True)]

    for _ in range(4):
        app.push("red")
    wait_until(lambda: app.status("events") == [(5,)])
    app.push("red", event_type="bad")
    wait_until(lambda: app.status("errors", "last_error") == [(1, "no bad")])
    assert app.status("last_error_at BETWEEN started_at AND clock_timestamp()", "events") == [(True, 5)]
    assert app.state(tenant="red") == "backoff"

    app.admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
    wait_until(lambda: app.workers() != [pid])
    app.push("blue")
    wait_until(lambda: app.status("events") == [(6,)])
    assert app.status("errors", "last_error", "restarts") == [(1, "no bad", 1)]


def test_worker_status_of_another_database_is_not_shown(app, gate, new_database):
    other = new_database(app.cluster, f"{app.db.name}_other")
    app.project(body=BLOCK)
    app.turn_on()
    app.push()
    app.wait_for_handler()
    assert other.connect().execute("SELECT count(*) FROM lockstep.worker_status").fetchone()[0] == 0
    assert len(app.status("worker")) == 1
    open_gate(gate)
    other.drop()


def test_the_log_tells_of_start_stop_crash_and_first_failure_and_of_no_repetition(app):
    log = Log(app.cluster)
    app.project(body="IF e.event_type = 'bad' THEN RAISE 'no good'; END IF;", retry_after="10 ms", max_failures=4)
    app.turn_on(workers=1)
    log.wait_for("launcher", app.db.name, "started")
    app.push()
    log.wait_for("worker 1 started", app.owner)
    app.admin.execute("SELECT pg_terminate_backend(%s)", (app.worker(),))
    log.wait_for("worker ended")
    position = app.push(event_type="bad")
    wait_until(lambda: app.failures("skipped_at IS NOT NULL") == [(True,)])
    assert len(log.lines(f"position {position} failed 1 of 4 times")) == 1
    assert len(log.lines(f"position {position} failed 4 of 4 times", "skipped")) == 1
    assert len(log.lines(f"position {position} failed")) == 2
    app.cluster.conf(**{"lockstep.databases": ""})
    log.wait_for("worker 1", "stopped")
    log.wait_for("launcher", app.db.name, "stopped")


# Interference


def test_a_cancelled_batch_is_tried_again_and_no_event_is_blamed(app, gate):
    app.project(body=NOTE + BLOCK)
    app.turn_on(workers=1)
    position = app.push()
    pid = app.wait_for_handler()
    app.admin.execute("SELECT pg_cancel_backend(%s)", (pid,))
    wait_until(lambda: app.status("errors") == [(1,)])
    open_gate(gate)
    app.wait_for(position)
    assert app.workers() == [pid], "a cancel ends no process"
    assert app.failures() == []


def test_a_cancel_of_an_idle_process_does_nothing(app):
    app.project()
    app.turn_on(workers=1)
    positions = [app.push()]
    app.wait_for(positions)
    before = all_pids(app.admin)
    assert len(before) == 3
    for pid in before:
        looks = sleeps(pid)
        app.admin.execute("SELECT pg_cancel_backend(%s)", (pid,))
        wait_until(lambda: sleeps(pid) > looks)
    positions.append(app.push())
    app.wait_for(positions)
    assert all_pids(app.admin) == before


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "search_path = nowhere",
        "lockstep.poll_interval = '60s'",
        "IntervalStyle = 'sql_standard'",
        "client_min_messages = 'error'",
    ],
)
def test_defaults_of_the_database_and_the_role_stop_no_worker(app, setting):
    app.admin.execute(f"ALTER DATABASE {app.db.name} SET {setting}")
    app.admin.execute(f"ALTER ROLE {app.owner} SET {setting}")
    app.project()
    app.turn_on(workers=1)
    session = app.cluster.connect(app.db.name, options="-c default_transaction_read_only=off -c statement_timeout=0")
    position = push(session)
    wait_until(lambda: app.applied() == [position])


def test_what_a_handler_leaves_in_its_session_does_not_reach_the_next_batch(app):
    app.project(
        "leaves",
        body="SET search_path = nowhere; SET work_mem = '3MB'; SET default_transaction_isolation = 'serializable';"
        "SET default_transaction_read_only = on; PERFORM pg_advisory_lock(4712);",
    )
    app.turn_on(workers=1)
    app.push()
    wait_until(lambda: app.state("leaves") == "idle" and app.status("events") == [(1,)])
    app.project(
        body="""IF current_setting('work_mem') <> '4MB' OR current_setting('search_path') = 'nowhere'
                   OR EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4712)
                THEN RAISE 'something was left'; END IF;"""
        + NOTE
    )
    app.wait_for([1])
    position = app.push("other")
    wait_until(lambda: position in app.applied())
    assert app.failures() == []


def test_a_handler_may_push_and_what_it_pushes_is_applied(app):
    app.admin.execute(f"GRANT EXECUTE ON FUNCTION lockstep.push_event TO {app.owner}")
    app.project(
        "first", body="PERFORM lockstep.push_event('reaction', e.position::text, 'reacted');", aggregate_types=["order"]
    )
    app.project("second", aggregate_types=["reaction"])
    app.turn_on(workers=2)
    for _ in range(20):
        app.push()
    wait_until(lambda: len(app.applied("second")) == 20)


def test_a_paused_projection_is_not_run_until_it_is_resumed(app):
    app.project()
    app.turn_on()
    first = app.push()
    app.wait_for(first)
    app.as_role("projection_pause", name="p")
    second = app.push()
    app.project("q")
    app.wait_for([first, second], "q")
    assert app.applied() == [first] and app.state() == "paused"
    app.as_role("projection_resume", name="p")
    app.wait_for([first, second])


def test_many_tenants_and_long_names_are_all_served(app):
    tenants = [f"{n:03}" + "ä" * 300 for n in range(60)]  # more than fits into the box of names
    app.project("q" * 60)
    app.turn_on()
    session = app.db.connect()
    with session.transaction():
        for tenant in tenants:
            push(session, tenant=tenant)
    app.wait_and_check(["q" * 60])


def test_workers_keep_to_the_limit_of_claims(app, gate):
    app.admin.execute(f"ALTER DATABASE {app.db.name} SET lockstep.max_parallel_claims = 2")
    app.project(body=BLOCK + NOTE)
    app.turn_on(workers=4)
    session = app.db.connect()
    for n in range(8):
        push(session, tenant=str(n))
    wait_until(lambda: waiting_handlers(app) == 2)
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 10)
    assert waiting_handlers(app) == 2
    open_gate(gate)
    app.wait_and_check()


def test_a_handler_that_ends_its_own_process_delays_nobody_else(app):
    log = Log(app.cluster)
    app.project("suicidal", body="PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(10);")
    app.project()
    app.turn_on(workers=1)
    positions = []
    for _ in range(5):
        positions.append(app.push())
        app.wait_for(positions)
    log.wait_for("ended while it ran projection \"suicidal\"")
    assert app.applied("suicidal") == []
    app.as_role("projection_drop", name="suicidal")
    positions.append(app.push())
    app.wait_for(positions)
