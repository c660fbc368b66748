"""The generation registry over real connections: each race, increments and sets at once, what readers see meanwhile, crashes, rights."""

import random
import time

import pytest
from psycopg.types.json import Jsonb
from server import wait_for_lock_wait, wait_until
from sessions import call, push, raises, start, start_together


@pytest.fixture
def session(db):
    """A session in a database with the resource `r` at generation 1, which `a` and `b` hold; `c` holds 0."""
    connection = db.connect()
    call(connection, "resource_create", resource="r", replicas=["a", "b", "c"])
    call(connection, "generation_increment", resource="r", replicas=["a", "b"])
    return connection


def begin(connection, target="c", resource="r", **arguments):
    """Begins a sync that must start; returns its token."""
    arguments = {"resource": resource, "target": target, "holder": "worker"} | arguments
    status, token, _, _ = call(connection, "replica_sync_begin", **arguments)[0]
    assert status == "started"
    return token


def finish(connection, token, target="c", resource="r", **arguments):
    arguments = {"resource": resource, "target": target, "token": token} | arguments
    return call(connection, "replica_sync_finish", **arguments)[0][0]


def held(connection, resource="r"):
    rows = connection.execute("SELECT replica, generation FROM lockstep.replicas WHERE resource = %s", (resource,))
    return dict(rows.fetchall())


def current(connection):
    return {replica for (replica,) in call(connection, "generation_current", resource="r")}


def increment(connection, replicas=None, resource="r"):
    return call(connection, "generation_increment", resource=resource, replicas=replicas)[0][0]


def waits(observer, connection):
    return wait_for_lock_wait(observer, connection.info.backend_pid)


# What happens during a sync of `c`; whether it names `a` as its source; how it ends; what the replicas hold then, and which of
# them are current.
RACES = {
    "nothing": ("", False, "current", {"a": 1, "b": 1, "c": 1}, {"a", "b", "c"}),
    "an event": ("generation_increment('r')", False, "outdated", {"a": 1, "b": 1, "c": 1}, set()),
    "a delete": ("resource_delete('r')", False, "gone", {}, set()),
    "a delete and a create": (
        "resource_delete('r'), lockstep.resource_create('r', '{a,c}')",
        False,
        "gone",
        {"a": 0, "c": 0},
        {"a", "c"},
    ),
    "the replica's delete": ("replica_delete('r', 'c')", False, "gone", {"a": 1, "b": 1}, {"a", "b"}),
    "the replica is invalid": ("replica_invalidate('r', 'c')", False, "gone", {"a": 1, "b": 1}, {"a", "b"}),
    "another is authoritative": (
        "replica_make_authoritative('r', 'b')",
        False,
        "outdated",
        {"a": 1, "b": 2, "c": 1},
        {"b"},
    ),
    "another than the source is authoritative": (
        "replica_make_authoritative('r', 'b')",
        True,
        "source_lost",
        {"a": 1, "b": 2, "c": 0},
        {"b"},
    ),
    "the target is authoritative": ("replica_make_authoritative('r', 'c')", True, "lost", {"a": 1, "b": 1, "c": 2}, {"c"}),
    "the source falls behind": ("generation_increment('r', '{b}')", True, "source_lost", {"a": 1, "b": 2, "c": 0}, {"b"}),
    "the source goes on": ("generation_increment('r', '{a}')", True, "outdated", {"a": 2, "b": 1, "c": 1}, {"a"}),
    "the source is invalid": ("replica_invalidate('r', 'a')", True, "source_lost", {"b": 1, "c": 0}, {"b"}),
    "the source is deleted": ("replica_delete('r', 'a')", True, "source_lost", {"b": 1, "c": 0}, {"b"}),
    "the source was invalid": (
        "replica_invalidate('r', 'a'), lockstep.generation_set('r', 'a', 1)",
        True,
        "source_lost",
        {"a": 1, "b": 1, "c": 0},
        {"a", "b"},
    ),
}


