"""A streaming standby: it reads what is settled, writes and locks nothing, and goes on when it is promoted."""

import pytest
from psycopg.types.json import Jsonb
from sessions import call, claim_and_advance, drain, log, push, push_many, raises


def read(session, **arguments):
    return [row[1] for row in call(session, "read_events", **arguments)]


def test_a_standby_reads_what_lies_at_or_below_the_tenants_greatest_cursor(pair):
    database, standby = pair
    session, writer = database.connect(), database.connect()
    session.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    replica = standby.connect(database.name)
    first = push_many(session, 4)
    other = push(session, tenant="other")
    database.cluster.wait_for_replay(standby)
    assert log(replica) == first
    assert read(replica) == [], "no cursor says that anything is settled"

    claim_and_advance(session, "p", max_events=3)
    claim_and_advance(session, "q", max_events=1)
    database.cluster.wait_for_replay(standby)
    assert read(replica) == first[:3]
    assert read(replica, barrier=False) == first[:3]
    assert read(replica, after=first[0], max_events=1) == first[1:2]
    assert read(replica, event_types=["none"]) == []
    assert read(replica, tenant="other") == []

    writer.execute("BEGIN")
    late = push(writer)
    passed = push(session)
    claim_and_advance(session, "p", barrier=False)
    claim_and_advance(session, "p", tenant="other")
    database.cluster.wait_for_replay(standby)
    assert log(replica) == [*first, passed]
    assert read(replica) == first, "an event above an open writer is not settled"
    assert read(replica, tenant="other") == [other]

    writer.execute("COMMIT")
    assert drain(session, "q") == [*first[1:], late, passed]
    database.cluster.wait_for_replay(standby)
    assert read(replica) == [*first, late, passed]


def test_a_standby_reads_under_a_transaction_snapshot_and_one_aggregate_freely(pair):
    database, standby = pair
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    push(session, "one")
    claim_and_advance(session)
    push(session, "one")
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    with replica.transaction():
        replica.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert read(replica) == [1]
    assert len(call(replica, "aggregate_events", aggregate_type="order", aggregate_id="one")) == 2


EVENTS = Jsonb([{"aggregate_type": "order", "aggregate_id": "one", "event_type": "added"}])


@pytest.mark.parametrize("where", ["a standby", "a read-only transaction"])
def test_what_writes_or_locks_is_refused(request, db, where):
    if where == "a standby":
        database, standby = request.getfixturevalue("pair")
        with database.connect() as session:
            session.execute("SELECT lockstep.projection_create('p')")
        database.cluster.wait_for_replay(standby)
        session, transaction = standby.connect(database.name), ""
    else:
        session, transaction = db.connect(), "SET TRANSACTION READ ONLY"
        session.execute("SELECT lockstep.projection_create('p')")
    refused = {
        "push_event": ("'order', 'one', 'added'", ()),
        "push_events": ("%s", (EVENTS,)),
        "ticket_resync": ("", ()),
        "after_data_loss": ("", ()),
        "projection_create": ("'new'", ()),
        "projection_alter": ("'p', batch_size => 1", ()),
        "projection_owner": ("'p', 'postgres'", ()),
        "projection_drop": ("'p'", ()),
        "projection_claim": ("'p'", ()),
        "projection_advance": ("'p'", ()),
        "resource_create": ("'new'", ()),
        "resource_delete": ("'r'", ()),
        "resource_purge": ("'1 day'", ()),
        "generation_increment": ("'r'", ()),
        "generation_set": ("'r', 'a', 1", ()),
        "replica_make_authoritative": ("'r', 'a'", ()),
        "replica_delete": ("'r', 'a'", ()),
        "replica_invalidate": ("'r', 'a'", ()),
        "replica_sync_begin": ("'r', 'a', 'w'", ()),
        "replica_sync_renew": ("'r', 'a', 1", ()),
        "replica_sync_finish": ("'r', 'a', 1", ()),
        "replicas_due": ("", ()),
        "replica_sync_claim": ("'w'", ()),
        "registry_follow": ("'updated', 'r'", ()),
    }
    if where == "a standby":
        refused |= dict.fromkeys(("barrier", "horizon", "projection_due"), ("", ()))
        refused["projection_claim_state"] = ("'p'", ())
    for name, (arguments, values) in refused.items():
        with raises("25006") as caught, session.transaction():
            session.execute(transaction or "SELECT")
            session.execute(f"SELECT * FROM lockstep.{name}({arguments})", values)
        assert name in caught.value.diag.message_primary
        assert caught.value.diag.message_hint


def test_a_standby_shows_the_registry(pair):
    database, standby = pair
    session = database.connect()
    call(session, "resource_create", resource="r", replicas=["a", "b"])
    call(session, "generation_increment", resource="r", replicas=["a"])
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    assert call(replica, "generation_current", resource="r") == [("a",)]
    assert call(replica, "generation_replicated", resource="r", source="a", target="b") == [(1,)]
    states = replica.execute("SELECT replica, state FROM lockstep.replica_status ORDER BY 1").fetchall()
    assert states == [("a", "current"), ("b", "outdated")]


def test_a_promoted_standby_goes_on_above_the_old_positions_and_loses_nothing(pair):
    database, standby = pair
    session, writer = database.connect(), database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    before = [push(session) for _ in range(5)]
    seen = claim_and_advance(session, max_events=2)
    writer.execute("BEGIN")
    push(writer)
    last = push(session)
    database.cluster.wait_for_replay(standby)
    database.cluster.crash()
    standby.promote()
    session = standby.connect(database.name)
    after = [push(session) for _ in range(3)]
    assert min(after) > last
    assert seen + drain(session) == [*before, last, *after] == log(session)
