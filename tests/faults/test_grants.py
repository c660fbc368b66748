"""The GRANT recipes of the README and the guides: what each gives, and that it gives nothing else, by trying everything."""

import pytest
from grants import DENIED, NOTHING, RECIPES, USAGE, Extension, everything, has, run, try_all
from sessions import raises


@pytest.fixture
def extension(roles):
    return Extension(roles.admin)


def own_projections(roles, role):
    """Only a member of a projection's owner changes it."""
    roles.admin.execute("UPDATE lockstep.projections SET owner = %s", (role,))


def test_every_attempt_that_a_recipe_could_allow_works_as_a_superuser(roles, extension):
    """Else a test below could take a mistake of its own for a refusal, or for what is allowed."""
    own_projections(roles, "postgres")
    attempts = [attempt for attempt in extension.attempts() if attempt.needs]
    try_all(roles.admin, everything(extension), attempts)


def test_the_recipes_name_what_there_is(extension):
    relations = {name.removeprefix("lockstep.") for name in extension.names("table", "view")}
    privileges = everything(extension)
    for recipes in RECIPES.values():
        for role in recipes.roles:
            for privilege in recipes.expected(role):
                kind, name, _ = privilege
                assert privilege in privileges or kind == "relation" and name in {"*", *relations}, privilege
    # Every function is in some recipe.
    granted = set().union(*(RECIPES["README.md"].expected(role) for role in RECIPES["README.md"].roles))
    assert {p for p in privileges if p[0] in ("function", "procedure")} <= granted


@pytest.mark.parametrize("privileges", [NOTHING, frozenset({USAGE})], ids=["nothing", "USAGE"])
def test_without_a_recipe_there_is_nothing_to_read_call_or_write(roles, extension, privileges):
    stranger = roles.create("stranger", *("GRANT USAGE ON SCHEMA lockstep TO {role}" for _ in privileges))
    own_projections(roles, stranger)
    before = extension.acls()
    try_all(roles.connect(stranger), privileges, extension.attempts())
    assert extension.acls() == before


@pytest.mark.parametrize("page, role", [(page, role) for page, recipes in RECIPES.items() for role in recipes.roles])
def test_a_recipe_allows_what_it_says_and_nothing_else(roles, extension, page, role):
    recipes = RECIPES[page]
    name = recipes.create(roles)[role]
    own_projections(roles, name)
    attempts = extension.attempts()
    assert len(attempts) > 1000
    before = extension.acls()
    try_all(roles.connect(name), recipes.expected(role), attempts)
    assert extension.acls() == before


README = RECIPES["README.md"]
READ_OR_CALL = ("SELECT * FROM ", "CALL ", "COPY ", "INSERT ", "UPDATE ", "DELETE ", "TRUNCATE ")


@pytest.fixture
def fewer(extension):
    """An attempt or so for each object: reading, calling, writing it."""
    return [attempt for attempt in extension.attempts() if attempt.statement.startswith(READ_OR_CALL)]


def test_who_inherits_a_role_has_what_it_has(roles, extension, fewer):
    group = README.create(roles)["app_operator"]
    member = roles.create("member", f"GRANT {group} TO {{role}}")
    own_projections(roles, member)
    try_all(roles.connect(member), README.expected("app_operator"), fewer)


def test_who_does_not_inherit_a_role_has_nothing_until_it_sets_it_and_nothing_after(roles, extension, fewer):
    group = README.create(roles)["app_operator"]
    member = roles.create("member", "ALTER ROLE {role} NOINHERIT", f"GRANT {group} TO {{role}}")
    own_projections(roles, group)
    session = roles.connect(member)
    try_all(session, NOTHING, fewer)
    session.execute(f"SET ROLE {group}")
    try_all(session, README.expected("app_operator"), fewer)
    session.execute("RESET ROLE")
    try_all(session, NOTHING, fewer)


@pytest.mark.parametrize("way", ["SET ROLE", "SET SESSION AUTHORIZATION"])
def test_a_superuser_that_has_become_another_role_has_that_roles_rights_alone(roles, extension, fewer, way):
    role = README.create(roles)["app_writer"]
    session = roles.connect("postgres")
    session.execute("SELECT * FROM lockstep.read_events()")  # its plans are kept
    session.execute(f"{way} {role}")
    try_all(session, README.expected("app_writer"), fewer)


def test_a_definer_function_lends_what_its_owner_has_and_no_more(roles, extension):
    writer = README.create(roles)["app_writer"]
    own_projections(roles, writer)
    roles.admin.execute(
        f"""
        CREATE FUNCTION public.lent(statement text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog
            AS $$ BEGIN EXECUTE statement; END $$;
        ALTER FUNCTION public.lent(text) OWNER TO {writer};
        """
    )
    expected = README.expected("app_writer")
    session, tried = roles.connect(roles.create("stranger")), 0
    for attempt in extension.attempts():
        if attempt.statement.startswith(("SELECT * FROM ", "INSERT ", "DELETE ", "UPDATE ")):
            tried += 1
            allowed = attempt.needs and all(has(expected, privilege) for privilege in attempt.needs)
            statement = "SELECT public.lent($statement$" + attempt.statement + "$statement$)"
            raised = run(session, statement)
            assert (raised and raised.diag.sqlstate) in ((None,) if allowed else attempt.refusals), (attempt, raised)
    assert tried > 150
    with raises(DENIED):
        session.execute("SELECT * FROM lockstep.push_event('order', 'one', 'added')")


def test_a_role_loses_at_once_what_is_revoked_in_a_session_that_has_used_it(roles, extension):
    writer = README.create(roles)["app_writer"]
    session = roles.connect(writer)
    push = "SELECT * FROM lockstep.push_event('order', 'one', 'added')"
    session.execute(push, prepare=True)
    roles.admin.execute(f"REVOKE EXECUTE ON FUNCTION lockstep.push_event FROM {writer}")
    with raises(DENIED):
        session.execute(push, prepare=True)


def test_row_security_that_an_administrator_adds_holds_for_readers_and_changes_no_function(roles, extension):
    """The functions run as the tables' owner, a superuser, whom no policy holds for, forced or not."""
    made = README.create(roles)
    admin, writer, observer = roles.admin, roles.connect(made["app_writer"]), roles.connect(made["app_observer"])
    count = "SELECT count(*) FROM lockstep.events"
    push = "SELECT lockstep.push_event('order', 'one', 'added', tenant => %s)"
    writer.execute(push, ("a",))  # so that a plan from before is kept
    for what in ("ENABLE", "FORCE"):
        admin.execute(f"ALTER TABLE lockstep.events {what} ROW LEVEL SECURITY")
    admin.execute(f"CREATE POLICY a ON lockstep.events TO {made['app_observer']} USING (tenant = 'a')")
    for value in ("on", "off"):
        for session in (writer, observer):
            session.execute(f"SET row_security = {value}")
        writer.execute(push, ("a",))
        writer.execute(push, ("b",))
        (events,) = observer.execute("SELECT array_agg(tenant) FROM lockstep.read_events(tenant => 'b')").fetchone()
        assert set(events) == {"b"}
    with raises(DENIED):
        observer.execute(count)  # row_security = off: an error instead of fewer rows
    observer.execute("SET row_security = on")
    assert observer.execute(count).fetchone() == (3,)
    assert admin.execute(count).fetchone() == (6,)