@pytest.mark.parametrize("waiting", [False, True], ids=["before finish", "while finish waits"])
@pytest.mark.parametrize("race", RACES)
def test_a_race(db, session, race, waiting):
    change, with_source, expected, holds, are_current = RACES[race]
    worker, other = db.connect(), db.connect()
    token = begin(worker, source="a" if with_source else None)
    if change and waiting:
        with other.transaction():
            other.execute(f"SELECT lockstep.{change}")
            finishing = start(finish, worker, token)
            waits(session, worker)
        assert finishing.result(30) == expected
    else:
        if change:
            other.execute(f"SELECT lockstep.{change}")
        assert finish(worker, token) == expected
    assert held(session) == holds
    assert current(session) == are_current
    if expected == "outdated":
        assert finish(worker, begin(worker)) == "current"
        assert "c" in current(session)


def test_a_claim_that_expired_is_taken_over_and_the_first_finish_is_lost(db, session):
    one, two = db.connect(), db.connect()
    first = begin(one, ttl="50 milliseconds")
    assert call(two, "replica_sync_begin", resource="r", target="c", holder="two")[0][0] == "busy"
    second = wait_until(lambda: call(two, "replica_sync_claim", holder="two", max_replicas=1))[0][2]
    assert second > first
    assert finish(one, first) == "lost"
    assert held(session)["c"] == 0
    assert not call(one, "replica_sync_renew", resource="r", target="c", token=first)[0][0]
    assert finish(two, second) == "current"
    assert finish(one, first) == "lost"
    assert held(session)["c"] == 1


def test_a_claims_time_is_counted_from_after_a_wait_for_one_that_rolled_back(db, session):
    one, two = db.connect(), db.connect()
    one.execute("BEGIN")
    begin(one)
    beginning = start(begin, two, ttl="10 seconds")
    waits(session, two)
    (before,) = session.execute("SELECT clock_timestamp()").fetchone()
    one.execute("ROLLBACK")
    beginning.result(30)
    (started, length) = session.execute(
        "SELECT sync_started_at, sync_expires_at - sync_started_at FROM lockstep.replicas WHERE replica = 'c'"
    ).fetchone()
    assert started >= before
    assert 9.9 < length.total_seconds() < 10.1


def test_a_renewed_claim_is_not_taken_over(db, session):
    one, two = db.connect(), db.connect()
    token = begin(one, ttl="100 milliseconds")
    assert call(one, "replica_sync_renew", resource="r", target="c", token=token, ttl="1 hour") == [(True,)]
    wait_until(
        lambda: session.execute(
            "SELECT clock_timestamp() > sync_started_at + interval '0.1 s' FROM lockstep.replicas WHERE replica = 'c'"
        ).fetchone()[0]
    )
    assert call(two, "replica_sync_claim", holder="two") == []
    assert finish(one, token) == "current"


def test_a_tombstone_is_not_purged_while_a_claim_is_live(db, session):
    worker = db.connect()
    token = begin(worker)
    call(session, "resource_delete", resource="r")
    assert call(session, "resource_purge", older_than="0") == [(0,)]
    assert finish(worker, token) == "gone"
    assert call(session, "resource_purge", older_than="1 hour") == [(0,)]
    assert call(session, "resource_purge", older_than="0") == [(1,)]
    assert finish(worker, token) == "gone"
    assert session.execute("SELECT count(*) FROM lockstep.replicas").fetchone() == (0,)


def test_increments_at_once_all_count(db, session):
    sessions = [db.connect() for _ in range(6)]

    def run(connection):
        return [increment(connection, ["a", "b"]) for _ in range(50)]

    futures = start_together([lambda connection=connection: run(connection) for connection in sessions])
    seen = [generation for future in futures for generation in future.result(60)]
    assert sorted(seen) == list(range(2, 302))
    assert held(session) == {"a": 301, "b": 301, "c": 0}


def test_of_two_increments_of_different_replicas_one_is_refused(db, session):
    one, two = db.connect(), db.connect()
    for _ in range(20):
        call(session, "replica_make_authoritative", resource="r", replica="a")
        generation = increment(session)
        for replica in "ab":
            call(session, "generation_set", resource="r", replica=replica, generation=generation)
        calls = start_together([lambda: increment(one, ["a"]), lambda: increment(two, ["b"])])
        states = sorted(getattr(future.exception(30), "sqlstate", None) or "" for future in calls)
        assert states == ["", "LS005"]
        assert sorted(held(session)[replica] for replica in "ab") == [generation, generation + 1]


