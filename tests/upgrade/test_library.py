"""The library on SQL objects of another version: it works, or says 55000 and what to do."""

import psycopg
import pytest
from faults.test_arguments import FUNCTIONS, VALID
from server import wait_until
from sessions import advance, call, claim, push, raises, start
from workers import Log

# They look at shared memory or at their own session; the locks and registry_follow need a table only when there is something to do.
NEED_NO_TABLE = {
    "lease_locks",
    "projection_claim_state",
    "projection_locks",
    "registry_follow",
    "schema_version",
    "workers",
    "workers_are_on",
}
# What these say that find nothing in their own session.
REFUSALS = {"lease_guard_trigger": "LS003", "projection_advance": "LS002", "projection_fail": "LS002"}

UPDATE, CONNECT = "ALTER EXTENSION lockstep UPDATE", "Connect again"


def make(session, version):
    session.execute(
        f"""CREATE OR REPLACE FUNCTION lockstep.schema_version() RETURNS integer LANGUAGE sql STABLE PARALLEL SAFE
            SECURITY DEFINER SET search_path = pg_catalog, lockstep, pg_temp AS 'SELECT {version}'"""
    )


def works_with(session):
    return session.execute("SELECT lockstep.schema_version()").fetchone()[0]


def calls(session):
    """A call of every function, with arguments that mean something, by its name."""
    for name, types, names, _, kind in session.execute(FUNCTIONS).fetchall():
        valid = {n: "NULL" if kind == "p" and n == "token" else VALID.get(n, "NULL") for n in names or []}  # CALL takes no subquery
        arguments = ", ".join(f"{n} => {valid[n]}::{t}" for n, t in zip(names or [], types))
        if kind == "t":
            yield name, "INSERT INTO guarded VALUES (1)"
        elif kind == "p":
            yield name, f"CALL lockstep.{name}({arguments})"
        else:
            yield name, f"SELECT * FROM lockstep.{name}({arguments})"


@pytest.fixture
def session(db):
    session = db.connect()
    session.execute(
        """
        CREATE FUNCTION public.handle(lockstep.events) RETURNS void LANGUAGE sql BEGIN ATOMIC SELECT; END;
        CREATE TABLE public.guarded (n int);
        CREATE TRIGGER t BEFORE INSERT ON public.guarded EXECUTE FUNCTION lockstep.lease_guard_trigger('l');
        """
    )
    push(session, "one")
    return session


@pytest.mark.parametrize("version, hint", [(0, UPDATE), (99, CONNECT)], ids=["older", "newer"])
def test_every_function_says_what_to_do_on_objects_of_another_version(session, version, hint):
    expected = works_with(session)
    make(session, version)
    served, wrong = set(), []
    for name, statement in calls(session):
        try:
            session.execute(statement)
            served.add(name)
        except psycopg.Error as error:
            diag = error.diag
            if diag.sqlstate == REFUSALS.get(name):
                continue
            detail = f"Actual version {version}, expected {expected}."
            if diag.sqlstate != "55000" or not diag.message_hint.startswith(hint) or diag.message_detail != detail:
                wrong.append(f"{statement}: {diag.sqlstate} {error}")
    assert wrong == []
    assert served == NEED_NO_TABLE
    make(session, expected)
    push(session, "one", expected_sequence=1)


def test_the_views_work_or_say_what_to_do_on_objects_of_another_version(session):
    make(session, 0)
    views = session.execute("SELECT relname FROM pg_class WHERE relnamespace = 'lockstep'::regnamespace AND relkind = 'v'")
    for (view,) in views.fetchall():
        try:
            session.execute(f"SELECT * FROM lockstep.{view}")
        except psycopg.Error as error:
            assert (error.diag.sqlstate, error.diag.message_hint) == ("55000", UPDATE)


