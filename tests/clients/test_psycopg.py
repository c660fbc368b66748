"""psycopg 3, as an application uses it: types, transactions, errors, workers."""

import uuid
from datetime import UTC, datetime
from decimal import Decimal

import psycopg
import pytest
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb
from sessions import raises, start

PUSH = "SELECT * FROM lockstep.push_event(%s, %s, %s, payload => %s, expected_sequence => %s)"


@pytest.fixture
def connection(db):
    """A connection as psycopg opens it by default: the first statement begins a transaction."""
    connection = db.connect(autocommit=False, row_factory=namedtuple_row)
    yield connection
    connection.rollback()


def test_a_push_returns_exact_positions_and_a_time(connection):
    events = [
        {"aggregate_type": "order", "aggregate_id": "one", "event_type": "placed", "payload": {"n": n}}
        for n in range(12)
    ]
    rows = connection.execute("SELECT * FROM lockstep.push_events(%s)", (Jsonb(events),)).fetchall()
    connection.commit()
    assert [row.position for row in rows] == [1 + Decimal(n) / 1000000 for n in range(12)]
    assert str(rows[10].position) == "1.00001"
    assert [row.sequence for row in rows] == list(range(1, 13))
    assert abs(datetime.now(UTC) - rows[0].created_at).total_seconds() < 60
    stored = connection.execute("SELECT * FROM lockstep.read_events(after => %s)", (rows[8].position,)).fetchall()
    assert [event.position for event in stored] == [row.position for row in rows[9:]]
    assert stored[0].payload == {"n": 9}
    assert stored[0].metadata is None


def test_a_projection_and_its_read_model_move_in_one_transaction(db, connection):
    connection.execute("CREATE TABLE totals (order_id text PRIMARY KEY, total int NOT NULL)")
    connection.execute("SELECT lockstep.projection_create('totals', event_types => %s)", (["item_added"],))
    connection.commit()
    for order, price in (("one", 5), ("two", 7), ("one", 11)):
        connection.execute(
            "SELECT lockstep.push_event('order', %s, 'item_added', %s)", (order, Jsonb({"price": price}))
        )
        connection.execute("SELECT lockstep.push_event('order', %s, 'looked_at')", (order,))
        connection.commit()

    def work(crash_after=None):
        with db.connect(autocommit=False, row_factory=namedtuple_row) as worker:
            events = worker.execute("SELECT * FROM lockstep.projection_claim('totals', max_events => 2)").fetchall()
            for applied, event in enumerate(events):
                if applied == crash_after:
                    raise RuntimeError("the worker dies")
                worker.execute(
                    """INSERT INTO totals AS t VALUES (%s, %s)
                       ON CONFLICT (order_id) DO UPDATE SET total = t.total + EXCLUDED.total""",
                    (event.aggregate_id, event.payload["price"]),
                )
            worker.execute("SELECT lockstep.projection_advance('totals')")
            return len(events)

    with pytest.raises(RuntimeError):
        work(crash_after=1)
    assert [work(), work(), work()] == [2, 1, 0]
    rows = connection.execute("SELECT * FROM totals ORDER BY 1").fetchall()
    assert rows == [("one", 16), ("two", 7)]


def test_an_optimistic_writer_that_lost_reads_decides_and_pushes_again(db, connection):
    other = db.connect()
    connection.execute(PUSH, ("order", "one", "placed", None, 0))
    connection.commit()
    other.execute(PUSH, ("order", "one", "changed", None, 1))
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(PUSH, ("order", "one", "shipped", None, 1))
    connection.rollback()
    diagnostics = caught.value.diag
    assert diagnostics.sqlstate == "LS001"
    assert diagnostics.severity_nonlocalized == "ERROR"
    assert diagnostics.message_primary == 'aggregate "order/one" is at sequence 2, expected 1'
    assert diagnostics.message_detail == "Actual sequence 2, expected 1."
    assert diagnostics.message_hint
    rows = connection.execute("SELECT * FROM lockstep.aggregate_events('order', 'one', after_sequence => 1)").fetchall()
    assert [row.event_type for row in rows] == ["changed"]
    assert connection.execute(PUSH, ("order", "one", "shipped", None, rows[-1].sequence)).fetchone().sequence == 3
    connection.commit()


def test_a_push_whose_answer_was_lost_is_repeated_safely_by_its_event_id(db, connection):
    event = {"aggregate_type": "order", "aggregate_id": "one", "event_type": "placed", "event_id": str(uuid.uuid4())}
    event["expected_sequence"] = 0
    push = "SELECT * FROM lockstep.push_events(%s)"
    connection.execute(push, (Jsonb([event]),))
    connection.commit()
    again = db.connect(autocommit=False)
    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        again.execute(push, (Jsonb([event]),))
    again.rollback()
    assert caught.value.diag.constraint_name == "events_tenant_event_id_key"
    assert caught.value.diag.message_detail == f"Key (tenant, event_id)=(, {event['event_id']}) already exists."
    row = connection.execute("SELECT count(*), min(event_id::text) FROM lockstep.events").fetchone()
    assert row == (1, event["event_id"])