def test_six_sessions_that_record_random_generations_never_lower_one(db, session):
    sessions = [db.connect() for _ in range(6)]
    reader = db.connect()

    def run(connection, seed):
        chance = random.Random(seed)
        results = []
        for n in range(150):
            generation = chance.randint(0, 1000 * (n + 1))  # so that it rises throughout
            answer = call(connection, "generation_set", resource="r", replica="c", generation=generation)[0][0]
            results.append((generation, answer))
        return results

    futures = start_together([lambda pair=pair: run(*pair) for pair in zip(sessions, range(6), strict=True)])
    seen = []
    while not all(future.done() for future in futures):
        seen.append(
            reader.execute(
                "SELECT p.generation, r.generation FROM lockstep.replicas AS p JOIN lockstep.resources AS r USING (resource)"
                " WHERE replica = 'c'"
            ).fetchone()
        )
    results = [result for future in futures for result in future.result(60)]
    assert seen == sorted(seen)
    applied = [generation for generation, answer in results if answer == "applied"]
    assert max(applied) == held(session)["c"] == max(generation for generation, _ in results)
    assert {answer for _, answer in results} >= {"applied", "downgrade"}
    assert len(set(seen)) > 3


def test_a_reader_sees_no_success_without_the_state(db):
    """Ten thousand finishes, beside a reader that polls."""
    admin, reader = db.connect(), db.connect()
    admin.execute(
        """
        SELECT lockstep.registry_follow('created', n::text, '{a,b,c,d}') FROM generate_series(1, 2500) AS n;
        CREATE PROCEDURE sync_all(target text) LANGUAGE plpgsql AS $$
        DECLARE sync record;
        BEGIN
            FOR n IN 1..2500 LOOP
                SELECT * INTO STRICT sync FROM lockstep.replica_sync_begin(n::text, target, target);
                COMMIT;
                ASSERT lockstep.replica_sync_finish(n::text, target, sync.token) = 'current';
                COMMIT;
            END LOOP;
        END $$;
        """
    )
    workers = [db.connect() for _ in range(4)]
    calls = [
        lambda worker=worker, target=target: worker.execute("CALL sync_all(%s)", (target,))
        for worker, target in zip(workers, "abcd", strict=True)
    ]
    futures = start_together(calls)
    polls = halfway = 0
    while not all(future.done() for future in futures):
        done, half, without = reader.execute(
            """
            SELECT count(*) FILTER (WHERE generation IS NOT NULL), count(*) FILTER (WHERE sync_token IS NOT NULL),
                   count(*) FILTER (WHERE (generation IS NULL) <> (synced_at IS NULL)
                                       OR (generation IS NULL) <> (due_at IS NOT NULL)
                                       OR (generation IS NOT NULL AND sync_token IS NOT NULL))
            FROM lockstep.replicas
            """
        ).fetchone()
        assert without == 0
        polls += 1
        halfway += 0 < done < 10_000 and half > 0
    for future in futures:
        future.result(0)
    assert polls > 10 and halfway > 5
    assert admin.execute("SELECT count(*) FROM lockstep.replica_status WHERE state = 'current'").fetchone() == (10_000,)


def test_many_workers_claim_disjoint_replicas_and_all_of_them(db):
    admin = db.connect()
    admin.execute("SELECT lockstep.registry_follow('created', n::text, '{a}') FROM generate_series(1, 400) AS n")
    workers = [db.connect() for _ in range(6)]

    def claim_all(connection):
        claimed = []
        while rows := call(connection, "replica_sync_claim", holder="worker", max_replicas=7, ttl="1 hour"):
            claimed += [row[:3] for row in rows]
        return claimed

    futures = start_together([lambda worker=worker: claim_all(worker) for worker in workers])
    claimed = [row for future in futures for row in future.result(60)]
    # A worker that found everything locked may have stopped early; none was claimed twice.
    claimed += [row[:3] for row in call(admin, "replica_sync_claim", holder="worker", max_replicas=400)]
    assert len(claimed) == 400
    assert len({resource for resource, _, _ in claimed}) == 400
    assert len({token for _, _, token in claimed}) == 400


