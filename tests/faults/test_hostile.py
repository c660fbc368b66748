"""A hostile surrounding: what others have put into the database and what a caller has set. No escalation, no other result."""

import pytest
from grants import NOTHING, RECIPES, USAGE, Extension, run, try_all
from hostile import WORKSHOP, Scenario, set_traps
from psycopg import sql
from server import wait_until
from sessions import call, push, raises
from workers import Log


def caller(roles):
    """A role that may do all that the recipes grant, in a database ready for the scenario."""
    made = RECIPES["README.md"].create(roles)
    role = roles.create("caller", *(f"GRANT {group} TO {{role}}" for group in made.values()))
    roles.admin.execute(WORKSHOP)
    roles.admin.execute(f"ALTER TABLE workshop.guarded OWNER TO {role}")
    return role


_calm = []


@pytest.fixture
def expected(roles, new_database):
    """What the scenario gives where nothing is hostile. It is found out once."""
    if not _calm:
        calm = new_database(roles.db.cluster, f"{roles.db.name}_calm")
        admin = calm.connect()
        admin.execute(WORKSHOP)
        try:
            _calm.append(Scenario(calm.connect(), admin).run())
        finally:
            calm.drop()
    return _calm[0]


def compare(found, expected):
    outcomes, state = found
    for mine, other in zip(outcomes, expected[0], strict=True):
        assert mine == other
    assert state == expected[1]


# How a search_path gets into a session.
WAYS = {
    "set": "",
    "of the role": "ALTER ROLE {role} SET search_path = {path}",
    "of the database": "ALTER DATABASE {database} SET search_path = {path}",
}
PATH = "public, pg_temp, pg_catalog, lockstep"


@pytest.mark.parametrize("way", WAYS)
def test_names_that_hide_postgresqls_and_the_extensions_change_nothing(roles, expected, way):
    role = caller(roles)
    set_traps(roles.admin, "public")
    if way != "set":
        roles.admin.execute(WAYS[way].format(role=role, database=roles.db.name, path=PATH))
    session = roles.connect(role)
    for relation in ("events", "projections", "leases", "jobs", "tenants"):
        session.execute(f"CREATE TEMP TABLE {relation} (tenant pg_catalog.text)")
    if way == "set":
        session.execute(f"SET search_path = {PATH}")
    for trap in (
        "SELECT 'a'::pg_catalog.text = 'b'::pg_catalog.text",
        "SELECT 'a'::text",
        "SELECT clock_timestamp()",
        "SELECT unnest(ARRAY['a'::pg_catalog.text])",
        "SELECT 1 WHERE 1.5 < 2.5",
        "SELECT barrier('a')",
    ):
        with raises("TRAP1"):
            session.execute(trap)
    compare(Scenario(session, roles.admin).run(), expected)
    roles.admin.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(roles.db.name)))


def test_the_workers_and_their_launcher_do_not_meet_a_databases_traps(app):
    set_traps(app.admin, "public")
    app.project()
    app.project("q", batch_size=2)
    app.admin.execute(f"ALTER DATABASE {app.db.name} SET search_path = {PATH}")
    with app.db.connect() as session, raises("TRAP1"):
        session.execute("SELECT 1 WHERE 'a'::pg_catalog.text = 'b'::pg_catalog.text")
    log = Log(app.cluster)
    app.turn_on()
    positions = [app.push(tenant) for tenant in ("a", "b", "a")]
    wait_until(lambda: len(app.applied("p")) == len(app.applied("q")) == len(positions))
    for projection in ("p", "q"):
        assert sorted(app.applied(projection)) == positions
    assert app.failures() == []
    assert log.lines("trapped") == []


