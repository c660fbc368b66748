"""Every argument of every function: NULL, and what is no value for it."""

import pytest
from sessions import push, raises

FUNCTIONS = """
    SELECT p.proname,
           array(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY AS a (t, n) ORDER BY n),
           p.proargnames[1:p.pronargs], p.proisstrict,
           CASE WHEN p.prorettype = 'trigger'::regtype THEN 't' ELSE p.prokind END
    FROM pg_proc AS p
    JOIN pg_depend AS d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
    JOIN pg_extension AS e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'lockstep'
    ORDER BY 1
"""

# An expression that is valid wherever the argument occurs, by name.
VALID = {
    "after": "0",
    "after_sequence": "0",
    "aggregate_id": "'one'",
    "aggregate_type": "'order'",
    "aggregate_types": "ARRAY['order']",
    "barrier": "true",
    "batch_size": "10",
    "error": "'no'",
    "event_position": "2",
    "event_type": "'added'",
    "event_types": "ARRAY['added']",
    "events": """'[{"aggregate_type": "order", "aggregate_id": "one", "event_type": "added"}]'""",
    "expected_sequence": "2",
    "force": "false",
    "generation": "7",
    "handler": "'public.handle(lockstep.events)'",
    "holder": "'a'",
    "if_not_exists": "true",
    "incarnation": "1",
    "lock_delay": "'0'",
    "max_duration": "'1 minute'",
    "max_events": "1",
    "max_failures": "5",
    "max_position": "2",
    "max_replicas": "10",
    "max_rows": "10",
    "metadata": "'{}'",
    "min_hold": "'0'",
    "name": "'p'",
    "names": "ARRAY['p']",
    "older_than": "'1 day'",
    "owner": "current_user",
    "payload": "'{}'",
    "reason": "'test'",
    "missing_at_source": "false",
    "replica": "'a'",
    "replicas": "ARRAY['a']",
    "resource": "'r'",
    "retry_after": "'1 second'",
    "source": "'a'",
    "start_after": "0",
    "target": "'c'",
    "tenant": "''",
    "timeout": "'1 millisecond'",
    "token": "(SELECT last_value FROM lockstep.token)",
    "ttl": "'1 minute'",
    "up_to": "2",
    "wait": "false",
    "backoff": "'1 second'",
    "delay": "'1 second'",
    "job_id": "1",
    "job_ids": "ARRAY[1]",
    "key": "'k'",
    "kind": "'a'",
    "max_attempts": "3",
    "max_backoff": "'1 minute'",
    "max_in_progress": "1",
    "max_jobs": "1",
    "on_twin": "'keep'",
    "priority": "0",
    "queue": "'q'",
    "tokens": "ARRAY[1]",
}

# Where NULL has a meaning, as the reference says.
MEANS_SOMETHING = {
    "aggregate_events": {"max_events"},
    "lease_acquire": {"metadata"},
    "lease_renew": {"ttl"},
    "generation_increment": {"replicas"},
    "generation_set": {"incarnation"},
    "projection_advance": {"up_to"},
    "projection_alter": {
        "aggregate_types",
        "batch_size",
        "event_types",
        "handler",
        "max_failures",
        "retry_after",
    },
    "projection_claim": {"max_events", "max_position"},
    "projection_create": {"aggregate_types", "event_types", "handler", "start_after"},
    "projection_due": {"names"},
    "projection_pause": {"tenant"},
    "projection_resume": {"tenant"},
    "projection_run": {"max_duration", "max_events"},
    "push_event": {"expected_sequence", "metadata", "payload"},
    "read_events": {"aggregate_types", "event_types"},
    "replica_sync_begin": {"source"},
    "replica_sync_claim": {"tenant"},
    "replica_sync_finish": {"error"},
    "replicas_due": {"tenant"},
    "job_claim": {"tenant"},
    "job_enqueue": {"key", "max_attempts"},
    "job_fail": {"retry_after"},
    "job_purge": {"tenant"},
    "job_reap": {"tenant"},
    "queue_configure": {"backoff", "max_backoff", "max_in_progress", "tenant"},
    "queue_pause": {"tenant"},
    "queue_resume": {"tenant"},
}

