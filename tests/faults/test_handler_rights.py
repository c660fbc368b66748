"""Whose rights a handler has: its caller's, whatever it tries, and never those of the extension's owner."""

import pytest
from sessions import call, push, raises

USAGE = "GRANT USAGE ON SCHEMA lockstep TO {role}"
OWN = """
    GRANT EXECUTE ON FUNCTION lockstep.projection_create, lockstep.projection_drop, lockstep.projection_alter,
        lockstep.projection_reset, lockstep.projection_pause, lockstep.projection_resume TO {role}
"""
WORK = """
    GRANT EXECUTE ON FUNCTION lockstep.projection_run, lockstep.projection_wait, lockstep.failed_event_retry,
        lockstep.failed_event_discard TO {role}
"""
HOME = "CREATE SCHEMA {role} AUTHORIZATION {role}"


@pytest.fixture
def people(roles):
    """An owner of projections and a hostile role, each with a schema of its own; both may do everything with projections.

    In public there is a table in which everybody can write who runs as whom.
    """
    roles.admin.execute(
        """
        CREATE TABLE public.notes (nth int GENERATED ALWAYS AS IDENTITY, what text, who text DEFAULT current_user);
        GRANT INSERT, SELECT ON public.notes TO PUBLIC;
        CREATE FUNCTION public.note(e lockstep.events) RETURNS void LANGUAGE sql AS
            $$ INSERT INTO public.notes (what) VALUES (e.aggregate_id) $$;
        """
    )
    return tuple(roles.create(name, USAGE, OWN, WORK, HOME) for name in ("owner", "hostile"))


def notes(roles):
    return roles.admin.execute("SELECT what, who FROM public.notes ORDER BY nth").fetchall()


def definer(roles, role, name, call):
    """A SECURITY DEFINER function of the role, executable by all, that makes the call and returns its result as text."""
    roles.admin.execute(
        f"""
        CREATE FUNCTION public.{name}() RETURNS text LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog
            AS $$ SELECT r::text FROM lockstep.{call} AS r $$;
        ALTER FUNCTION public.{name}() OWNER TO {role};
        """
    )


@pytest.mark.parametrize(
    "change",
    [
        "projection_drop('p')",
        "projection_reset('p')",
        "projection_pause('p')",
        "projection_pause('p', '')",
        "projection_resume('p')",
        "projection_alter('p', handler => '-')",
    ],
)
def test_a_hostile_definer_function_cannot_change_the_projection_of_the_one_who_calls_it(roles, people, change):
    owner, hostile = people
    session = roles.connect(owner)
    session.execute("SELECT lockstep.projection_create('p', handler => 'public.note(lockstep.events)')")
    push(roles.admin, "one")
    assert call(session, "projection_run", name="p")[0][:2] == ("ok", 1)
    before = roles.admin.execute("SELECT p, c FROM lockstep.projections AS p, lockstep.projection_cursors AS c").fetchall()
    definer(roles, hostile, "trap", change)
    for victim in (owner, "postgres"):
        with raises("42501") as caught:
            roles.connect(victim).execute("SELECT public.trap()")
        assert owner in caught.value.diag.message_detail
    with raises("42501"), session.transaction():
        session.execute(f"SET LOCAL ROLE {owner}")
        session.execute("SELECT public.trap()")
    after = roles.admin.execute("SELECT p, c FROM lockstep.projections AS p, lockstep.projection_cursors AS c").fetchall()
    assert before == after


def test_a_run_inside_a_definer_function_has_the_rights_of_its_owner_and_not_of_the_session(roles, people):
    owner, hostile = people
    roles.connect(owner).execute("SELECT lockstep.projection_create('p', handler => 'public.note(lockstep.events)')")
    definer(roles, hostile, "run", "projection_run('p')")
    for victim in (owner, "postgres"):
        push(roles.admin, "event")
        roles.connect(victim).execute("SELECT public.run()")
    assert notes(roles) == [("event", hostile)] * 2


def test_a_handler_reaches_only_what_its_caller_may(roles, people):
    owner, _ = people
    roles.admin.execute(
        """
        CREATE TABLE public.secret (n int);
        CREATE FUNCTION public.tell(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.notes (what) VALUES ('started');
            CASE e.aggregate_id
                WHEN 'secret' THEN INSERT INTO public.secret VALUES (1);
                WHEN 'events' THEN PERFORM FROM lockstep.events;
                WHEN 'cursors' THEN UPDATE lockstep.projection_cursors SET position = 0;
                WHEN 'failed' THEN DELETE FROM lockstep.failed_events;
                WHEN 'push' THEN PERFORM FROM lockstep.push_event('order', 'two', 'added');
                WHEN 'settings' THEN SET LOCAL lockstep.max_parallel_claims = 0;
            END CASE;
        END $$;
        """
    )
    session = roles.connect(owner)
    session.execute("SELECT lockstep.projection_create('p', handler => 'public.tell(lockstep.events)', max_failures => 1)")
    tried = ["secret", "events", "cursors", "failed", "push", "settings"]
    for what in tried:
        push(roles.admin, what)
    assert call(session, "projection_run", name="p")[0][:3] == ("ok", 0, len(tried))
    rows = roles.admin.execute("SELECT sqlstate FROM lockstep.failed_events ORDER BY position").fetchall()
    assert rows == [("42501",)] * len(tried)
    assert notes(roles) == []