# What a caller may set, by what it could confuse.
SETTINGS = {
    "text and formats": """
        standard_conforming_strings = off
        escape_string_warning = off
        backslash_quote = on
        quote_all_identifiers = on
        bytea_output = escape
        client_encoding = LATIN1
        array_nulls = off
        transform_null_equals = on
        xmloption = document
        DateStyle = SQL, DMY
        IntervalStyle = sql_standard
        TimeZone = Pacific/Kiritimati
        extra_float_digits = -15
        lc_monetary = C
        lc_numeric = C
        lc_time = C
        timezone_abbreviations = Australia
        default_text_search_config = simple
    """,
    "formats": """
        DateStyle = German, YMD
        IntervalStyle = postgres_verbose
        TimeZone = America/St_Johns
        extra_float_digits = 3
    """,
    "costs": """
        plan_cache_mode = force_custom_plan
        jit = on
        jit_above_cost = 0
        jit_optimize_above_cost = -1
        geqo_threshold = 2
        from_collapse_limit = 1
        join_collapse_limit = 1
        constraint_exclusion = on
        work_mem = 64kB
        cursor_tuple_fraction = 0
        random_page_cost = 1000000
        cpu_tuple_cost = 1000000
        default_statistics_target = 1
        parallel_setup_cost = 0
        parallel_tuple_cost = 0
        min_parallel_table_scan_size = 0
        min_parallel_index_scan_size = 0
        max_parallel_workers_per_gather = 4
    """,
    "no plans": "",
    "transactions": """
        default_transaction_deferrable = on
        synchronous_commit = off
        check_function_bodies = off
        row_security = off
        client_min_messages = error
        statement_timeout = 5min
        lock_timeout = 5min
        idle_in_transaction_session_timeout = 5min
        lockstep.poll_interval = 1
        vacuum_cost_delay = 100ms
        temp_buffers = 800kB
        plan_cache_mode = force_generic_plan
        enable_indexscan = off
        enable_indexonlyscan = off
        enable_nestloop = off
    """,
}


@pytest.mark.parametrize("what", SETTINGS)
def test_what_a_caller_may_set_changes_no_result(roles, expected, what):
    role = caller(roles)
    settings = dict(line.strip().split(" = ") for line in SETTINGS[what].strip().splitlines())
    if what == "no plans":
        query = "SELECT name FROM pg_settings WHERE name LIKE 'enable\\_%' AND vartype = 'bool'"
        names = roles.admin.execute(query).fetchall()
        settings = {name: "off" for (name,) in names}
        parallel = "debug_parallel_query" if roles.admin.info.server_version >= 160000 else "force_parallel_mode"
        settings[parallel] = "regress"
        assert len(settings) > 20
    for name, value in settings.items():
        value = sql.SQL(value) if "," in value else sql.Literal(value)
        roles.admin.execute(sql.SQL("ALTER ROLE {} SET {} = {}").format(sql.Identifier(role), sql.SQL(name), value))
    session = roles.connect(role)
    call(session, "horizon")  # loads the library, which has settings too
    before = {name: session.execute(f"SHOW {name}").fetchone() for name in settings}
    compare(Scenario(session, roles.admin).run(), expected)
    assert {name: session.execute(f"SHOW {name}").fetchone() for name in settings} == before


def test_a_caller_without_the_rights_cannot_set_what_sessions_share(roles):
    role = roles.create(
        "role", "GRANT USAGE ON SCHEMA lockstep TO {role}", "GRANT EXECUTE ON FUNCTION lockstep.horizon TO {role}"
    )
    limits = {
        "lockstep.max_aggregates_per_push": "1000000",
        "lockstep.max_parallel_claims": "7",
        "lockstep.max_jobs_in_progress": "7",
    }
    for limit, value in limits.items():
        for statement in (
            f"ALTER ROLE {role} SET {limit} = {value}",
            f"ALTER ROLE {role} SET session_replication_role = replica",
        ):
            with raises("42501"):
                roles.connect(role).execute(statement)
        session = roles.connect(role)  # the library is not loaded yet: it is a name like any other
        roles.admin.execute("SELECT lockstep.horizon()")
        default = roles.admin.execute(f"SHOW {limit}").fetchone()
        session.execute(f"SET {limit} = {value}")
        session.execute("SELECT lockstep.horizon()")
        assert session.execute(f"SHOW {limit}").fetchone() == default
        for statement in (f"SET {limit} = {value}", f"SELECT set_config('{limit}', '{value}', false)"):
            with raises("42501"):
                session.execute(statement)