CLAIM = "SELECT * FROM lockstep.projection_claim('p')"
HANDLER = "SELECT lockstep.projection_alter('p', handler => 'public.handle(lockstep.events)', max_failures => 1);"
DEAD_LETTER = f"{HANDLER} {CLAIM}; SELECT lockstep.projection_fail('p', 2, 'no')"

LEASE = "SELECT lockstep.lease_acquire('p', 'a')"
JOB = """SELECT setval('lockstep.job_id', 1, false), setval('lockstep.token', 1, false);
         SELECT lockstep.job_enqueue('q', 'k', 'b'); SELECT lockstep.job_claim('q', 'w')"""

# What must be done before a call with valid arguments.
BEFORE = {
    "failed_event_discard": DEAD_LETTER,
    "failed_event_retry": DEAD_LETTER,
    "lease_guard": LEASE,
    "lease_release": LEASE,
    "lease_renew": LEASE,
    "projection_advance": CLAIM,
    "projection_fail": CLAIM,
    "projection_run": HANDLER,
    "resource_create": "SELECT lockstep.resource_delete('r')",
    "job_claim": JOB,
    "job_complete": JOB,
    "job_fail": JOB,
    "job_guard": JOB,
    "job_renew": JOB,
}


@pytest.fixture
def session(db):
    """A session in a database with two events, the projection `p`, a handler, and the resource `r`, of which `c` is behind."""
    connection = db.connect()
    connection.execute(
        """
        SELECT lockstep.projection_create('p');
        SELECT lockstep.resource_create('r', '{a,c}');
        SELECT lockstep.generation_increment('r', '{a}');
        CREATE FUNCTION public.handle(lockstep.events) RETURNS void LANGUAGE sql AS '';
        CREATE FUNCTION public.mishandle(int) RETURNS void LANGUAGE sql AS '';
        """
    )
    push(connection, "one")
    push(connection, "one")
    return connection


def functions(connection):
    rows = connection.execute(FUNCTIONS).fetchall()
    assert len(rows) >= 14
    return rows


def run(session, name, types, values):
    """Calls the function positionally, in a transaction that is rolled back; returns its rows."""
    arguments = ", ".join(f"({value})::{type_}" for value, type_ in zip(values, types, strict=True))
    with session.transaction(force_rollback=True):
        if name in BEFORE:
            session.execute(BEFORE[name])
        return session.execute(f"SELECT * FROM lockstep.{name}({arguments})").fetchall()


def test_no_function_is_strict_and_none_is_overloaded(session):
    rows = functions(session)
    assert [name for name, _, _, strict, _ in rows if strict] == []
    assert len({name for name, *_ in rows}) == len(rows)


def test_every_argument_has_a_name_that_needs_no_quotes(session):
    names = {argument for _, _, arguments, *_ in functions(session) for argument in arguments or []}
    for name in names:
        session.execute(f"CREATE FUNCTION pg_temp.takes({name} int) RETURNS int LANGUAGE sql AS 'SELECT 1'")
        session.execute(f"SELECT pg_temp.takes({name} => 1)")
        session.execute("DROP FUNCTION pg_temp.takes")


def test_null_for_any_argument_is_22004_naming_it_or_has_its_documented_meaning(session):
    problems, tried = [], 0
    for function, types, names, _, kind in functions(session):
        if kind != "f":
            continue
        unknown = [name for name in names or [] if name not in VALID]
        assert not unknown, f"{function}: add a valid value for {unknown} to this test"
        valid = [VALID[name] for name in names or []]
        returned = run(session, function, types, valid)
        if any(row[0] is None for row in returned):
            problems.append(f"{function} with valid arguments returned {returned}")
        for place, name in enumerate(names or []):
            tried += 1
            values = [*valid[:place], "NULL", *valid[place + 1 :]]
            documented = name in MEANS_SOMETHING.get(function, ())
            try:
                returned = run(session, function, types, values)
            except Exception as error:
                state, text = error.diag.sqlstate, error.diag.message_primary
                explained = error.diag.message_detail and error.diag.message_hint
                if documented or state != "22004" or f'"{name}"' not in text or not explained:
                    problems.append(f"{function}({name} => NULL) raised {state}: {text}")
            else:
                if not documented or any(row[0] is None for row in returned):
                    problems.append(f"{function}({name} => NULL) returned {returned}")
    assert problems == []
    assert tried >= 50


