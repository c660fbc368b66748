"""pg_dump, and a restore into a fresh cluster."""

from psycopg.types.json import Jsonb
from sessions import call, claim_and_advance, drain, log, push, push_many, raises


def register(session, name):
    event = {
        "aggregate_type": "user",
        "aggregate_id": name,
        "event_type": "registered",
        "unique": [{"op": "add", "scope": "name", "value": name}],
    }
    return call(session, "push_events", events=Jsonb([event]))[0][0]


def test_after_a_restore_positions_go_on_and_projections_see_everything_once(db, cluster, tmp_path):
    session = db.connect()
    session.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('behind')")
    call(session, "projection_create", name="f", event_types=["wanted"])
    seen = []
    for n in range(30):
        push(session, "one")
        push(session, f"aggregate-of-{n}", event_type="wanted", tenant="other")
        push_many(session, 3)
        with session.transaction(force_rollback=True):
            push(session, "one")  # a burnt ticket
    register(session, "ada")
    seen = claim_and_advance(session, max_events=50)
    assert len(seen) == 50
    before = {tenant: log(session, tenant) for tenant in ("", "other")}
    db.cluster.dump(tmp_path / "dump", db.name)
    lost = push(session, "one")  # after the dump

    fresh = cluster()
    fresh.restore(tmp_path / "dump", "restored")
    session = fresh.connect("restored")
    assert {tenant: log(session, tenant) for tenant in before} == before
    rows = call(session, "push_event", aggregate_type="order", aggregate_id="one", event_type="added")
    assert rows[0][1] == 31
    after = [rows[0][0], push(session, tenant="other"), *push_many(session, 2)]
    assert min(after) > max(before[""] + before["other"])
    assert min(after) <= lost + 1, "the sequence goes on where it was, it does not start anew"
    with raises("23505"):
        register(session, "ada")

    for tenant in before:
        everything = log(session, tenant)
        assert (seen if tenant == "" else []) + drain(session, "p", tenant=tenant) == everything
        assert drain(session, "behind", tenant=tenant, barrier=False) == everything
    assert drain(session, "f", tenant="other") == before["other"]
    positions = [position for tenant in before for position in log(session, tenant)]
    assert len(set(positions)) == len(positions)


def test_a_restore_keeps_definitions_owners_and_cursors(db, cluster, tmp_path):
    session = db.connect()
    session.execute("CREATE FUNCTION public.handle(lockstep.events) RETURNS void LANGUAGE sql AS ''")
    session.execute(
        """SELECT lockstep.projection_create('p', aggregate_types => '{order}', event_types => '{added}',
             batch_size => 7,
             handler => 'public.handle(lockstep.events)', max_failures => 3, retry_after => '2 minutes')"""
    )
    push(session)
    claim_and_advance(session)
    tables = ("projections", "projection_cursors", "events", "unique_keys")
    before = {table: session.execute(f"TABLE lockstep.{table}").fetchall() for table in tables}
    db.cluster.dump(tmp_path / "dump", db.name)
    fresh = cluster()
    fresh.restore(tmp_path / "dump", "restored")
    session = fresh.connect("restored")
    assert {table: session.execute(f"TABLE lockstep.{table}").fetchall() for table in tables} == before
    session.execute("SELECT lockstep.projection_alter('p', batch_size => 8)")


def test_every_table_and_sequence_of_the_extension_is_dumped(db):
    session = db.connect()
    rows = session.execute(
        """
        SELECT c.relname
        FROM pg_class AS c
        JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
        JOIN pg_extension AS e ON d.refobjid = e.oid AND e.extname = 'lockstep'
        WHERE c.relkind IN ('r', 'S') AND c.oid <> ALL (e.extconfig)
        """
    ).fetchall()
    assert rows == []