def test_the_classes_of_psycopg_fit_the_errors(db, connection):
    connection.execute("SELECT lockstep.projection_create('p')")
    connection.commit()
    for query, error in (
        ("SELECT lockstep.push_event(NULL, 'one', 'placed')", psycopg.errors.NullValueNotAllowed),
        ("SELECT lockstep.push_event('', 'one', 'placed')", psycopg.errors.InvalidParameterValue),
        ("SELECT lockstep.push_events('[]')", psycopg.errors.InvalidParameterValue),
        ("SELECT * FROM lockstep.projection_claim('unknown')", psycopg.errors.UndefinedObject),
        ("SELECT lockstep.projection_create('p')", psycopg.errors.DuplicateObject),
        (
            "BEGIN READ ONLY; SELECT lockstep.push_event('order', 'one', 'placed')",
            psycopg.errors.ReadOnlySqlTransaction,
        ),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT lockstep.barrier()", psycopg.errors.InvalidTransactionState),
    ):
        with pytest.raises(error):
            db.connect().execute(query)
    with raises("LS002"):
        connection.execute("SELECT lockstep.projection_advance('p')")


def test_a_position_as_a_float_is_refused_and_as_text_or_decimal_it_is_exact(connection):
    connection.execute("SELECT lockstep.projection_create('p')")
    connection.execute("SELECT setval('lockstep.ticket', %s)", (2**53 + 1,))  # beyond what a float tells apart
    event = {"aggregate_type": "order", "aggregate_id": "one", "event_type": "placed"}
    connection.execute("SELECT FROM lockstep.push_events(%s)", (Jsonb([event] * 3),))
    connection.commit()
    advance = "SELECT lockstep.projection_advance('p', %s)"
    batch = [row.position for row in connection.execute("SELECT * FROM lockstep.projection_claim('p')").fetchall()]
    assert str(batch[1]) == f"{2**53 + 2}.000001"
    with pytest.raises(psycopg.errors.UndefinedFunction), connection.transaction():
        connection.execute(advance, (float(batch[1]),))
    with raises("22023"), connection.transaction():
        connection.execute("SELECT lockstep.projection_advance('p', %s::float8::numeric)", (batch[1],))
    assert connection.execute(advance, (str(batch[0]),)).fetchone() == (batch[0],)
    assert connection.execute(advance, (batch[1],)).fetchone() == (batch[1],)
    connection.commit()
    rest = connection.execute("SELECT * FROM lockstep.projection_claim('p')").fetchall()
    assert [row.position for row in rest] == batch[2:]


def test_pushes_in_a_pipeline_and_with_prepared_statements_are_all_there(db, connection):
    with connection.pipeline():
        for n in range(50):
            connection.execute(PUSH, ("order", "one", "placed", Jsonb({"n": n}), n), prepare=True)
    connection.commit()
    rows = db.connect().execute("SELECT sequence, payload->'n' FROM lockstep.read_events()").fetchall()
    assert rows == [(n + 1, n) for n in range(50)]


def test_a_server_side_cursor_over_read_events_reads_what_was_settled_when_it_was_opened(db, connection):
    other = db.connect()
    for n in range(30):
        other.execute(PUSH, ("order", "one", "placed", None, n))
    with connection.cursor(name="events") as cursor:
        cursor.execute("SELECT * FROM lockstep.read_events()")
        first = cursor.fetchmany(10)
        other.execute(PUSH, ("order", "one", "placed", None, 30))
        rest = cursor.fetchall()
    assert [row.sequence for row in first + rest] == list(range(1, 31))


def test_workers_that_wait_for_each_other_share_the_work_and_apply_everything_once(db, connection):
    connection.execute("CREATE TABLE applied (position numeric, worker int)")
    connection.execute("SELECT lockstep.projection_create('p')")
    connection.commit()
    writer = db.connect()
    for n in range(100):
        writer.execute(PUSH, ("order", "one", "placed", None, n))

    def work(number):
        applied = 0
        with db.connect(autocommit=False) as worker:
            while True:
                rows = worker.execute("SELECT position FROM lockstep.projection_claim('p', 7, wait => true)").fetchall()
                if not rows:
                    worker.rollback()
                    return applied
                for (position,) in rows:
                    worker.execute("INSERT INTO applied VALUES (%s, %s)", (position, number))
                worker.execute("SELECT lockstep.projection_advance('p')")
                worker.commit()
                applied += len(rows)

    running = [start(work, number) for number in range(4)]
    assert sum(future.result(60) for future in running) == 100
    rows = connection.execute("SELECT position FROM applied ORDER BY position").fetchall()
    assert rows == connection.execute("SELECT position FROM lockstep.events ORDER BY position").fetchall()