ESCAPES = [
    "SET ROLE postgres",
    "SET LOCAL ROLE postgres",
    "RESET ROLE",
    "SET ROLE NONE",
    "SELECT set_config('role', 'postgres', false)",
    "SELECT set_config('role', 'none', true)",
    "SET SESSION AUTHORIZATION postgres",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET SESSION AUTHORIZATION",
    "SELECT set_config('session_authorization', 'postgres', true)",
    "ALTER ROLE CURRENT_USER SUPERUSER",
]


@pytest.fixture
def escaping(roles):
    """A handler that tries each way to become somebody else, and notes after each, and after each failure, who it is."""
    roles.admin.execute("CREATE TABLE public.escapes (n int GENERATED ALWAYS AS IDENTITY, statement text)")
    roles.admin.execute("GRANT SELECT ON public.escapes TO PUBLIC")
    for statement in ESCAPES:
        roles.admin.execute("INSERT INTO public.escapes (statement) VALUES (%s)", (statement,))
    roles.admin.execute(
        """
        CREATE FUNCTION public.escape(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
        DECLARE way text;
        BEGIN
            FOR way IN SELECT statement FROM public.escapes ORDER BY n LOOP
                BEGIN
                    EXECUTE way;
                    INSERT INTO public.notes (what) VALUES (way);
                EXCEPTION WHEN OTHERS THEN
                    INSERT INTO public.notes (what) VALUES (SQLSTATE || ' ' || way);
                END;
            END LOOP;
        END $$;
        CREATE FUNCTION public.escape_and_fail(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            PERFORM public.escape(e);
            RAISE 'failed as %', current_user;
        END $$;
        """
    )


@pytest.mark.parametrize("handler", ["escape", "escape_and_fail"])
def test_a_handler_cannot_become_the_extensions_owner(roles, people, escaping, handler):
    owner, _ = people
    session = roles.connect(owner)
    session.execute(f"SELECT lockstep.projection_create('p', handler => 'public.{handler}(lockstep.events)', max_failures => 1)")
    push(roles.admin, "one")
    push(roles.admin, "two")
    result = call(session, "projection_run", name="p")[0][:3]
    assert session.execute("SELECT current_user, session_user").fetchone() == (owner, owner)
    if handler == "escape":
        assert result == ("ok", 2, 0)
        assert len(notes(roles)) == 2 * len(ESCAPES)
        assert {who for _, who in notes(roles)} == {owner}
        assert sum(what.startswith("42501") for what, _ in notes(roles)) >= 2 * 6
    else:
        assert result == ("ok", 0, 2)
        rows = roles.admin.execute("SELECT error FROM lockstep.failed_events").fetchall()
        assert rows == [(f"failed as {owner}",)] * 2
    # What follows runs as before: as the extension's owner inside, as the caller outside.
    call(session, "projection_reset", name="p")
    with raises("42501"):
        session.execute("SELECT * FROM lockstep.events")


def test_a_handler_inside_a_definer_function_cannot_become_the_session_user(roles, people, escaping):
    owner, hostile = people
    roles.connect(owner).execute("SELECT lockstep.projection_create('p', handler => 'public.escape(lockstep.events)')")
    definer(roles, hostile, "run", "projection_run('p')")
    push(roles.admin, "one")
    superuser = roles.connect("postgres")
    superuser.execute("SELECT public.run()")
    assert superuser.execute("SELECT current_user, session_user").fetchone() == ("postgres", "postgres")
    assert len(notes(roles)) == len(ESCAPES)
    assert {who for _, who in notes(roles)} == {hostile}


def test_a_caller_that_set_its_role_stays_that_role_inside_and_after_a_run(roles, people):
    owner, _ = people
    roles.connect(owner).execute("SELECT lockstep.projection_create('p', handler => 'public.note(lockstep.events)')")
    push(roles.admin, "one")
    superuser = roles.connect("postgres")
    superuser.execute(f"SET ROLE {owner}")
    call(superuser, "projection_run", name="p")
    assert superuser.execute("SELECT current_user").fetchone() == (owner,)
    superuser.execute("RESET ROLE")
    assert superuser.execute("SELECT current_user").fetchone() == ("postgres",)
    assert notes(roles) == [("one", owner)]