@pytest.mark.parametrize("setting", ["default_transaction_read_only = on", "default_transaction_isolation = serializable"])
def test_in_a_transaction_that_cannot_do_it_a_call_is_refused_or_changes_what_it_says(roles, setting):
    """Nothing is half done: a read-only transaction changes no table."""
    extension = Extension(roles.admin)
    session = roles.connect("postgres")
    session.execute(f"SET {setting}")
    tables = extension.names("table")

    def contents():
        return [sorted(map(str, roles.admin.execute(f"TABLE {table}").fetchall())) for table in tables]

    before, states = contents(), {}
    for attempt in extension.attempts():
        if attempt.object.endswith(")") and attempt.needs and attempt.statement.startswith("SELECT * FROM lockstep."):
            raised = run(session, attempt.statement)
            states.setdefault(raised and raised.diag.sqlstate, []).append(attempt.object)
    assert set(states) <= {None, "25006", "25000", "LS002"}, states
    assert len(states["25006" if "read_only" in setting else None]) > 25
    assert contents() == before


@pytest.fixture
def bare(roles):
    """The database without the extension."""
    roles.admin.execute("DROP EXTENSION lockstep")
    roles.admin.execute("DROP SCHEMA lockstep")
    return roles


# What runs if something of the installation finds an operator of another's, for types between which pg_catalog has none.
OPERATORS = """
    DO $$
    DECLARE
        types regtype[] := '{oid,name,text,regnamespace,regclass,regproc,int4}';
        body text := ' RETURNS boolean LANGUAGE plpgsql AS $body$ BEGIN
            RAISE ''trapped as %'', current_user USING ERRCODE = ''TRAP1''; END $body$';
        made record;
    BEGIN
        FOR made IN
            SELECT l.type AS l, r.type AS r, o.name, 'public.trap_' || row_number() OVER () AS trap
            FROM unnest(types) AS l (type), unnest(types) AS r (type), unnest('{=,<>}'::text[]) AS o (name)
        LOOP
            EXECUTE format('CREATE FUNCTION %s(%s, %s)', made.trap, made.l, made.r) || body;
            EXECUTE format('CREATE OPERATOR lockstep.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = %s)',
                made.name, made.l, made.r, made.trap);
        END LOOP;
    END $$;
"""


def test_who_owns_the_database_cannot_lay_a_trap_for_the_superuser_who_installs(bare):
    """It owns no schema that the extension makes, but may make it first, and the script's search_path holds it."""
    role = bare.create("mallory", f"ALTER DATABASE {bare.db.name} OWNER TO {{role}}")
    session = bare.connect(role)
    session.execute("CREATE SCHEMA lockstep")
    session.execute(OPERATORS)
    with raises("42P06") as caught:
        bare.admin.execute("CREATE EXTENSION lockstep")
    assert "Drop it" in caught.value.diag.message_hint
    bare.admin.execute(f"ALTER DATABASE {bare.db.name} OWNER TO postgres")


@pytest.mark.parametrize(
    "made",
    [
        "CREATE SCHEMA lockstep AUTHORIZATION {role}",
        "CREATE SCHEMA lockstep; GRANT CREATE ON SCHEMA lockstep TO {role}",
        "CREATE SCHEMA lockstep; GRANT CREATE ON SCHEMA lockstep TO PUBLIC",
        "CREATE SCHEMA lockstep; CREATE TABLE lockstep.mine ()",
        "CREATE SCHEMA lockstep; CREATE FUNCTION lockstep.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA lockstep; CREATE DOMAIN lockstep.text AS pg_catalog.text",
        "CREATE SCHEMA lockstep; CREATE OPERATOR lockstep.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_catalog.texteq)",
        "ALTER DEFAULT PRIVILEGES GRANT CREATE ON SCHEMAS TO PUBLIC",
    ],
)
def test_no_schema_that_others_may_use_or_have_used_is_installed_into(bare, made):
    role = bare.create("role")
    bare.admin.execute(made.format(role=role))
    with raises("42P06"):
        bare.admin.execute("CREATE EXTENSION lockstep")


