"""As whom a worker runs a handler: as the projection's owner, connected as that role, and as nobody else whatever happens."""

import pytest
from server import wait_for_lock_wait, wait_until
from sessions import push, start
from workers import NOTE, Log, pids, sleeps

ESCAPES = [
    "SET ROLE postgres",
    "SET LOCAL ROLE postgres",
    "RESET ROLE",
    "SET ROLE NONE",
    "SET SESSION AUTHORIZATION postgres",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET SESSION AUTHORIZATION",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "DISCARD ALL",
]


def wait_for_looks(app, count=3):
    """Until the launcher has looked as often again."""
    pid = app.launcher()
    looks = sleeps(pid)
    wait_until(lambda: sleeps(pid) >= looks + count)


def who(app):
    return app.admin.execute("SELECT DISTINCT who, session FROM public.applied").fetchall()


def test_a_handler_runs_as_the_owner_who_is_the_session_user_too(app):
    app.project()
    app.turn_on()
    app.wait_for(app.push())
    assert who(app) == [(app.owner, app.owner)]


def test_a_handler_may_do_no_more_than_the_owner(app):
    app.admin.execute("CREATE TABLE public.secret (n int)")
    app.project(body="PERFORM FROM public.secret;" + NOTE, max_failures=1)
    app.turn_on()
    position = app.push()
    wait_until(app.failures)
    assert app.failures() == [(position, 1, "42501")]
    app.admin.execute(f"GRANT SELECT ON public.secret TO {app.owner}")
    position = app.push()
    app.wait_for(position)


@pytest.mark.parametrize("table", ["events", "failed_events", "projection_cursors", "projections"])
def test_a_handler_cannot_write_the_extensions_tables(app, table):
    app.project(body=f"DELETE FROM lockstep.{table};", max_failures=1)
    app.turn_on()
    position = app.push()
    wait_until(app.failures)
    assert app.failures() == [(position, 1, "42501")]


@pytest.mark.parametrize("statement", ESCAPES)
def test_a_handler_cannot_become_somebody_else(app, statement):
    app.project(body=f"EXECUTE '{statement}';" + NOTE, max_failures=1)
    app.project("q")
    app.turn_on(workers=1)
    app.push()
    wait_until(lambda: app.applied("q") and (app.applied("p") or app.failures()))
    app.push()
    wait_until(lambda: len(app.applied("q")) == 2)
    assert who(app) == [(app.owner, app.owner)]
    assert {sqlstate for (sqlstate,) in app.failures("sqlstate")} <= {"42501", "25001"}
    if "postgres" in statement or "SUPERUSER" in statement:
        assert app.failures() != []


def test_a_superusers_projection_is_not_run_and_its_state_says_so(app):
    app.project(role=app.owner)
    app.admin.execute(f"ALTER ROLE {app.owner} SUPERUSER")
    app.turn_on()
    app.push()
    wait_until(lambda: app.state() == "refused_superuser")
    wait_for_looks(app)
    assert app.workers() == [] and app.applied() == []
    app.admin.execute(f"ALTER ROLE {app.owner} NOSUPERUSER")
    app.wait_and_check()
    assert app.state() == "idle"


def test_an_owner_who_becomes_a_superuser_is_refused_by_the_worker_that_runs_as_him(app):
    app.project()
    app.turn_on(workers=1)
    app.wait_for(app.push())
    app.admin.execute(f"ALTER ROLE {app.owner} SUPERUSER")
    app.push()
    wait_for_looks(app)
    assert len(app.applied()) == 1 and app.state() == "refused_superuser"


def test_a_projection_whose_owner_is_gone_is_not_run_and_its_state_says_so(app):
    other = app.role("other")
    app.project("gone", role=other)
    app.project()
    app.turn_on()
    first = app.push()
    app.wait_for(first, "gone")
    app.wait_for(first)
    with app.admin.transaction():
        app.admin.execute(f"REASSIGN OWNED BY {other} TO {app.owner}")
        app.admin.execute(f"DROP OWNED BY {other}")
        app.admin.execute(f"DROP ROLE {other}")
    second = app.push()
    app.wait_for([first, second])
    wait_for_looks(app)
    assert app.state("gone") == "refused_role_missing"
    assert app.applied("gone") == [first]
    app.admin.execute("SELECT lockstep.projection_owner('gone', %s::regrole)", (app.owner,))
    app.wait_for([first, second], "gone")


