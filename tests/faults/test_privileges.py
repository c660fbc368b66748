"""What roles without rights cannot do, and what the granted ones can."""

import pytest
from server import wait_for_lock_wait
from sessions import call, claim, push, raises, start

FUNCTIONS = """
    SELECT p.proname,
           array(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY AS a (t, n) ORDER BY n),
           CASE WHEN p.prorettype = 'trigger'::regtype THEN 't' ELSE p.prokind END
    FROM pg_proc AS p
    JOIN pg_depend AS d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
    JOIN pg_extension AS e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'lockstep'
    ORDER BY 1
"""

RELATIONS = """
    SELECT relname, relkind FROM pg_class
    WHERE relnamespace = 'lockstep'::regnamespace AND relkind IN ('r', 'v', 'm', 'S', 'p')
    ORDER BY 1
"""


USAGE = "GRANT USAGE ON SCHEMA lockstep TO {role}"


def every_way_in(admin):
    """Statements that read, call or write each thing of the extension."""
    for name, types, kind in admin.execute(FUNCTIONS).fetchall():
        if kind == "t":
            yield f"CREATE TEMP TABLE own (); CREATE TRIGGER t BEFORE INSERT ON own EXECUTE FUNCTION lockstep.{name}()"
            continue
        arguments = ", ".join(f"NULL::{type_}" for type_ in types)
        yield f"CALL lockstep.{name}({arguments})" if kind == "p" else f"SELECT * FROM lockstep.{name}({arguments})"
    for name, kind in admin.execute(RELATIONS).fetchall():
        yield f"SELECT * FROM lockstep.{name}"
        if kind == "r":
            columns = admin.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0", (f"lockstep.{name}",)
            ).fetchall()
            column = columns[0][0]
            yield f"INSERT INTO lockstep.{name} SELECT"
            yield f'UPDATE lockstep.{name} SET "{column}" = NULL'
            yield f"DELETE FROM lockstep.{name}"
            yield f"TRUNCATE lockstep.{name}"
        if kind == "S":
            yield f"SELECT nextval('lockstep.{name}')"
            yield f"SELECT setval('lockstep.{name}', 1)"


@pytest.mark.parametrize("grants", [(), (USAGE,)], ids=["nothing granted", "USAGE granted"])
def test_a_role_without_rights_can_neither_read_nor_call_nor_write_anything(db, roles, grants):
    stranger = roles.connect(roles.create("stranger", *grants))
    push(roles.admin)
    tried, problems = 0, []
    for statement in every_way_in(roles.admin):
        tried += 1
        try:
            stranger.execute(statement)
            problems.append(f"{statement} was allowed")
        except Exception as error:
            if error.diag.sqlstate != "42501":
                problems.append(f"{statement} raised {error.diag.sqlstate}: {error}")
    assert problems == []
    assert tried >= 35


def test_a_role_that_may_push_can_push_and_nothing_else(db, roles):
    writer = roles.connect(
        roles.create("writer", USAGE, "GRANT EXECUTE ON FUNCTION lockstep.push_event, lockstep.push_events TO {role}")
    )
    push(writer, "one")
    writer.execute(
        """SELECT * FROM lockstep.push_events('[{"aggregate_type": "order", "aggregate_id": "one", "event_type": "t",
             "expected_sequence": 1, "unique": [{"op": "add", "scope": "s", "value": "v"}],
             "event_id": "0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a"}]')"""
    )
    for statement in every_way_in(roles.admin):
        if "push_event" not in statement:
            with raises("42501"):
                writer.execute(statement)
    assert roles.admin.execute("SELECT count(*) FROM lockstep.events").fetchone() == (2,)


def test_a_writers_search_path_does_not_reach_into_the_functions(db, roles):
    role = roles.create(
        "writer",
        USAGE,
        "GRANT EXECUTE ON FUNCTION lockstep.push_event TO {role}",
        "CREATE SCHEMA {role} AUTHORIZATION {role}",
    )
    writer = roles.connect(role)
    writer.execute(
        f"""
        CREATE FUNCTION {role}.trap(text, text) RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'reached as %', current_user; END $$;
        CREATE OPERATOR {role}.= (LEFTARG = text, RIGHTARG = text, FUNCTION = {role}.trap);
        CREATE FUNCTION {role}.trunc(numeric) RETURNS numeric LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'reached as %', current_user; END $$;
        CREATE TEMP TABLE events (tenant text);
        SET search_path = {role}, pg_temp, pg_catalog, lockstep;
        """
    )
    push(writer, "one")
    push(writer, "one", expected_sequence=1)


DROP = (
    "GRANT EXECUTE ON FUNCTION lockstep.projection_drop, lockstep.projection_alter, lockstep.projection_owner TO {role}"
)
CREATE = "GRANT EXECUTE ON FUNCTION lockstep.projection_create TO {role}"


