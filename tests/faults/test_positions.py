"""The ticket sequence: starts that are old, sequences set back, limits, the cache."""

import pytest
from psycopg.types.json import Jsonb
from server import wait_for_lock_wait
from sessions import call, claim_and_advance, drain, log, push, push_many, raises, start


@pytest.mark.parametrize(
    "begin, jump",
    [
        (0, 2**33),
        (0, 2**43),
        (2**44 - 3, 2**33),  # the 44 bits of a start wrap between the writer and its readers
        (2**44 - 2, 1000),
        (5 * 2**44 + 17, 2**44 - 100),
    ],
)
def test_a_writers_start_that_is_many_tickets_old_is_respected(db, begin, jump):
    writer, other, reader, observer = (db.connect() for _ in range(4))
    observer.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('q')")
    if begin:
        observer.execute("SELECT setval('lockstep.ticket', %s)", (begin,))
    before = push(other)
    writer.execute("BEGIN")
    open_position = push(writer)
    assert open_position == begin + 2
    after = [push(other)]
    observer.execute("SELECT setval('lockstep.ticket', last_value + %s) FROM lockstep.ticket", (jump,))
    after += [push(other) for _ in range(3)]
    assert after[-1] > open_position + jump

    assert call(reader, "horizon") == [(before,)]
    assert claim_and_advance(reader, barrier=False) == [before]
    assert claim_and_advance(reader, barrier=False) == []
    with reader.transaction():
        rows = call(reader, "read_events", barrier=False)
        assert [row[1] for row in rows] == [before]
    waiting = start(claim_and_advance, reader, "q")
    assert wait_for_lock_wait(observer, reader.info.backend_pid) == "virtualxid"
    writer.execute("COMMIT")
    assert waiting.result(30) == [before, open_position, *after]
    assert drain(observer) == [open_position, *after]


def test_a_push_on_too_many_aggregates_is_refused_before_any_lock(db):
    holder, session, observer = db.connect(), db.connect(options="-c lock_timeout=5s"), db.connect()

    def events(numbers):
        return Jsonb([{"aggregate_type": "order", "aggregate_id": str(n), "event_type": "added"} for n in numbers])

    holder.execute("BEGIN")
    call(holder, "push_events", events=events(range(1000)))
    call(holder, "push_events", events=events(range(1000, 1001)))
    with raises("54000") as caught:  # whichever it locked first, it would wait for the holder
        call(session, "push_events", events=events(range(1001)))
    assert "1001" in caught.value.diag.message_detail and "1000" in caught.value.diag.message_detail
    assert caught.value.diag.message_hint
    holder.execute("ROLLBACK")
    assert len(call(session, "push_events", events=events(range(1000)))) == 1000
    assert len(log(observer)) == 1000


def test_a_push_of_too_many_events_is_refused_before_any_lock(db):
    holder, session = db.connect(), db.connect(options="-c lock_timeout=5s")
    with holder.transaction():
        push(holder, "one")
        with raises("54000") as caught:
            session.execute(
                """SELECT count(*) FROM lockstep.push_events(
                     (SELECT jsonb_agg('{"aggregate_type": "order", "aggregate_id": "one", "event_type": "t"}'::jsonb)
                      FROM generate_series(1, 1000001)))"""
            )
        assert caught.value.diag.message_detail == "Events given 1000001, at most 1000000."


def test_a_sequence_that_was_set_back_refuses_pushes_until_it_is_resynced(db):
    session, other = db.connect(), db.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    before = [push(session) for _ in range(20)]
    assert drain(session) == before
    session.execute("SELECT setval('lockstep.ticket', 5)")
    for _ in range(2):
        with raises("55000") as caught:
            push(other)
        assert "lockstep.ticket_resync()" in caught.value.diag.message_hint
    assert log(session) == before
    session.execute("SELECT lockstep.ticket_resync()")
    after = [push(session) for _ in range(3)]
    assert min(after) > max(before)
    assert drain(session) == after


def test_ticket_resync_changes_nothing_where_nothing_is_wrong(db):
    session = db.connect()
    position = push(session)
    assert session.execute("SELECT lockstep.ticket_resync()").fetchone() == (position,)
    assert push(session) == position + 1


def test_ticket_resync_waits_for_pushes_in_flight_and_reads_what_they_committed(db):
    writer, session, observer = db.connect(), db.connect(), db.connect()
    push(writer)
    writer.execute("BEGIN")
    open_position = push(writer)
    waiting = start(call, session, "ticket_resync")
    wait_for_lock_wait(observer, session.info.backend_pid)
    writer.execute("COMMIT")
    assert waiting.result(30)[0][0] >= open_position


def test_after_data_loss_raises_the_tickets_by_two_to_the_32(db):
    session = db.connect()
    position = push(session)
    session.execute("SELECT lockstep.after_data_loss()")
    assert push(session) == position + 2**32 + 1


def test_the_ticket_sequence_is_shipped_with_a_cache_of_one(db):
    row = db.connect().execute(
        "SELECT seqcache, seqcycle, seqincrement FROM pg_sequence WHERE seqrelid = 'lockstep.ticket'::regclass"
    )
    assert row.fetchone() == (1, False, 1)


def test_with_a_cache_a_push_below_the_log_is_refused_and_not_lost(db):
    """Why CACHE 1: a session with cached tickets pushes below what readers have passed."""
    one, other, reader = db.connect(), db.connect(), db.connect()
    reader.execute("SELECT lockstep.projection_create('p')")
    reader.execute("ALTER SEQUENCE lockstep.ticket CACHE 10")
    first, second = push(one), push(other)
    assert second == first + 10
    assert drain(reader) == [first, second]
    with raises("55000"):
        push(one)  # its ticket would be first + 1
    assert drain(reader) == []
    reader.execute("ALTER SEQUENCE lockstep.ticket CACHE 1")
    position = push(db.connect())
    assert drain(reader) == [position]


def test_every_event_of_a_push_has_the_pushs_ticket_and_its_own_fraction(db):
    session = db.connect()
    event = {"aggregate_type": "order", "aggregate_id": "one", "event_type": "added"}
    rows = session.execute("SELECT position::text FROM lockstep.push_events(%s)", (Jsonb([event] * 11),)).fetchall()
    assert rows[0] == ("1",)
    assert rows[1] == ("1.000001",)
    assert rows[10] == ("1.00001",)
    stored = session.execute("SELECT position::text FROM lockstep.events ORDER BY position").fetchall()
    assert stored == rows


def test_a_push_of_twenty_thousand_events_has_one_ticket_and_is_read_in_order(db):
    session = db.connect()
    positions = push_many(session, 20000)
    assert push(session) == 2
    session.execute("SELECT lockstep.projection_create('p', batch_size => 15000)")
    assert claim_and_advance(session) == positions[:15000]
    assert claim_and_advance(session) == [*positions[15000:], 2]