def test_a_new_role_of_the_name_of_one_that_is_gone_is_another_role_to_a_worker(app):
    other = app.role("other")
    app.project(role=other)
    app.turn_on(workers=1)
    app.wait_for(app.push())
    old = app.worker()
    with app.admin.transaction():
        app.admin.execute(f"REASSIGN OWNED BY {other} TO {app.owner}")
        app.admin.execute(f"DROP OWNED BY {other}")
        app.admin.execute(f"DROP ROLE {other}")
    app.admin.execute(f"CREATE ROLE {other} LOGIN")
    app.allow(other)
    app.admin.execute(f"GRANT USAGE ON SCHEMA {other} TO {other}")
    app.push()
    wait_until(lambda: len(app.applied()) == 2)
    assert app.workers() != [old]
    assert app.failures() == []


def test_an_owner_who_may_not_log_in_is_served_where_postgresql_can(app):
    other = app.role("other", "NOLOGIN")
    app.project("q", role=other)
    app.project()
    app.turn_on()
    position = app.push()
    app.wait_for(position)
    if app.admin.info.server_version >= 170000:
        app.wait_for(position, "q")
    else:
        wait_until(lambda: app.state("q") == "refused_role_nologin")
        app.admin.execute(f"ALTER ROLE {other} LOGIN")
        app.wait_for(position, "q")


def test_an_owner_who_may_not_connect_holds_up_nobody_and_floods_no_log(app):
    other = app.role("other")
    app.admin.execute(f"REVOKE CONNECT ON DATABASE {app.db.name} FROM PUBLIC")
    app.admin.execute(f"GRANT CONNECT ON DATABASE {app.db.name} TO {app.owner}")
    app.project("q", role=other)
    app.project()
    log = Log(app.cluster)
    app.turn_on(workers=1)
    positions = [app.push()]
    wait_until(lambda: app.state("q") == "refused_role_connect")
    for _ in range(20):
        positions.append(app.push())
        app.wait_for(positions)
    wait_for_looks(app, 4)
    assert log.lines("permission denied") == []
    assert app.applied("q") == []
    app.admin.execute(f"GRANT CONNECT ON DATABASE {app.db.name} TO {other}")
    app.wait_for(positions, "q")


def test_a_deferred_trigger_that_a_handler_sets_fires_as_the_owner(app):
    app.admin.execute(
        f"""
        CREATE TABLE public.deferring (id numeric);
        GRANT INSERT ON public.deferring TO PUBLIC;
        CREATE FUNCTION public.fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.applied (projection, tenant, position) VALUES ('fired', '', NEW.id);
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER fire AFTER INSERT ON public.deferring DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION public.fire();
        """
    )
    app.project(body="INSERT INTO public.deferring VALUES (e.position);")
    app.turn_on()
    positions = [app.push() for _ in range(5)]
    app.wait_for(positions, "fired")
    assert who(app) == [(app.owner, app.owner)]


DEFERRED = {
    "unique": (
        "CREATE TABLE public.kept (id text, CONSTRAINT once UNIQUE (id) DEFERRABLE INITIALLY DEFERRED)",
        "23505",
    ),
    "trigger": (
        """
        CREATE TABLE public.kept (id text);
        CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.id = 'taken' AND (SELECT count(*) FROM public.kept WHERE id = 'taken') > 1 THEN
                RAISE 'is taken' USING ERRCODE = '23505';
            END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON public.kept DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION public.refuse()
        """,
        "23505",
    ),
}