def test_a_null_in_an_array_of_names_is_refused(session):
    for argument, query in (
        ("aggregate_types", "SELECT lockstep.read_events(aggregate_types => ARRAY['a', NULL])"),
        ("event_types", "SELECT lockstep.read_events(event_types => ARRAY[NULL]::text[])"),
        ("aggregate_types", "SELECT lockstep.projection_create('n', aggregate_types => ARRAY[NULL, 'a'])"),
        ("event_types", "SELECT lockstep.projection_alter('p', event_types => ARRAY[NULL]::text[])"),
        ("names", "SELECT lockstep.projection_due(ARRAY['p', NULL])"),
        ("replicas", "SELECT lockstep.resource_create('n', ARRAY['a', NULL])"),
        ("replicas", "SELECT lockstep.generation_increment('r', ARRAY['a', NULL])"),
        ("replicas", "SELECT lockstep.registry_follow('updated', 'r', ARRAY['a', NULL])"),
        ("job_ids", "SELECT lockstep.job_renew(ARRAY[1, NULL], ARRAY[1, 2])"),
        ("tokens", "SELECT lockstep.job_renew(ARRAY[1, 2], ARRAY[NULL, 2])"),
    ):
        with raises("22004") as caught:
            session.execute(query)
        assert argument in caught.value.diag.message_primary


LONG = "repeat('x', 801)"

