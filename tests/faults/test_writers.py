"""Pushes of many sessions to the same aggregates, sequences and event ids."""

import uuid

import psycopg
from psycopg.types.json import Jsonb
from server import wait_for_lock_wait
from sessions import call, log, push, raises, start, start_together


def test_sixteen_sessions_push_to_one_aggregate_without_a_gap_or_an_error(db):
    def twenty_pushes(connection):
        rows = [
            call(connection, "push_event", aggregate_type="order", aggregate_id="one", event_type="added")[0]
            for _ in range(20)
        ]
        return [(position, sequence) for position, sequence, _ in rows]

    connections = [db.connect() for _ in range(16)]
    running = start_together([lambda c=c: twenty_pushes(c) for c in connections])
    returned = sorted(row for future in running for row in future.result(60))
    assert [sequence for _, sequence in returned] == list(range(1, 321))
    stored = db.connect().execute("SELECT position, sequence FROM lockstep.events ORDER BY position").fetchall()
    assert stored == returned


def test_two_sessions_push_to_two_aggregates_in_opposite_order_without_an_error(db):
    def push_both(connection, order):
        events = [{"aggregate_type": "order", "aggregate_id": name, "event_type": "added"} for name in order]
        call(connection, "push_events", events=Jsonb(events))

    one, other = db.connect(), db.connect()
    for _ in range(15):
        both = start_together([lambda: push_both(one, "ab"), lambda: push_both(other, "ba")])
        for future in both:
            future.result(60)
    rows = one.execute("SELECT aggregate_id, sequence FROM lockstep.events ORDER BY 1, 2").fetchall()
    assert rows == [(name, sequence) for name in "ab" for sequence in range(1, 31)]


def test_of_two_pushes_that_need_each_others_aggregates_one_waits_holding_nothing_the_other_needs(db):
    """The directed form of the test above: a deadlock would need the second to hold `b` while it waits for `a`."""
    first, second, third, observer = (db.connect() for _ in range(4))

    def events(names):
        return Jsonb([{"aggregate_type": "order", "aggregate_id": name, "event_type": "added"} for name in names])

    for names in ("ab", "ba"):
        for held in "ab":
            with first.transaction():
                push(first, held)
                one = start(call, second, "push_events", events=events(names))
                wait_for_lock_wait(observer, second.info.backend_pid)
                other = start(call, third, "push_events", events=events(names[::-1]))
                wait_for_lock_wait(observer, third.info.backend_pid)
            one.result(30)
            other.result(30)


def test_of_eight_sessions_that_expect_the_same_sequence_one_wins_and_seven_are_told_both_numbers(db):
    connections = [db.connect() for _ in range(8)]
    for expected in range(3):
        running = start_together(
            [lambda c=c: push(c, "one", expected_sequence=expected) for c in connections]  # noqa: B023
        )
        errors = [future.exception(60) for future in running]
        lost = [error for error in errors if error]
        assert len(lost) == 7
        for error in lost:
            assert isinstance(error, psycopg.Error)
            assert error.diag.sqlstate == "LS001"
            assert error.diag.message_detail == f"Actual sequence {expected + 1}, expected {expected}."
            assert error.diag.message_hint
    assert len(log(connections[0])) == 3


def test_the_same_event_id_from_two_sessions_at_once_is_one_event(db):
    first, second, observer = db.connect(), db.connect(), db.connect()
    event_id = str(uuid.uuid4())

    def push_it(connection, aggregate_id):
        event = {
            "aggregate_type": "order",
            "aggregate_id": aggregate_id,
            "event_type": "added",
            "event_id": event_id,
        }
        return call(connection, "push_events", events=Jsonb([event]))

    first.execute("BEGIN")
    push_it(first, "a")
    waiting = start(push_it, second, "b")
    wait_for_lock_wait(observer, second.info.backend_pid)
    first.execute("COMMIT")
    with raises("23505") as caught:
        waiting.result(30)
    assert caught.value.diag.constraint_name == "events_tenant_event_id_key"
    assert event_id in caught.value.diag.message_detail
    assert len(log(observer)) == 1


def test_an_event_id_is_free_again_when_the_push_that_had_it_rolls_back(db):
    first, second, observer = db.connect(), db.connect(), db.connect()
    event = {"aggregate_type": "order", "aggregate_id": "a", "event_type": "added", "event_id": str(uuid.uuid4())}
    first.execute("BEGIN")
    call(first, "push_events", events=Jsonb([event]))
    waiting = start(call, second, "push_events", events=Jsonb([event | {"aggregate_id": "b"}]))
    wait_for_lock_wait(observer, second.info.backend_pid)
    first.execute("ROLLBACK")
    waiting.result(30)
    assert observer.execute("SELECT aggregate_id FROM lockstep.events").fetchall() == [("b",)]


def test_a_rolled_back_push_leaves_no_gap_in_the_sequences(db):
    first, second, observer = db.connect(), db.connect(), db.connect()
    push(first, "one")
    first.execute("BEGIN")
    push(first, "one")
    waiting = start(call, second, "push_event", aggregate_type="order", aggregate_id="one", event_type="added")
    wait_for_lock_wait(observer, second.info.backend_pid)
    first.execute("ROLLBACK")
    assert waiting.result(30)[0][1] == 2