def test_an_older_version_works_or_says_to_update(db, older):
    """Every function of it, with NULL for each argument: none is missing in the library, and none fails in another way."""
    session = db.connect()
    session.execute(f"DROP EXTENSION lockstep; CREATE EXTENSION lockstep VERSION '{older}'")
    for name, types, _, _, kind in session.execute(FUNCTIONS).fetchall():
        arguments = ", ".join(f"NULL::{type_}" for type_ in types)
        if kind == "t":
            continue
        try:
            session.execute(f"{'CALL' if kind == 'p' else 'SELECT * FROM'} lockstep.{name}({arguments})")
        except psycopg.Error as error:
            diag = error.diag
            assert diag.sqlstate == "22004" or (diag.sqlstate, diag.message_hint) == ("55000", UPDATE), f"{name}: {error}"


def test_a_session_sees_what_another_commits(db, session):
    """The version is read once and then kept, until it changes; a prepared statement asks too."""
    other = db.connect()
    statement = "SELECT lockstep.push_event('order', 'two', 'added')"
    expected = works_with(session)
    for _ in range(3):
        session.execute(statement, prepare=True)
        with other.transaction():
            make(other, 0)
            session.execute(statement, prepare=True)
        with raises("55000"):
            session.execute(statement, prepare=True)
        with raises("55000"):
            session.execute(statement, prepare=True)
        make(other, expected)
        session.execute(statement, prepare=True)


def test_a_transaction_that_is_open_sees_what_another_commits(db, session):
    other = db.connect()
    expected = works_with(other)
    call(session, "projection_create", name="p")
    with raises("55000"), session.transaction():
        assert claim(session)
        make(other, 0)
        advance(session)
    make(other, expected)
    with session.transaction():
        assert claim(session)
        advance(session)
    # What is prepared and reads no table itself takes notice of nothing: the library has to.
    statement = "SELECT lockstep.push_event('order', 'two', 'added')"
    session.execute(statement, prepare=True)
    with raises("55000"), session.transaction():
        session.execute(statement, prepare=True)
        make(other, 0)
        session.execute(statement, prepare=True)


def test_a_change_that_is_rolled_back_leaves_the_session_as_it_was(session):
    with session.transaction(force_rollback=True):
        make(session, 0)
        with raises("55000"), session.transaction():
            push(session)
    push(session)


def test_the_extension_may_be_dropped_and_made_anew_within_a_session(session):
    for version in (0, works_with(session)):
        session.execute("DROP EXTENSION lockstep CASCADE; CREATE EXTENSION lockstep")
        push(session)
        make(session, version)
        if version == 0:
            with raises("55000"):
                push(session)


def test_a_procedure_that_waits_ends_with_the_error_when_the_objects_change(db, session):
    other = db.connect()
    expected = works_with(session)
    pid = other.info.backend_pid
    future = start(other.execute, "CALL lockstep.job_wait('q', '1 minute')")
    wait_until(lambda: session.execute("SELECT wait_event_type FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()[0] == "Extension")
    make(session, 0)
    with pytest.raises(psycopg.Error, match="version 0"):
        future.result(60)
    make(session, expected)
    other.execute("CALL lockstep.job_wait('q', '1 millisecond')")


def test_workers_wait_for_the_upgrade_say_so_once_and_go_on_without_a_restart(app):
    app.project()
    app.turn_on()
    first = app.push()
    app.wait_for(first)
    expected = works_with(app.admin)
    app.admin.execute("SELECT lockstep.projection_pause('p')")
    second = app.push()
    log = Log(app.cluster)
    launcher = app.launcher()
    with app.admin.transaction():
        app.admin.execute("SELECT lockstep.projection_resume('p')")
        make(app.admin, 0)
    wait_until(lambda: log.lines("version 0 of the SQL objects"))
    wait_until(lambda: log.lines(f"HINT:  {UPDATE}"))
    assert app.applied() == [first]
    make(app.admin, -1)
    wait_until(lambda: log.lines("version -1 of the SQL objects"))
    make(app.admin, expected)
    app.wait_for([first, second])
    assert app.launcher() == launcher
    assert len(log.lines("of the SQL objects")) == 2