def test_an_empty_schema_of_a_superusers_is_installed_into(bare):
    bare.admin.execute("CREATE SCHEMA lockstep")
    bare.admin.execute("CREATE EXTENSION lockstep")
    push(bare.admin)


def test_default_privileges_of_who_installs_give_nobody_anything(bare):
    role = bare.create("role")
    for who in ("PUBLIC", role):
        for what in ("ALL ON TABLES", "ALL ON SEQUENCES", "ALL ON ROUTINES", "ALL ON TYPES", "USAGE ON SCHEMAS"):
            bare.admin.execute(f"ALTER DEFAULT PRIVILEGES GRANT {what} TO {who}")
    bare.admin.execute("CREATE EXTENSION lockstep")
    extension = Extension(bare.admin)
    for schema in (NOTHING, frozenset({USAGE})):
        for _ in schema:
            bare.admin.execute(f"GRANT USAGE ON SCHEMA lockstep TO {role}")
        try_all(bare.connect(role), schema, extension.attempts())


def test_what_a_caller_passes_is_computed_with_its_own_rights(roles):
    """A cast, a domain's check, a column's default, a function in an argument: none of them runs as the extension's owner."""
    role = caller(roles)
    session = roles.connect(role)
    session.execute(
        """
        CREATE FUNCTION workshop.spy() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO workshop.notes (what) VALUES ('spied'); RETURN true; END $$;
        CREATE FUNCTION workshop.event_id() RETURNS uuid LANGUAGE plpgsql AS $$ BEGIN
            PERFORM workshop.spy(); RETURN gen_random_uuid(); END $$;
        CREATE DOMAIN workshop.word AS text CHECK (workshop.spy());
        CREATE TYPE workshop.own AS (n int);
        CREATE FUNCTION workshop.own_text(workshop.own) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
            PERFORM workshop.spy(); RETURN 'own'; END $$;
        CREATE CAST (workshop.own AS text) WITH FUNCTION workshop.own_text(workshop.own) AS IMPLICIT;
        CREATE TABLE workshop.outbox (id uuid DEFAULT workshop.event_id(), word workshop.word);
        """
    )
    session.execute("INSERT INTO workshop.outbox (word) VALUES ('w')")
    for function in (
        "push_event('a', 'b', {})",
        "lease_acquire('l', {})",
        "job_enqueue('q', 'k', {})",
        "resource_create({})",
        "projection_create({})",
    ):
        session.execute(f"SELECT lockstep.{function.format('ROW(1)::workshop.own')}")
    session.execute("SELECT lockstep.push_event('a', 'b', 'w'::workshop.word)")
    session.execute(
        """SELECT lockstep.push_events(jsonb_build_array(jsonb_build_object(
               'aggregate_type', 'a', 'aggregate_id', 'b', 'event_type', word, 'event_id', id))) FROM workshop.outbox"""
    )
    with raises("42501"):  # what it says to be a superuser's is not asked, nor believed
        session.execute("SELECT lockstep.projection_owner('own', 'postgres')")
    who = roles.admin.execute("SELECT who, count(*) FROM workshop.notes GROUP BY who").fetchall()
    assert who == [(role, 8)]