@pytest.mark.parametrize("argument", ["lockstep.events", "lockstep.events[]"])
@pytest.mark.parametrize("kind", DEFERRED)
def test_an_event_that_breaks_a_deferred_constraint_is_counted_retried_and_skipped_and_all_others_applied(app, kind, argument):
    table, sqlstate = DEFERRED[kind]
    app.admin.execute(table)
    app.admin.execute("GRANT SELECT, INSERT ON public.kept TO PUBLIC")
    row = "SELECT x.* FROM unnest(e) AS x" if argument.endswith("[]") else "SELECT (e).*"
    app.project(
        body=f"""INSERT INTO public.kept SELECT CASE x.event_type WHEN 'bad' THEN 'taken' ELSE x.position::text END FROM ({row}) AS x;
                 INSERT INTO public.applied (projection, tenant, position) SELECT TG, x.tenant, x.position FROM ({row}) AS x;""",
        argument=argument,
        max_failures=3,
        retry_after="20 ms",
    )
    app.admin.execute("INSERT INTO public.kept VALUES ('taken')")
    session = app.db.connect()
    with session.transaction():
        positions = [push(session, event_type="bad" if n in (7, 12) else "good") for n in range(20)]
    app.turn_on(workers=1)
    bad = [positions[7], positions[12]]
    app.wait_for([position for position in positions if position not in bad])
    assert app.failures("position, failures, sqlstate, skipped_at IS NOT NULL") == [(p, 3, sqlstate, True) for p in bad]
    app.push()
    wait_until(lambda: len(app.applied()) == 19)


def test_a_batch_that_breaks_nothing_but_in_the_middle_is_applied_as_a_whole(app):
    """A deferred constraint that holds again at the batch's end is no failure."""
    app.admin.execute(
        """
        CREATE TABLE public.pairs (id text, CONSTRAINT once UNIQUE (id) DEFERRABLE INITIALLY DEFERRED);
        GRANT SELECT, INSERT, DELETE ON public.pairs TO PUBLIC;
        """
    )
    app.project(
        body="IF e.event_type = 'remove' THEN DELETE FROM public.pairs WHERE ctid = (SELECT max(ctid) FROM public.pairs);"
        "ELSE INSERT INTO public.pairs VALUES ('same'); END IF;" + NOTE
    )
    session = app.db.connect()
    with session.transaction():
        positions = [push(session, event_type=what) for what in ("add", "add", "remove")]
    app.turn_on(workers=1)
    app.wait_for(positions)
    assert app.failures() == []


def test_a_projection_that_is_given_away_while_it_is_queued_runs_as_its_new_owner(app):
    other = app.role("other")
    app.admin.execute(f"GRANT USAGE ON SCHEMA {app.owner} TO {other}")
    app.project("blocks", body="PERFORM pg_advisory_xact_lock_shared(4711);")
    gate = app.db.connect()
    gate.execute("SELECT pg_advisory_lock(4711)")
    app.turn_on(workers=1)
    app.push("blocked")
    app.wait_for_handler()
    app.project()
    positions = [app.push("queued") for _ in range(3)]
    wait_for_looks(app)
    app.admin.execute("SELECT lockstep.projection_owner('p', %s::regrole)", (other,))
    gate.execute("SELECT pg_advisory_unlock(4711)")
    app.wait_for(positions, tenant="queued")
    assert who(app) == [(other, other)]


def test_a_projection_that_is_given_away_when_a_worker_was_told_to_run_it_runs_as_its_new_owner(app):
    other = app.role("other")
    app.admin.execute(f"GRANT USAGE ON SCHEMA {app.owner} TO {other}")
    app.project(body=NOTE + "PERFORM pg_advisory_xact_lock_shared(4711);")
    gate, stopper = app.db.connect(), app.db.connect()
    gate.execute("SELECT pg_advisory_lock(4711)")
    app.turn_on(workers=1)
    app.push("first")
    app.wait_for_handler()
    app.push("second")
    wait_for_looks(app)
    # A claim reads this table, the end of a batch does not.
    stopper.execute("BEGIN")
    locked = start(stopper.execute, "LOCK TABLE lockstep.projection_pauses")
    wait_for_lock_wait(app.admin, stopper.info.backend_pid)
    gate.execute("SELECT pg_advisory_unlock(4711)")
    locked.result(30)
    stopped = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'lockstep.projection_pauses'::regclass"
    wait_until(lambda: app.applied() and app.admin.execute(stopped).fetchone())
    app.admin.execute("SELECT lockstep.projection_owner('p', %s::regrole)", (other,))
    stopper.execute("COMMIT")
    wait_until(lambda: len(app.applied()) == 2)
    rows = app.admin.execute("SELECT tenant, who, session FROM public.applied ORDER BY nth").fetchall()
    assert rows == [("first", app.owner, app.owner), ("second", other, other)]


