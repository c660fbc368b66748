"""What a role that may not read the extension's tables could still learn of what is in them: events, tokens, tenants, keys."""

import psycopg
import pytest
from grants import RECIPES, Extension
from psycopg.types.json import Jsonb
from server import wait_until
from sessions import call, push, raises, start

SECRET = "s3cr3t"
USAGE = "GRANT USAGE ON SCHEMA lockstep TO {role}"


@pytest.fixture
def secrets(roles):
    """The word is in every text column that a caller fills; the tables are analysed."""
    admin = roles.admin
    payload = Jsonb({"word": SECRET})
    for n in range(50):
        event = {
            "aggregate_type": SECRET,
            "aggregate_id": f"{SECRET}-{n}",
            "event_type": SECRET,
            "payload": {"word": SECRET},
            "metadata": {"word": SECRET},
            "unique": [{"op": "add", "scope": SECRET, "value": f"{SECRET}-{n}"}],
        }
        call(admin, "push_events", events=Jsonb([event]), tenant=SECRET)
        call(admin, "job_enqueue", queue=SECRET, key=f"{SECRET}-{n}", kind=SECRET, payload=payload, tenant=SECRET)
        call(admin, "resource_create", resource=f"{SECRET}-{n}", replicas=[SECRET], tenant=SECRET)
        call(admin, "lease_acquire", name=f"{SECRET}-{n}", holder=SECRET, ttl="1 hour", metadata=payload)
    call(admin, "projection_create", name=SECRET)
    admin.execute("ANALYZE")
    return roles


def test_statistics_sequences_and_other_sessions_show_a_stranger_nothing(secrets):
    roles = secrets
    session = roles.connect(roles.create("stranger", USAGE))
    busy = roles.connect("postgres")
    busy.execute("BEGIN")
    call(busy, "push_event", aggregate_type=SECRET, aggregate_id="a", event_type="t", payload=Jsonb(SECRET), tenant=SECRET)
    looks = [
        "SELECT s::text FROM pg_stats AS s WHERE schemaname = 'lockstep'",
        "SELECT s::text FROM pg_stats_ext AS s",
        "SELECT last_value::text FROM pg_sequences WHERE schemaname = 'lockstep' AND last_value IS NOT NULL",
        "SELECT a::text FROM pg_stat_activity AS a WHERE usename = 'postgres' AND pid <> pg_backend_pid() AND state IS NOT NULL",
        "SELECT a::text FROM pg_stat_activity AS a WHERE a::text LIKE %(secret)s",
        "SELECT l::text FROM pg_locks AS l WHERE l::text LIKE %(secret)s",
        "SELECT x::text FROM pg_prepared_xacts AS x",
        "SELECT t::text FROM pg_stat_all_tables AS t WHERE t::text LIKE %(secret)s",
        "SELECT c::text FROM pg_class AS c WHERE c::text LIKE %(secret)s",
        "SELECT c::text FROM pg_constraint AS c WHERE c::text LIKE %(secret)s",
        "SELECT c::text FROM information_schema.columns AS c WHERE table_schema = 'lockstep'",
        "SELECT c::text FROM information_schema.tables AS c WHERE table_schema = 'lockstep'",
    ]
    admin = roles.admin
    for look in looks[:3:2]:  # there would be something to see
        assert admin.execute(look).fetchall() != []
    for look in looks:
        assert session.execute(look, {"secret": f"%{SECRET}%"}).fetchall() == [], look
    for sequence in ("ticket", "token", "job_id"):
        for function in ("pg_sequence_last_value", "pg_get_sequence_data"):
            statement = f"SELECT x::text FROM {function}('lockstep.{sequence}'::regclass) AS x"
            try:
                rows = session.execute(statement).fetchall()
            except psycopg.Error as error:
                assert error.diag.sqlstate in ("42501", "42883"), error  # the second: not in this version
            else:
                assert rows in ([(None,)], [("(,)",)], [("(,,)",)]), rows
    for statement in ("SELECT * FROM pg_statistic", "SELECT pg_read_file('PG_VERSION')", "TABLE pg_authid"):
        with raises("42501"):
            session.execute(statement)
    busy.execute("ROLLBACK")