def test_a_change_of_one_resource_holds_up_no_claim(db):
    admin, event = db.connect(), db.connect()
    admin.execute("SELECT lockstep.registry_follow('created', n::text, '{a}') FROM generate_series(1, 3) AS n")
    admin.execute("SET lock_timeout = '20s'")
    with event.transaction():
        increment(event, resource="1")
        assert {row[0] for row in call(admin, "replica_sync_claim", holder="worker")} == {"2", "3"}
    assert {row[0] for row in call(admin, "replica_sync_claim", holder="worker")} == {"1"}


def test_a_finish_that_waits_obeys_lock_timeout(db, session):
    worker, other = db.connect(), db.connect()
    token = begin(worker)
    worker.execute("SET lock_timeout = '100ms'")
    with other.transaction():
        increment(other)
        with raises("55P03"):
            finish(worker, token)
    assert finish(worker, token) == "outdated"


def test_a_killed_worker_leaves_a_claim_that_expires_and_a_killed_change_leaves_nothing(db, session):
    worker, other = db.connect(), db.connect()
    begin(worker, ttl="100 milliseconds")
    other.execute("BEGIN")
    increment(other)
    for victim in (worker, other):
        session.execute("SELECT pg_terminate_backend(%s, 30000)", (victim.info.backend_pid,))
    ((_, _, token, _, generation, _),) = wait_until(lambda: call(session, "replica_sync_claim", holder="next"))
    assert generation == 1
    assert finish(session, token) == "current"


def test_what_hands_out_tokens_and_incarnations_survives_a_crash(cluster, new_database):
    server = cluster(fsync="on", wal_writer_delay="10s")
    database = new_database(server, "crashing")
    session = database.connect()
    session.execute("SET synchronous_commit = off")
    tokens = []
    for n in range(3):
        tokens.append(call(session, "resource_create", resource=f"r{n}", replicas=["a"])[0][0])
        increment(session, resource=f"r{n}")
        how = [lambda n=n: begin(session, target="a", resource=f"r{n}"), lambda: call(session, "replica_sync_claim", holder="w")[0][2]]
        tokens.append(how[n % 2]())
        server.crash()
        server.start()
        session = server.connect("crashing")
        session.execute("SET synchronous_commit = off")
        assert session.execute("SELECT sync_token FROM lockstep.replicas WHERE resource = %s", (f"r{n}",)).fetchone() == (tokens[-1],)
    tokens.append(call(session, "resource_create", resource="last")[0][0])
    server.crash()
    server.start()
    session = server.connect("crashing")
    assert session.execute("SELECT incarnation FROM lockstep.resources WHERE resource = 'last'").fetchone() == (tokens[-1],)
    assert tokens == sorted(set(tokens))


def test_the_registry_survives_dump_and_restore_and_tokens_go_on(db, session, cluster, tmp_path):
    token = begin(session)
    call(session, "resource_create", resource="deleted")
    call(session, "resource_delete", resource="deleted")
    tables = ("SELECT * FROM lockstep.resources ORDER BY 1, 2", "SELECT * FROM lockstep.replicas ORDER BY 1, 2, 3")
    before = [session.execute(table).fetchall() for table in tables]
    last = call(session, "resource_create", resource="last")[0][0]
    call(session, "resource_delete", resource="last")
    call(session, "resource_purge", older_than="0")
    before[0] = session.execute(tables[0]).fetchall()
    db.cluster.dump(tmp_path / "dump", db.name)
    fresh = cluster()
    fresh.restore(tmp_path / "dump", "restored")
    restored = fresh.connect("restored")
    assert [restored.execute(table).fetchall() for table in tables] == before
    assert finish(restored, token) == "current"
    assert call(restored, "resource_create", resource="next")[0][0] > last


def test_a_claim_in_a_prepared_transaction_is_kept_and_counts_once_it_is_committed(db, session):
    worker, other = db.connect(), db.connect()
    worker.execute("BEGIN")
    token = begin(worker)
    worker.execute("PREPARE TRANSACTION 'sync'")
    assert call(other, "replica_sync_claim", holder="other") == []
    worker.execute("COMMIT PREPARED 'sync'")
    assert finish(other, token) == "current"