def test_a_deferred_trigger_set_off_by_a_handler_fires_with_the_callers_rights(roles, people):
    owner, hostile = people
    roles.admin.execute(
        """
        CREATE TABLE public.deferring (id text);
        GRANT INSERT ON public.deferring TO PUBLIC;
        CREATE FUNCTION public.fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.notes (what) VALUES ('fired');
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER fire AFTER INSERT ON public.deferring DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION public.fire();
        CREATE FUNCTION public.defer(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.deferring VALUES (e.aggregate_id);
            IF e.event_type = 'bad' THEN RAISE 'bad'; END IF;
        END $$;
        """
    )
    session = roles.connect(owner)
    session.execute("SELECT lockstep.projection_create('p', handler => 'public.defer(lockstep.events)', max_failures => 1)")
    push(roles.admin, "one")
    push(roles.admin, "two", event_type="bad")
    push(roles.admin, "three")
    with session.transaction():
        assert call(session, "projection_run", name="p")[0][:3] == ("ok", 2, 1)
        assert notes(roles) == []
    assert notes(roles) == [("fired", owner)] * 2

    # From a definer function: by PostgreSQL's version the definer or the session, but not the extension's owner.
    definer(roles, hostile, "run", "projection_run('p')")
    push(roles.admin, "four")
    session.execute("SELECT public.run()")
    what, who = notes(roles)[-1]
    assert (what, len(notes(roles))) == ("fired", 3)
    assert who in (owner, hostile)


def test_a_retry_has_its_callers_rights(roles, people):
    owner, hostile = people
    roles.admin.execute(
        """
        CREATE TABLE public.gate (n int);
        GRANT SELECT ON public.gate TO PUBLIC;
        CREATE FUNCTION public.pass(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            IF NOT EXISTS (SELECT FROM public.gate) THEN RAISE 'closed'; END IF;
            INSERT INTO public.notes (what) VALUES (e.aggregate_id);
        END $$;
        """
    )
    session = roles.connect(owner)
    session.execute("SELECT lockstep.projection_create('p', handler => 'public.pass(lockstep.events)', max_failures => 1)")
    first, second = push(roles.admin, "one"), push(roles.admin, "two")
    assert call(session, "projection_run", name="p")[0][:3] == ("ok", 0, 2)
    roles.admin.execute("INSERT INTO public.gate VALUES (1)")
    assert call(session, "failed_event_retry", name="p", event_position=first) == [(True,)]
    definer(roles, hostile, "retry", f"failed_event_retry('p', {second})")
    assert roles.connect("postgres").execute("SELECT public.retry()").fetchone() == ("true",)
    assert notes(roles) == [("one", owner), ("two", hostile)]


TRAPS = """
    CREATE FUNCTION {s}.trap() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        RAISE 'trapped as %', current_user USING ERRCODE = 'TRAP1'; END $$;
    CREATE FUNCTION {s}.t(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN PERFORM {s}.trap(); RETURN true; END $$;
    CREATE FUNCTION {s}.t(numeric, numeric) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN PERFORM {s}.trap(); RETURN true; END $$;
    CREATE FUNCTION {s}.t(int, int) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN PERFORM {s}.trap(); RETURN true; END $$;
    CREATE FUNCTION {s}.t(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN PERFORM {s}.trap(); RETURN true; END $$;
    CREATE FUNCTION {s}.add(timestamptz, interval) RETURNS timestamptz LANGUAGE plpgsql AS
        $$ BEGIN PERFORM {s}.trap(); RETURN $1; END $$;
    CREATE FUNCTION {s}.times(interval, double precision) RETURNS interval LANGUAGE plpgsql AS
        $$ BEGIN PERFORM {s}.trap(); RETURN $1; END $$;
    CREATE FUNCTION {s}.arithmetic(int, int) RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN PERFORM {s}.trap(); RETURN $1; END $$;
    CREATE OPERATOR {s}.= (LEFTARG = text, RIGHTARG = text, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.= (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.> (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.< (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.<= (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.>= (LEFTARG = numeric, RIGHTARG = numeric, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.>= (LEFTARG = int, RIGHTARG = int, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.> (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = {s}.t);
    CREATE OPERATOR {s}.+ (LEFTARG = timestamptz, RIGHTARG = interval, FUNCTION = {s}.add);
    CREATE OPERATOR {s}.* (LEFTARG = interval, RIGHTARG = double precision, FUNCTION = {s}.times);
    CREATE OPERATOR {s}.+ (LEFTARG = int, RIGHTARG = int, FUNCTION = {s}.arithmetic);
    CREATE OPERATOR {s}.- (LEFTARG = int, RIGHTARG = int, FUNCTION = {s}.arithmetic);
    CREATE FUNCTION {s}.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE plpgsql AS
        $$ BEGIN PERFORM {s}.trap(); END $$;
    CREATE FUNCTION {s}.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS
        $$ BEGIN PERFORM {s}.trap(); RETURN now(); END $$;
    CREATE TABLE {s}.events (tenant text);
    CREATE TABLE {s}.failed_events (tenant text);
    CREATE TABLE {s}.projections (name text);
"""