BAD = [
    ("push_event('', 'one', 'added')", "aggregate_type"),
    ("push_event('order', '', 'added')", "aggregate_id"),
    ("push_event('order', 'one', '')", "event_type"),
    (f"push_event({LONG}, 'one', 'added')", "aggregate_type"),
    (f"push_event('order', {LONG}, 'added')", "aggregate_id"),
    (f"push_event('order', 'one', {LONG})", "event_type"),
    (f"push_event('order', 'one', 'added', tenant => {LONG})", "tenant"),
    ("push_event('order', 'one', 'added', expected_sequence => -1)", "expected_sequence"),
    (f"barrier({LONG})", "tenant"),
    (f"horizon({LONG})", "tenant"),
    ("read_events(after => -1)", "after"),
    ("read_events(after => 1.0000001)", "after"),
    ("read_events(after => 'NaN')", "after"),
    ("read_events(after => 'Infinity')", "after"),
    ("read_events(after => 9223372036854775808)", "after"),
    ("read_events(after => 1e40)", "after"),
    ("read_events(after => 1.00000000000000000000000000000000000000000000000000000000001)", "after"),
    ("read_events(max_events => 0)", "max_events"),
    ("read_events(max_events => -1)", "max_events"),
    ("read_events(aggregate_types => ARRAY[''])", "aggregate_types"),
    (f"read_events(event_types => ARRAY[{LONG}])", "event_types"),
    ("aggregate_events('', 'one')", "aggregate_type"),
    ("aggregate_events('order', '')", "aggregate_id"),
    ("aggregate_events('order', 'one', after_sequence => -1)", "after_sequence"),
    ("aggregate_events('order', 'one', max_events => 0)", "max_events"),
    ("projection_create('')", "name"),
    (f"projection_create({LONG})", "name"),
    ("projection_create('n', batch_size => 0)", "batch_size"),
    ("projection_create('n', max_failures => 0)", "max_failures"),
    ("projection_create('n', retry_after => '-1 second')", "retry_after"),
    ("projection_create('n', retry_after => '-1 day 1 second')", "retry_after"),
    ("projection_create('n', start_after => -1)", "start_after"),
    ("projection_create('n', handler => 'public.mishandle(int)')", "handler"),
    ("projection_create('n', event_types => ARRAY[''])", "event_types"),
    ("projection_alter('')", "name"),
    ("projection_alter('p', batch_size => 0)", "batch_size"),
    ("projection_alter('p', max_failures => -1)", "max_failures"),
    ("projection_alter('p', retry_after => '-1 month')", "retry_after"),
    ("projection_alter('p', handler => 'public.mishandle(int)')", "handler"),
    ("projection_drop('')", "name"),
    ("projection_owner('', current_user::regrole)", "name"),
    ("projection_owner('p', 0::regrole)", "owner"),
    ("projection_claim('')", "name"),
    ("projection_claim('p', max_events => 0)", "max_events"),
    ("projection_claim('p', max_position => -1)", "max_position"),
    ("projection_claim('p', max_position => 0.0000001)", "max_position"),
    (f"projection_claim('p', tenant => {LONG})", "tenant"),
    ("projection_claim_state('')", "name"),
    ("projection_advance('')", "name"),
    ("projection_advance('p', up_to => -1)", "up_to"),
    ("projection_advance('p', up_to => 'NaN')", "up_to"),
    ("projection_fail('', 1, 'no')", "name"),
    ("projection_fail('p', -1, 'no')", "event_position"),
    ("projection_fail('p', 'NaN', 'no')", "event_position"),
    (f"projection_fail('p', 1, 'no', tenant => {LONG})", "tenant"),
    ("projection_run('')", "name"),
    ("projection_run('p', max_events => 0)", "max_events"),
    ("projection_run('p', max_duration => '0')", "max_duration"),
    ("projection_run('p', max_duration => '-1 second')", "max_duration"),
    (f"projection_run('p', tenant => {LONG})", "tenant"),
    ("projection_wait('', 1)", "name"),
    ("projection_wait('p', -1)", "up_to"),
    ("projection_wait('p', 'Infinity')", "up_to"),
    ("projection_wait('p', 1, timeout => '0')", "timeout"),
    ("projection_wait('p', 1, timeout => '-1 second')", "timeout"),
    (f"projection_wait('p', 1, tenant => {LONG})", "tenant"),
    ("projection_reset('')", "name"),
    ("projection_reset('p', up_to => -1)", "up_to"),
    ("projection_reset('p', up_to => 1.5)", "up_to"),
    ("projection_reset('p', up_to => 3)", "up_to"),
    (f"projection_reset('p', tenant => {LONG})", "tenant"),
    ("projection_pause('')", "name"),
    (f"projection_pause('p', tenant => {LONG})", "tenant"),
    ("projection_resume('')", "name"),
    (f"projection_resume('p', tenant => {LONG})", "tenant"),
    ("failed_event_retry('', 1)", "name"),
    ("failed_event_retry('p', 1)", "event_position"),
    ("failed_event_retry('p', -1)", "event_position"),
    ("failed_event_discard('', 1)", "name"),
    ("failed_event_discard('p', 1)", "event_position"),
    ("failed_event_discard('p', 'NaN')", "event_position"),
    ("projection_due(max_rows => 0)", "max_rows"),
    ("lease_acquire('', 'a')", "name"),
    (f"lease_acquire({LONG}, 'a')", "name"),
    ("lease_acquire('l', '')", "holder"),
    (f"lease_acquire('l', {LONG})", "holder"),
    ("lease_acquire('l', 'a', ttl => '0')", "ttl"),
    ("lease_acquire('l', 'a', ttl => '-1 second')", "ttl"),
    ("lease_acquire('l', 'a', ttl => '1001 years')", "ttl"),
    ("lease_acquire('l', 'a', ttl => '178000000 years')", "ttl"),
    ("lease_acquire('l', 'a', min_hold => '-1 second')", "min_hold"),
    ("lease_acquire('l', 'a', min_hold => '1001 years')", "min_hold"),
    ("lease_acquire('l', 'a', lock_delay => '-1 month')", "lock_delay"),
    ("lease_acquire('l', 'a', lock_delay => '1001 years')", "lock_delay"),
    ("lease_renew('', 1)", "name"),
    ("lease_renew('l', 1, ttl => '0')", "ttl"),
    ("lease_renew('l', 1, ttl => '-1 second')", "ttl"),
    ("lease_release('', 1)", "name"),
    ("lease_guard('', 1)", "name"),
    (f"lease_guard({LONG}, 1)", "name"),
    ("lease_guard_at_commit('', 1)", "name"),
    ("lease_steal('', 'a', '1 s', 'test')", "name"),
    ("lease_steal('l', '', '1 s', 'test')", "holder"),
    ("lease_steal('l', 'a', '0', 'test')", "ttl"),
    ("lease_steal('l', 'a', '1 s', '')", "reason"),
    ("lease_delete_expired('-1 second')", "older_than"),
    ("lease_delete_expired('1001 years')", "older_than"),
    ("projection_due(ARRAY[''])", "names"),
    ("resource_create('')", "resource"),
    (f"resource_create({LONG})", "resource"),
    ("resource_create('n', ARRAY[''])", "replicas"),
    (f"resource_create('n', tenant => {LONG})", "tenant"),
    ("resource_delete('')", "resource"),
    ("resource_purge('-1 second')", "older_than"),
    ("resource_purge('1100 years')", "older_than"),
    (f"resource_purge('1 day', {LONG})", "tenant"),
    ("generation_increment('')", "resource"),
    ("generation_increment('r', ARRAY['a', ''])", "replicas"),
    ("generation_set('', 'a', 1)", "resource"),
    ("generation_set('r', '', 1)", "replica"),
    (f"generation_set('r', {LONG}, 1)", "replica"),
    ("generation_set('r', 'a', -1)", "generation"),
    ("generation_replicated('', 'a', 'c')", "resource"),
    ("generation_replicated('r', '', 'c')", "source"),
    ("generation_replicated('r', 'a', '')", "target"),
    ("generation_current('')", "resource"),
    ("replica_make_authoritative('r', '')", "replica"),
    ("replica_delete('r', '')", "replica"),
    ("replica_invalidate('r', '')", "replica"),
    ("replica_sync_begin('', 'c', 'w')", "resource"),
    ("replica_sync_begin('r', '', 'w')", "target"),
    ("replica_sync_begin('r', 'c', '')", "holder"),
    ("replica_sync_begin('r', 'c', 'w', '')", "source"),
    ("replica_sync_begin('r', 'c', 'w', ttl => '0')", "ttl"),
    ("replica_sync_begin('r', 'c', 'w', ttl => '-1 second')", "ttl"),
    ("replica_sync_renew('r', '', 1)", "target"),
    ("replica_sync_renew('r', 'c', 1, '0')", "ttl"),
    ("replica_sync_finish('', 'c', 1)", "resource"),
    ("replica_sync_finish('r', '', 1)", "target"),
    ("replicas_due(0)", "max_replicas"),
    (f"replicas_due(1, {LONG})", "tenant"),
    ("replica_sync_claim('')", "holder"),
    ("replica_sync_claim('w', 0)", "max_replicas"),
    ("replica_sync_claim('w', 1, '0')", "ttl"),
    (f"replica_sync_claim('w', tenant => {LONG})", "tenant"),
    ("registry_follow('', 'r')", "event_type"),
    ("registry_follow('updated', '')", "resource"),
    ("job_enqueue('', 'k', 'a')", "queue"),
    ("job_enqueue('q', '', 'a')", "key"),
    ("job_enqueue('q', 'k', '')", "kind"),
    ("job_enqueue(repeat('x', 601), 'k', 'a')", "queue"),
    ("job_enqueue('q', repeat('x', 601), 'a')", "key"),
    ("job_enqueue('q', 'k', repeat('x', 601))", "kind"),
    (f"job_enqueue('q', 'k', 'a', tenant => {LONG})", "tenant"),
    ("job_enqueue('q', 'k', 'a', max_attempts => 0)", "max_attempts"),
    ("job_enqueue('q', 'k', 'a', delay => '-1 second')", "delay"),
    ("job_enqueue('q', 'k', 'a', delay => '2000 years')", "delay"),
    ("job_enqueue('q', 'k', 'a', on_twin => 'Keep')", "on_twin"),
    ("job_claim('', 'w')", "queue"),
    ("job_claim('q', '')", "holder"),
    (f"job_claim('q', {LONG})", "holder"),
    ("job_claim('q', 'w', max_jobs => 0)", "max_jobs"),
    ("job_claim('q', 'w', ttl => '0')", "ttl"),
    ("job_claim('q', 'w', ttl => '-1 second')", "ttl"),
    (f"job_claim('q', 'w', tenant => {LONG})", "tenant"),
    ("job_renew('{1}', '{1,2}')", "tokens"),
    ("job_renew('{1}', '{1}', '0')", "ttl"),
    ("job_fail(1, 1, 'no', '-1 second')", "retry_after"),
    ("job_purge('-1 second')", "older_than"),
    (f"job_purge('1 second', {LONG})", "tenant"),
    (f"job_reap({LONG})", "tenant"),
    ("queue_configure('')", "queue"),
    ("queue_configure('q', -2)", "max_in_progress"),
    ("queue_configure('q', 10001)", "max_in_progress"),
    ("queue_configure('q', backoff => '-1 second')", "backoff"),
    ("queue_configure('q', max_backoff => '-1 second')", "max_backoff"),
    ("queue_pause('')", "queue"),
    (f"queue_resume('q', {LONG})", "tenant"),
]