def test_a_guards_trigger_on_a_hostile_owners_table_tells_nothing_and_does_nothing_else(roles):
    role = caller(roles)
    roles.admin.execute("SELECT lockstep.lease_acquire('l', 'h', '1 hour')")
    session = roles.connect(role)
    with raises("42501"):
        session.execute("SHOW hba_file")
    (secret,) = roles.admin.execute("SHOW hba_file").fetchone()
    guard = "CREATE TRIGGER g BEFORE INSERT ON workshop.guarded EXECUTE FUNCTION lockstep.lease_guard_trigger({})"
    session.execute(guard.format("'l', 'hba_file'"))
    with raises("LS003") as caught:
        session.execute("INSERT INTO workshop.guarded VALUES (1)")
    assert secret not in str(caught.value) + str(caught.value.diag.context)
    # A trigger of its own beside it runs as whoever writes, as ever.
    session.execute(
        """
        CREATE FUNCTION workshop.beside() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO workshop.notes (what) VALUES (TG_NAME); RETURN NULL; END $$;
        CREATE TRIGGER a BEFORE INSERT ON workshop.guarded EXECUTE FUNCTION workshop.beside();
        CREATE TRIGGER z BEFORE INSERT ON workshop.guarded EXECUTE FUNCTION workshop.beside();
        DROP TRIGGER g ON workshop.guarded;
        """
    )
    session.execute(guard.format("'l'"))
    with session.transaction():
        (token,) = roles.admin.execute("SELECT token FROM lockstep.leases").fetchone()
        call(session, "lease_guard", name="l", token=token)
        session.execute("INSERT INTO workshop.guarded VALUES (1)")
    assert roles.admin.execute("SELECT what, who FROM workshop.notes ORDER BY nth").fetchall() == [("a", role), ("z", role)]


def test_what_a_commit_checks_does_not_meet_the_committers_traps(roles):
    """The check of lease_guard_at_commit runs outside of any function, with whatever the session has set by then."""
    role = caller(roles)
    set_traps(roles.admin, "public")
    session = roles.connect(role)
    token = call(session, "lease_acquire", name="l", holder="h", ttl="1 hour")[0][1]
    session.execute("BEGIN")
    call(session, "lease_guard_at_commit", name="l", token=token)
    session.execute(f"SET LOCAL search_path = {PATH}")
    session.execute("COMMIT")
    session.execute("BEGIN")
    call(session, "lease_guard_at_commit", name="l", token=token)
    session.execute(f"SET search_path = {PATH}")
    roles.admin.execute("SELECT lockstep.lease_steal('l', 'thief', '1 minute', 'test')")
    with raises("LS003"):
        session.execute("COMMIT")


def test_an_error_that_is_caught_leaves_the_caller_its_own_rights_and_path(roles):
    """Raised while the extension acts as its owner: the savepoint's end gives the caller back what it was."""
    role = caller(roles)
    session, blocker = roles.connect(role), roles.connect("postgres")
    session.execute("SELECT lockstep.projection_create('p')")
    session.execute("SET search_path = workshop, public; SET lock_timeout = '10ms'")
    blocker.execute("BEGIN; SELECT FROM lockstep.projections FOR UPDATE")
    for call_ in (
        "projection_drop('p')",
        "projection_pause('p')",
        f"projection_owner('p', '{role}')",
        "projection_alter('p', batch_size => 3)",
    ):
        session.execute(
            f"""
            DO $$ BEGIN
                BEGIN
                    PERFORM lockstep.{call_};
                    RAISE 'was not held up';
                EXCEPTION WHEN lock_not_available THEN
                    INSERT INTO workshop.notes (what) VALUES (current_setting('search_path'));
                END;
                BEGIN
                    PERFORM FROM lockstep.events;
                    DELETE FROM lockstep.projections;
                    RAISE 'is still the owner';
                EXCEPTION WHEN insufficient_privilege THEN
                    INSERT INTO workshop.notes (what) VALUES (current_setting('search_path'));
                END;
            END $$
            """
        )
    blocker.execute("ROLLBACK")
    assert roles.admin.execute("SELECT what, who FROM workshop.notes").fetchall() == [("workshop, public", role)] * 8