def test_a_refusal_holds_no_more_than_the_name_of_what_was_refused(secrets):
    roles = secrets
    session = roles.connect(roles.create("stranger", USAGE))
    for statement in (
        f"SELECT * FROM lockstep.events WHERE tenant = '{SECRET}' AND 1 / (sequence - 1) > 0",
        f"INSERT INTO lockstep.events SELECT * FROM lockstep.events WHERE tenant = '{SECRET}'",
        "UPDATE lockstep.leases SET holder = NULL, ttl = NULL",
        "EXPLAIN ANALYZE SELECT * FROM lockstep.jobs",
    ):
        with raises("42501") as caught:
            session.execute(statement)
        diag = caught.value.diag
        assert (diag.message_detail, diag.context) == (None, None)
        assert SECRET not in str(caught.value)


def test_a_view_that_is_granted_alone_gives_a_leaky_function_nothing_that_it_does_not_show(secrets):
    """What a cheap function of the reader's own sees in a condition is pushed down as far as it may be."""
    roles = secrets
    Extension(roles.admin)  # something in every view
    query = "SELECT relname FROM pg_class WHERE relnamespace = 'lockstep'::regnamespace AND relkind = 'v'"
    views = [name for (name,) in roles.admin.execute(query).fetchall()]
    assert len(views) >= 8
    reader = roles.create("reader", USAGE, "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA lockstep TO {role}")
    session = roles.connect(reader)
    roles.admin.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    session.execute("CREATE TABLE public.seen (view text, value text)")
    session.execute(
        """CREATE FUNCTION public.leak(text, anyelement) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS $$ BEGIN
               INSERT INTO public.seen VALUES ($1, $2::text); RETURN true; END $$"""
    )
    for view in views:
        roles.admin.execute(f"GRANT SELECT ON lockstep.{view} TO {reader}")
        query = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
        columns = [column for (column,) in session.execute(query, (f"lockstep.{view}",)).fetchall()]
        as_text = ", ".join(f"{column}::text" for column in columns)
        shown = {value for row in session.execute(f"SELECT {as_text} FROM lockstep.{view}").fetchall() for value in row}
        for column in columns:
            # Times move on; and only what is text could tell.
            session.execute("DELETE FROM public.seen")
            session.execute(f"SELECT 1 FROM lockstep.{view} WHERE public.leak(%s, {column})", (view,))
            texts = session.execute("SELECT value FROM public.seen WHERE value ~ '[a-zA-Z]' AND value !~ ':'").fetchall()
            assert {text for (text,) in texts} <= shown, (view, column)
        roles.admin.execute(f"REVOKE SELECT ON lockstep.{view} FROM {reader}")


TOKEN = 987654321