@pytest.mark.parametrize("expression, argument", BAD, ids=[expression[:60] for expression, _ in BAD])
def test_a_bad_argument_is_22023_naming_it(session, expression, argument):
    with raises("22023") as caught:
        session.execute(f"SELECT * FROM lockstep.{expression}")
    assert argument in caught.value.diag.message_primary


def test_an_infinite_interval_is_no_duration(session):
    if session.info.server_version < 170000:
        pytest.skip("intervals are finite before PostgreSQL 17")
    for value in ("infinity", "-infinity"):
        for call in (
            "projection_create('n', retry_after => %s)",
            "projection_run('p', max_duration => %s)",
            "projection_wait('p', 1, timeout => %s)",
            "lease_acquire('l', 'a', ttl => %s)",
            "lease_acquire('l', 'a', min_hold => %s)",
            "lease_delete_expired(%s)",
            "resource_purge(%s)",
            "replica_sync_begin('r', 'c', 'w', ttl => %s)",
            "replica_sync_renew('r', 'c', 1, %s)",
            "replica_sync_claim('w', ttl => %s)",
        ):
            with raises("22023"):
                session.execute(f"SELECT lockstep.{call}", (value,))


GOOD = '{"aggregate_type": "order", "aggregate_id": "two", "event_type": "added"}'