@pytest.mark.parametrize("schema", ["public", "own"])
def test_a_callers_search_path_does_not_reach_into_the_functions_but_does_into_the_handler(roles, people, schema):
    owner, _ = people
    schema = owner if schema == "own" else schema
    roles.admin.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
    session = roles.connect(owner)
    session.execute(TRAPS.format(s=schema))
    session.execute(f"SET search_path = {schema}, pg_temp, pg_catalog, lockstep")
    with raises("TRAP1") as caught:
        session.execute("SELECT 'a'::text = 'b'::text")  # the traps are set
    assert caught.value.diag.message_primary == f"trapped as {owner}"
    roles.admin.execute(
        """
        CREATE FUNCTION public.look(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            IF e.event_type OPERATOR(pg_catalog.=) 'bad' THEN PERFORM 'a'::text = 'b'::text; END IF;
            INSERT INTO public.notes (what) VALUES (current_setting('search_path'));
        END $$;
        CREATE FUNCTION public.look_at_all(e lockstep.events[]) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.notes (what) SELECT current_setting('search_path') FROM pg_catalog.unnest(e);
        END $$;
        """
    )
    push(roles.admin, "one")
    bad = push(roles.admin, "two", event_type="bad")
    push(roles.admin, "three")
    session.execute("SELECT lockstep.projection_create('p', handler => 'public.look(lockstep.events)', retry_after => '0')")
    assert call(session, "projection_run", name="p")[0][:3] == ("failed", 1, 0)
    session.execute("SELECT lockstep.projection_alter('p', max_failures => 2)")
    assert call(session, "projection_run", name="p")[0][:3] == ("ok", 1, 1)
    rows = roles.admin.execute("SELECT failures, sqlstate, error FROM lockstep.failed_events").fetchall()
    assert rows == [(2, "TRAP1", f"trapped as {owner}")], "the handler's own names are the caller's, with its rights"
    assert call(session, "failed_event_retry", name="p", event_position=bad) == [(False,)]
    call(session, "failed_event_discard", name="p", event_position=bad)
    assert call(session, "projection_wait", name="p", up_to=bad) == [(True,)]
    call(session, "projection_pause", name="p")
    assert call(session, "projection_run", name="p")[0][0] == "paused"
    call(session, "projection_resume", name="p", tenant="")
    session.execute("SELECT lockstep.projection_alter('p', handler => 'public.look_at_all(lockstep.events[])')")
    call(session, "projection_reset", name="p")
    assert call(session, "projection_run", name="p")[0][:3] == ("ok", 3, 0)
    call(session, "projection_drop", name="p")
    path = f"{schema}, pg_temp, pg_catalog, lockstep"
    assert notes(roles) == [(path, owner)] * 5


def test_a_projection_worker_that_runs_needs_execute_and_its_handlers_rights_only(roles, people):
    owner, _ = people
    roles.connect(owner).execute("SELECT lockstep.projection_create('p', handler => 'public.note(lockstep.events)')")
    position = push(roles.admin, "one")
    worker = roles.create(
        "worker", USAGE, "GRANT EXECUTE ON FUNCTION lockstep.projection_run, lockstep.projection_wait TO {role}"
    )
    session = roles.connect(worker)
    assert call(session, "projection_run", name="p") == [("ok", 1, 0, position, False)]
    assert call(session, "projection_wait", name="p", up_to=position) == [(True,)]
    assert notes(roles) == [("one", worker)]
    for change in ("projection_reset", "projection_pause", "projection_resume", "projection_drop"):
        with raises("42501"):
            call(session, change, name="p")


def test_only_a_member_of_the_owner_resets_pauses_or_resumes_a_projection(roles, people):
    owner, stranger = people
    roles.connect(owner).execute("SELECT lockstep.projection_create('p')")
    session = roles.connect(stranger)
    for change in ("projection_reset", "projection_pause", "projection_resume"):
        with raises("42501") as caught:
            call(session, change, name="p")
        assert owner in caught.value.diag.message_detail
    roles.admin.execute(f"GRANT {owner} TO {stranger}")
    for change in ("projection_reset", "projection_pause", "projection_resume"):
        call(session, change, name="p")