def test_who_loses_against_a_holder_does_not_learn_its_token(roles):
    """Who knows it could act as the holder."""
    admin = roles.admin
    made = RECIPES["README.md"].create(roles)
    clients = {name: roles.connect(made[name]) for name in ("app_holder", "app_registry_client", "app_job_worker")}
    admin.execute("SELECT setval('lockstep.token', %s)", (TOKEN * 1000,))
    call(admin, "lease_acquire", name="l", holder="h", ttl="1 hour")
    call(admin, "resource_create", resource="r", replicas=["a", "b"])
    call(admin, "generation_increment", resource="r", replicas=["a"])
    call(admin, "replica_sync_begin", resource="r", target="b", holder="w", ttl="1 hour")
    call(admin, "job_enqueue", queue="q", key="k", kind="a")
    call(admin, "job_claim", queue="q", holder="w", ttl="1 hour")
    call(admin, "job_enqueue", queue="q", key="k", kind="a")
    (job,) = admin.execute("SELECT job_id FROM lockstep.jobs WHERE state = 'in_progress'").fetchone()
    query = """SELECT token FROM lockstep.leases UNION SELECT token FROM lockstep.jobs WHERE token IS NOT NULL
               UNION SELECT sync_token FROM lockstep.replicas WHERE sync_token IS NOT NULL"""
    tokens = [str(token) for (token,) in admin.execute(query).fetchall()]
    assert len(tokens) == 3 and all(token.startswith(str(TOKEN)) for token in tokens)
    told = []

    def tell(who, statement):
        try:
            told.append((statement, str(clients[who].execute(statement).fetchall())))
        except psycopg.Error as error:
            diag = error.diag
            told.append((statement, f"{diag.message_primary} {diag.message_detail} {diag.message_hint} {diag.context}"))

    for statement in (
        "SELECT * FROM lockstep.lease_acquire('l', 'other')",
        "SELECT * FROM lockstep.lease_renew('l', 1)",
        "SELECT lockstep.lease_release('l', 1)",
        "SELECT lockstep.lease_guard('l', 1)",
        "BEGIN; SELECT lockstep.lease_guard_at_commit('l', 1); COMMIT",
        "CALL lockstep.lease_take('l', 'other', '1 s', '1 ms')",
    ):
        tell("app_holder", statement)
        clients["app_holder"].execute("ROLLBACK")
    for statement in (
        "SELECT * FROM lockstep.replica_sync_begin('r', 'b', 'other')",
        "SELECT lockstep.replica_sync_renew('r', 'b', 1)",
        "SELECT lockstep.replica_sync_finish('r', 'b', 1)",
        "SELECT * FROM lockstep.replicas_due()",
        "SELECT * FROM lockstep.replica_sync_claim('other')",
    ):
        tell("app_registry_client", statement)
    for statement in (
        f"SELECT lockstep.job_complete({job}, 1)",
        f"SELECT lockstep.job_fail({job}, 1, 'no')",
        f"SELECT lockstep.job_guard({job}, 1)",
        f"SELECT * FROM lockstep.job_renew(ARRAY[{job}::bigint], ARRAY[1::bigint])",
        "SELECT * FROM lockstep.job_claim('q', 'other')",
        "SELECT * FROM lockstep.job_enqueue('q', 'k', 'a')",
    ):
        tell("app_job_worker", statement)
    for statement, answer in told:
        assert not any(token in answer for token in tokens), (statement, answer)
    assert len(told) == 17


def test_a_push_that_meets_anothers_keys_is_told_only_what_it_has_said_itself(roles):
    """A global key of another tenant's: that it is taken, and not by whom."""
    event = {
        "aggregate_type": "user",
        "aggregate_id": SECRET,
        "event_type": SECRET,
        "payload": SECRET,
        "unique": [{"op": "add", "scope": "mail", "value": "a", "global": True}],
    }
    call(roles.admin, "push_events", events=Jsonb([event]), tenant=SECRET)
    session = roles.connect(RECIPES["README.md"].create(roles)["app_writer"])
    mine = event | {"aggregate_id": "mine", "event_type": "t", "payload": None}
    with raises("23505") as caught:
        call(session, "push_events", events=Jsonb([mine]), tenant="mine")
    diag = caught.value.diag
    assert SECRET not in f"{diag.message_primary} {diag.message_detail} {diag.message_hint} {diag.context}"


def test_a_worker_shows_others_neither_what_it_runs_nor_for_whom(app):
    stranger = app.role("stranger")
    app.project(body="PERFORM pg_advisory_xact_lock_shared(4711);")
    gate, session = app.db.connect(), app.db.connect(user=stranger)
    gate.execute("SELECT pg_advisory_lock(4711)")
    app.turn_on(workers=1)
    pushed = start(app.push, SECRET)
    pid = app.wait_for_handler()
    pushed.result(30)
    look = "SELECT a::text FROM pg_stat_activity AS a WHERE pid = %s"
    assert SECRET in wait_until(lambda: app.admin.execute(look, (pid,)).fetchone())[0], "who may see it does"
    (seen,) = session.execute(look, (pid,)).fetchone()
    assert SECRET not in seen
    for kind in ("supervisor", "launcher", "worker"):
        query = "SELECT a::text FROM pg_stat_activity AS a WHERE application_name LIKE %s"
        rows = session.execute(query, (f"lockstep {kind}%",)).fetchall()
        assert rows != [] and all(SECRET not in row for (row,) in rows)
    with raises("42501"):
        session.execute("SELECT * FROM lockstep.worker_status")
    gate.execute("SELECT pg_advisory_unlock(4711)")
    push(app.admin)