@pytest.mark.parametrize(
    "events, named",
    [
        ("{}", ["array"]),
        ("[]", ["array"]),
        ("null", ["array"]),
        ("1", ["array"]),
        ("[1]", ["event 0"]),
        (f"[{GOOD}, null]", ["event 1"]),
        (f"[{GOOD}, []]", ["event 1"]),
        (f"[{GOOD}, {{}}]", ["event 1"]),
        (f'[{GOOD}, {GOOD[:-1]}, "version": 1}}]', ["event 1", '"version"']),
        (f'[{GOOD[:-1]}, "Payload": 1}}]', ["event 0", '"Payload"']),
        ('[{"aggregate_id": "a", "event_type": "t"}]', ["event 0", '"aggregate_type"']),
        ('[{"aggregate_type": "order", "event_type": "t"}]', ["event 0", '"aggregate_id"']),
        ('[{"aggregate_type": "order", "aggregate_id": "a"}]', ["event 0", '"event_type"']),
        ('[{"aggregate_type": "", "aggregate_id": "a", "event_type": "t"}]', ["event 0", '"aggregate_type"']),
        ('[{"aggregate_type": "order", "aggregate_id": 7, "event_type": "t"}]', ["event 0", '"aggregate_id"']),
        ('[{"aggregate_type": "order", "aggregate_id": "a", "event_type": null}]', ["event 0", '"event_type"']),
        (f'[{GOOD[:-1]}, "expected_sequence": -1}}]', ["event 0", '"expected_sequence"']),
        (f'[{GOOD[:-1]}, "expected_sequence": 1.5}}]', ["event 0", '"expected_sequence"']),
        (f'[{GOOD[:-1]}, "expected_sequence": "1"}}]', ["event 0", '"expected_sequence"']),
        (f'[{GOOD[:-1]}, "expected_sequence": null}}]', ["event 0", '"expected_sequence"']),
        (f'[{GOOD[:-1]}, "expected_sequence": 9223372036854775808}}]', ["event 0", '"expected_sequence"']),
        (f'[{GOOD[:-1]}, "event_id": "x"}}]', ["event 0", '"event_id"']),
        (f'[{GOOD[:-1]}, "event_id": 1}}]', ["event 0", '"event_id"']),
        (f'[{GOOD[:-1]}, "unique": {{}}}}]', ["event 0", '"unique"']),
        (f'[{GOOD[:-1]}, "unique": [1]}}]', ["event 0", '"unique"']),
        (f'[{GOOD[:-1]}, "unique": [{{"op": "add", "scope": "s"}}]}}]', ["event 0", '"unique"']),
        (f'[{GOOD[:-1]}, "unique": [{{"op": "put", "scope": "s", "value": "v"}}]}}]', ["event 0", '"unique"']),
        (f'[{GOOD[:-1]}, "unique": [{{"op": "add", "scope": "", "value": "v"}}]}}]', ["event 0", '"unique"']),
        (
            f'[{GOOD[:-1]}, "unique": [{{"op": "add", "scope": "s", "value": "v", "x": 1}}]}}]',
            ["event 0", '"unique"'],
        ),
    ],
)
def test_a_bad_array_of_events_is_22023_naming_the_element_and_the_key_and_pushes_nothing(session, events, named):
    with raises("22023") as caught:
        session.execute("SELECT * FROM lockstep.push_events(%s)", (events,))
    for part in named:
        assert part in caught.value.diag.message_primary
    assert session.execute("SELECT count(*) FROM lockstep.events").fetchone() == (2,)