@pytest.fixture
def owned(roles):
    """Two roles that may create and drop projections; the first owns `p`."""
    owner, stranger = (roles.create(name, USAGE, CREATE, DROP) for name in ("owner", "stranger"))
    roles.connect(owner).execute("SELECT lockstep.projection_create('p')")
    return owner, stranger


def test_only_a_member_of_the_owner_drops_alters_or_gives_away_a_projection(roles, owned):
    owner, stranger = owned
    session = roles.connect(stranger)
    for statement in (
        "SELECT lockstep.projection_drop('p')",
        "SELECT lockstep.projection_alter('p', batch_size => 1)",
        f"SELECT lockstep.projection_owner('p', '{stranger}')",
    ):
        with raises("42501") as caught:
            session.execute(statement)
        assert owner in caught.value.diag.message_detail
    roles.admin.execute(f"GRANT {owner} TO {stranger}")
    session.execute("SELECT lockstep.projection_alter('p', batch_size => 1)")
    session.execute("SELECT lockstep.projection_drop('p')")


def test_a_stranger_cannot_hold_up_claims_by_trying_to_drop_the_projection(roles, owned):
    _, stranger = owned
    worker, session = roles.admin, roles.connect(stranger)
    position = push(worker)
    with worker.transaction():
        assert claim(worker) == [position]
        session.execute("SET lock_timeout = '20s'")
        with raises("42501"):
            session.execute("SELECT lockstep.projection_drop('p')")


def test_the_role_that_counts_is_that_of_the_calling_function_not_of_the_session(roles, owned):
    owner, stranger = owned
    for role, name in ((owner, "drop_as_owner"), (stranger, "drop_as_stranger")):
        roles.admin.execute(
            f"""
            CREATE FUNCTION public.{name}() RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog
                AS $$ SELECT lockstep.projection_drop('p') $$;
            ALTER FUNCTION public.{name}() OWNER TO {role};
            """
        )
    with raises("42501"):
        roles.connect(owner).execute("SELECT public.drop_as_stranger()")
    as_owner = roles.connect(owner)
    with raises("42501"), as_owner.transaction():
        as_owner.execute(f"SELECT set_config('role', '{owner}', true)")
        as_owner.execute("SELECT public.drop_as_stranger()")
    roles.connect(stranger).execute("SELECT public.drop_as_owner()")
    assert roles.admin.execute("SELECT count(*) FROM lockstep.projections").fetchone() == (0,)


def test_after_projection_owner_the_new_owner_decides_and_the_old_one_does_not(roles, owned):
    owner, stranger = owned
    session = roles.connect(owner)
    with raises("42501"):
        session.execute(f"SELECT lockstep.projection_owner('p', '{stranger}')")  # the giver must be a member of both
    roles.admin.execute(f"SELECT lockstep.projection_owner('p', '{stranger}')")
    with raises("42501"):
        session.execute("SELECT lockstep.projection_drop('p')")
    roles.connect(stranger).execute("SELECT lockstep.projection_drop('p')")


def test_a_former_owner_does_not_take_back_what_is_being_given_away(roles, owned):
    owner, stranger = owned
    giver, former = roles.connect("postgres"), roles.connect(owner)
    former.execute("SELECT 1")
    giver.execute("BEGIN")
    giver.execute(f"SELECT lockstep.projection_owner('p', '{stranger}')")
    taking_back = start(former.execute, f"SELECT lockstep.projection_owner('p', '{owner}')")
    wait_for_lock_wait(roles.admin, former.info.backend_pid)
    giver.execute("COMMIT")
    with raises("42501"):
        taking_back.result(30)
    assert roles.admin.execute("SELECT owner FROM lockstep.projections").fetchone() == (stranger,)


def test_the_projection_of_a_role_that_is_gone_is_a_superusers_to_drop(roles, owned):
    _, stranger = owned
    roles.admin.execute("UPDATE lockstep.projections SET owner = 'nobody_has_this_name'")
    with raises("42501"):
        roles.connect(stranger).execute("SELECT lockstep.projection_drop('p')")
    roles.admin.execute("SELECT lockstep.projection_drop('p')")


def test_a_projection_worker_needs_execute_only(roles, owned):
    worker = roles.connect(
        roles.create(
            "worker",
            USAGE,
            """GRANT EXECUTE ON FUNCTION lockstep.projection_claim, lockstep.projection_advance,
                   lockstep.projection_claim_state TO {role}""",
        )
    )
    positions = [push(roles.admin) for _ in range(2)]
    with worker.transaction():
        assert claim(worker) == positions
        assert call(worker, "projection_claim_state", name="p") == [("claimed", False)]
        call(worker, "projection_advance", name="p")
    with raises("42501"):
        worker.execute("SELECT * FROM lockstep.events")
    with raises("42501"):
        worker.execute("UPDATE lockstep.projection_cursors SET position = 0")