def test_a_projection_that_changes_hands_under_load_runs_as_its_owners_and_loses_nothing(app):
    other = app.role("other")
    app.admin.execute(f"GRANT USAGE ON SCHEMA {app.owner} TO {other}")
    app.project()
    app.turn_on(workers=2)
    for n in range(120):
        app.push(str(n % 10))
        app.admin.execute("SELECT lockstep.projection_owner('p', %s::regrole)", ((app.owner, other)[n // 2 % 2],))
    app.wait_and_check()
    assert set(who(app)) <= {(app.owner, app.owner), (other, other)}
    app.admin.execute("DELETE FROM public.applied")
    app.admin.execute("SELECT lockstep.projection_owner('p', %s::regrole)", (other,))
    app.wait_for([app.push("later")], tenant="later")
    assert who(app) == [(other, other)]
    assert app.failures() == []


def test_a_handler_that_is_gone_stops_its_projection_alone_until_it_is_back(app):
    app.project("q")
    app.project()
    app.turn_on()
    first = app.push()
    app.wait_for(first, "q")
    log = Log(app.cluster)
    app.admin.execute(f"DROP FUNCTION {app.owner}.q(lockstep.events)")
    second = app.push()
    app.wait_for([first, second])
    wait_until(lambda: any(error == "its handler does not exist" for (error,) in app.status("last_error")))
    wait_for_looks(app)
    assert app.applied("q") == [first] and app.failures() == []
    assert len(log.lines("handler")) < 10
    app.handler("q")
    app.wait_for([first, second], "q")


def test_a_handler_that_is_replaced_is_the_new_one_from_the_next_batch_on(app):
    app.project(body="RAISE 'old';", retry_after="20 ms", max_failures=1000)
    app.turn_on()
    position = app.push()
    wait_until(app.failures)
    app.handler("p")
    app.wait_for(position)
    app.handler("p2")
    app.as_role("projection_alter", name="p", handler=f"{app.owner}.p2(lockstep.events)")
    position = app.push()
    app.wait_for(position, "p2")


def test_a_handler_that_its_owner_may_not_call_stops_its_projection_alone(app):
    app.project("q")
    app.project()
    app.admin.execute(f"ALTER FUNCTION {app.owner}.q(lockstep.events) OWNER TO postgres")
    app.admin.execute(f"REVOKE EXECUTE ON FUNCTION {app.owner}.q(lockstep.events) FROM PUBLIC")
    app.turn_on()
    position = app.push()
    app.wait_for(position)
    wait_until(lambda: sum(errors for (errors,) in app.status("errors")) > 0)
    assert app.applied("q") == [] and app.failures() == []
    app.admin.execute(f"GRANT EXECUTE ON FUNCTION {app.owner}.q(lockstep.events) TO PUBLIC")
    app.wait_for(position, "q")


def test_with_one_worker_several_owners_are_served_in_turns(app):
    owners = [app.role(f"owner{n}") for n in range(4)]
    names = [app.project(f"p{n}", role=owner) for n, owner in enumerate(owners)]
    for n in range(40):
        app.push(str(n))
    app.turn_on(workers=1)
    app.wait_and_check(names)
    assert len(app.workers()) == 1
    positions = app.push("later")
    app.wait_and_check(names)
    assert {owner for (owner, _) in who(app)} == set(owners)
    assert positions in app.applied("p0")


def test_an_owner_with_much_work_does_not_keep_the_only_worker_from_another(app):
    other = app.role("other")
    app.project(body="PERFORM pg_sleep(0.02);" + NOTE, batch_size=5)
    app.project("q", role=other)
    app.turn_on(workers=1)
    for n in range(200):
        app.push("busy")
    wait_until(app.applied)
    for n in range(3):
        position = app.push("single")
        wait_until(lambda position=position: position in app.applied("q", "single"), timeout=5)
        assert len(app.applied(tenant="busy")) < 200, "the other had more to do all the time"


def test_a_worker_runs_the_projections_of_its_database_only(app, new_database):
    other = new_database(app.cluster, f"{app.db.name}_other")
    session = other.connect()
    app.project()
    session.execute("SELECT lockstep.projection_create('p')")
    app.turn_on()
    push(session)
    app.wait_for(app.push())
    assert session.execute("SELECT count(*) FROM lockstep.projection_cursors").fetchone() == (0,)
    assert pids(session, "lockstep worker") == []
    other.drop()