@pytest.mark.parametrize(
    "expression",
    [
        "projection_claim('unknown')",
        "projection_claim('unknown', wait => true)",
        "projection_drop('unknown')",
        "projection_alter('unknown')",
        "projection_owner('unknown', current_user::regrole)",
        "projection_due(ARRAY['p', 'unknown'])",
        "projection_run('unknown')",
        "projection_wait('unknown', 1)",
        "projection_reset('unknown')",
        "projection_pause('unknown')",
        "projection_resume('unknown')",
        "failed_event_retry('unknown', 1)",
        "failed_event_discard('unknown', 1)",
        "generation_increment('unknown')",
        "generation_set('unknown', 'a', 1)",
        "generation_replicated('unknown', 'a', 'c')",
        "generation_current('unknown')",
        "replica_make_authoritative('unknown', 'a')",
        "replica_make_authoritative('r', 'unknown')",
        "replica_sync_begin('unknown', 'a', 'w')",
    ],
)
def test_what_is_unknown_is_42704_naming_it(session, expression):
    with raises("42704") as caught:
        session.execute(f"SELECT * FROM lockstep.{expression}")
    assert '"unknown"' in caught.value.diag.message_primary


def test_a_projection_that_exists_is_42710_unless_that_is_allowed(session):
    with raises("42710") as caught:
        session.execute("SELECT lockstep.projection_create('p')")
    assert "if_not_exists" in caught.value.diag.message_hint
    assert session.execute("SELECT lockstep.projection_create('p', if_not_exists => true)").fetchone() == (False,)
    assert session.execute("SELECT lockstep.projection_create('q', if_not_exists => true)").fetchone() == (True,)


def test_a_json_value_of_any_kind_is_kept_exactly(session):
    number = "123456789012345678901234567890.123456789"
    session.execute(
        "SELECT * FROM lockstep.push_event('order', 'one', 'added', payload => %s, metadata => %s)",
        (f'{{"n": {number}, "u": "\\u00e9\\"", "nested": [[], {{}}, null, -0.0]}}', "null"),
    )
    row = session.execute(
        """SELECT payload->>'n', payload->>'u', payload->'nested', metadata::text
           FROM lockstep.events ORDER BY position DESC LIMIT 1"""
    ).fetchone()
    assert row == (number, 'é"', [[], {}, None, 0.0], "null")