CLIENT = (
    "GRANT USAGE ON SCHEMA lockstep TO {role}",
    """GRANT EXECUTE ON FUNCTION lockstep.replica_sync_begin, lockstep.replica_sync_renew, lockstep.replica_sync_finish,
           lockstep.replicas_due, lockstep.replica_sync_claim, lockstep.generation_current, lockstep.generation_replicated
       TO {role}""",
)
FOLLOWER = (
    "GRANT USAGE ON SCHEMA lockstep TO {role}",
    "GRANT CREATE ON SCHEMA public TO {role}",
    """GRANT EXECUTE ON FUNCTION lockstep.registry_follow, lockstep.projection_create, lockstep.projection_run TO {role}""",
)
HANDLER = """
    CREATE FUNCTION public.follow(event lockstep.events) RETURNS void LANGUAGE sql
    BEGIN ATOMIC
        SELECT lockstep.registry_follow((event).event_type, (event).aggregate_id, '{near,far}', (event).tenant);
    END
"""


def test_events_become_current_replicas_with_roles_that_may_do_only_that(db, roles):
    follower, client = roles.connect(roles.create("follower", *FOLLOWER)), roles.connect(roles.create("client", *CLIENT))
    admin = roles.admin
    follower.execute(HANDLER)
    follower.execute("SELECT lockstep.projection_create('files', '{file}', handler => 'public.follow(lockstep.events)')")

    def events(*types, aggregate_id="f"):
        for event_type in types:
            event = {"aggregate_type": "file", "aggregate_id": aggregate_id, "event_type": event_type}
            call(admin, "push_events", events=Jsonb([event]))
        status, processed, skipped = call(follower, "projection_run", name="files")[0][:3]
        assert (status, processed, skipped) == ("ok", len(types), 0)

    def sync():
        claimed = call(client, "replica_sync_claim", holder="client")
        return sorted(
            (resource, target, finish(client, token, target, resource)) for resource, target, token, *_ in claimed
        )

    events("file_created", "file_updated")
    assert sync() == [("f", "far", "current"), ("f", "near", "current")]
    assert sync() == []
    events("file_updated")
    claimed = call(client, "replica_sync_claim", holder="client", max_replicas=1)[0]
    events("file_updated")
    assert finish(client, claimed[2], claimed[1], "f") == "outdated"
    assert sync() == [("f", "far", "current"), ("f", "near", "current")]
    events("file_updated")
    claimed = call(client, "replica_sync_claim", holder="client", max_replicas=1)[0]
    events("file_deleted", "file_updated", "file_renamed")
    assert finish(client, claimed[2], claimed[1], "f") == "gone"
    assert held(admin, "f") == {}
    events("file_created")
    assert finish(client, claimed[2], claimed[1], "f") == "gone"
    assert sync() == [("f", "far", "current"), ("f", "near", "current")]
    for session in (follower, client):
        for statement in (
            "SELECT lockstep.generation_set('f', 'near', 7)",
            "SELECT lockstep.resource_delete('f')",
            "UPDATE lockstep.replicas SET generation = 7",
            "SELECT nextval('lockstep.token')",
        ):
            with raises("42501"):
                session.execute(statement)


def test_a_handler_that_follows_waits_for_a_finish_and_tells_it_nothing_wrong(db, roles):
    admin, worker = roles.admin, db.connect()
    admin.execute(HANDLER)
    admin.execute("SELECT lockstep.projection_create('files', '{order}', handler => 'public.follow(lockstep.events)')")
    push(admin, "f", event_type="created")
    call(admin, "projection_run", name="files")
    token = begin(worker, "near", "f")
    push(admin, "f", event_type="updated")
    with worker.transaction():
        assert finish(worker, token, "near", "f") == "current"
        running = start(call, admin, "projection_run", name="files")
        waits(db.connect(), admin)
    assert running.result(30)[0][:2] == ("ok", 1)
    assert held(admin, "f") == {"near": 0, "far": None}
    assert admin.execute("SELECT generation FROM lockstep.resources").fetchone() == (1,)


def test_a_failed_sync_is_due_again_after_its_wait(db, session):
    token = begin(session)
    assert finish(session, token, error="no route to host") == "failed"
    assert call(session, "replica_sync_claim", holder="w") == []
    begun = time.monotonic()
    claimed = wait_until(lambda: call(session, "replica_sync_claim", holder="w"))
    assert 0.8 < time.monotonic() - begun < 10
    assert finish(session, claimed[0][2]) == "current"
