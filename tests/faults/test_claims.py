"""Claims: batches, cursors, filters, and what an idle claim costs."""

from decimal import Decimal

import pytest
from psycopg import sql
from server import wait_for_lock_wait
from sessions import advance, call, claim, claim_and_advance, drain, log, push, push_many, raises, start


def state(session, name="p"):
    return call(session, "projection_claim_state", name=name)[0]


def cursor_of(session, name="p", tenant=""):
    row = session.execute(
        "SELECT position FROM lockstep.projection_cursors WHERE projection = %s AND tenant = %s", (name, tenant)
    ).fetchone()
    return row and row[0]


@pytest.fixture
def session(db):
    connection = db.connect()
    connection.execute("SELECT lockstep.projection_create('p')")
    return connection


def test_an_advance_to_a_position_inside_the_batch_leaves_the_rest_for_the_next_claim(session):
    positions = push_many(session, 5)
    with session.transaction():
        assert claim(session) == positions
        assert advance(session, up_to=positions[1]) == positions[1]
    assert drain(session) == positions[2:]


def test_an_advance_step_by_step_through_a_batch_ends_where_it_got_to(session):
    positions = push_many(session, 4)
    with session.transaction():
        claim(session)
        for position in positions[:3]:
            advance(session, up_to=position)
        with raises("22023"), session.transaction():
            advance(session, up_to=positions[0])  # back
    assert drain(session) == positions[3:]


def test_without_an_advance_or_after_a_rollback_the_same_events_come_again(session):
    positions = [push(session) for _ in range(3)]
    with session.transaction():
        assert claim(session) == positions
    with session.transaction(force_rollback=True):
        assert claim(session) == positions
        advance(session)
    assert drain(session) == positions


def test_an_advance_is_refused_where_the_position_is_not_an_event_of_the_batch(session):
    positions = push_many(session, 5)
    for wrong in (
        Decimal("1.00000"),  # the event's own position, but already advanced past
        Decimal("1.000003"),  # claimed by nobody
        Decimal("1.5"),
        Decimal(0),
        Decimal(2),
        Decimal("1.0000010000000001"),  # what a float may make of an event's position
    ):
        with session.transaction(force_rollback=True):
            claim(session, max_events=1)
            advance(session)
            assert claim(session, max_events=2) == positions[1:3]
            with raises("22023") as caught:
                advance(session, up_to=wrong)
            assert "up_to" in caught.value.diag.message_primary


def test_batches_cut_a_push_of_500_into_200_and_200_and_100(session):
    positions = push_many(session, 500)
    seen = []
    for size, more in ((200, True), (200, True), (100, False), (0, False)):
        with session.transaction():
            batch = claim(session)  # the default batch_size is 200
            assert (len(batch), state(session)) == (size, ("claimed" if size else "none", more))
            if batch:
                assert advance(session) == batch[-1]
        seen += batch
    assert seen == positions


def test_a_claim_returns_at_most_max_events_and_says_whether_there_are_more(session):
    positions = push_many(session, 3)
    for asked, more in ((1, True), (2, True), (3, False), (4, False), (2**31 - 1, False)):
        with session.transaction():
            assert claim(session, max_events=asked) == positions[:asked]
            assert state(session) == ("claimed", more)


def test_a_claim_returns_nothing_above_max_position_and_more_counts_what_is_below(session):
    first, second, third = (push(session) for _ in range(3))
    with session.transaction():
        assert claim(session, max_position=second) == [first, second]
        assert state(session) == ("claimed", False)
    with session.transaction():
        assert claim(session, max_position=second, max_events=1) == [first]
        assert state(session) == ("claimed", True)
        advance(session)
    with session.transaction():
        assert claim(session, max_position=first) == []
        assert state(session) == ("none", False)
    assert drain(session) == [second, third]


def test_two_claims_of_different_projections_in_one_transaction_stand_side_by_side(session):
    session.execute("SELECT lockstep.projection_create('q')")
    positions = [push(session) for _ in range(3)]
    with session.transaction():
        assert claim(session, "p", max_events=1) == positions[:1]
        assert claim(session, "q", max_events=2) == positions[:2]
        assert advance(session, "p") == positions[0]
        assert advance(session, "q") == positions[1]
    assert drain(session, "p") == positions[1:]
    assert drain(session, "q") == positions[2:]


def test_a_claim_that_was_rolled_back_to_a_savepoint_is_no_claim(session):
    positions = [push(session) for _ in range(2)]
    with session.transaction():
        session.execute("SAVEPOINT before")
        assert claim(session) == positions
        session.execute("ROLLBACK TO before")
        assert state(session) == ("none", False)
        with raises("LS002") as caught, session.transaction():
            advance(session)
        assert caught.value.diag.message_detail
        assert caught.value.diag.message_hint
    assert drain(session) == positions


def test_an_advance_without_any_claim_or_after_the_claims_transaction_is_ls002(session):
    push(session)
    with raises("LS002"):
        advance(session)
    with session.transaction():
        claim(session)
    with raises("LS002"):
        advance(session)


def test_a_filter_under_which_nothing_matches_moves_the_cursor_to_the_last_event_it_saw(session):
    call(session, "projection_create", name="f", event_types=["wanted"])
    positions = [push(session) for _ in range(3)]
    with session.transaction():
        assert claim(session, "f") == []
        assert state(session, "f") == ("none", False)
    assert cursor_of(session, "f") == positions[-1]
    wanted = push(session, event_type="wanted")
    assert drain(session, "f") == [wanted]


def test_the_two_filters_of_a_projection_must_both_pass(session):
    call(session, "projection_create", name="f", aggregate_types=["order"], event_types=["wanted", "liked"])
    push(session)
    wanted, liked = push(session, event_type="wanted"), push(session, event_type="liked")
    session.execute("SELECT * FROM lockstep.push_event('invoice', 'one', 'wanted')")
    assert drain(session, "f") == [wanted, liked]
    assert drain(session, "p") == log(session)


def test_a_projection_that_starts_after_what_is_settled_sees_later_events_and_new_tenants_whole(db, session):
    writer = db.connect()
    push(session)
    writer.execute("BEGIN")
    open_position = push(writer)
    after = push(session)
    session.execute("SELECT lockstep.projection_create('late', start_after => NULL)")
    writer.execute("COMMIT")
    assert drain(session, "late") == [open_position, after]
    first_of_new_tenant = push(session, tenant="new")
    assert drain(session, "late", tenant="new") == [first_of_new_tenant]


def test_due_lists_what_is_behind_and_not_claimed(db, session):
    worker = db.connect()
    session.execute("SELECT lockstep.projection_create('q')")
    assert call(session, "projection_due") == []
    push(session, tenant="a")
    push(session, tenant="b")
    claim_and_advance(session, "q", tenant="a")
    assert call(session, "projection_due") == [("p", "a"), ("p", "b"), ("q", "b")]
    assert call(session, "projection_due", names=["q"]) == [("q", "b")]
    assert call(session, "projection_due", max_rows=1) == [("p", "a")]
    with worker.transaction():
        claim(worker, "p", tenant="a")
        assert call(session, "projection_due") == [("p", "b"), ("q", "b")]
        # Its open transaction has claimed, not pushed: what others push meanwhile is due elsewhere.
        push(session, tenant="a")
        assert call(session, "projection_due", names=["q"]) == [("q", "b"), ("q", "a")]


TUPLES_READ = """
    SELECT sum(pg_stat_get_xact_tuples_returned(relation))::bigint FROM (
        SELECT 'lockstep.events'::regclass::oid UNION ALL
        SELECT indexrelid FROM pg_index WHERE indrelid = 'lockstep.events'::regclass
    ) AS r (relation)
"""


def test_a_million_events_that_do_not_match_are_scanned_once(session):
    session.execute(
        """
        SET synchronous_commit = off;
        INSERT INTO lockstep.events (tenant, position, aggregate_type, aggregate_id, sequence, event_type, created_at)
        SELECT '', n, 'order', 'one', n, 'other', clock_timestamp() FROM generate_series(1, 1000000) AS n;
        SELECT setval('lockstep.ticket', 1000000);
        ANALYZE lockstep.events;
        """
    )
    call(session, "projection_create", name="f", event_types=["wanted"])

    def claim_once():
        """One claim: what it returned, whether there is more, how many rows and index entries it read."""
        with session.transaction():
            before = session.execute(TUPLES_READ).fetchone()[0]
            positions = claim(session, "f")
            more = state(session, "f")[1]
            return positions, more, session.execute(TUPLES_READ).fetchone()[0] - before

    first_round = []
    while not first_round or first_round[-1][1]:
        first_round.append(claim_once())
        assert len(first_round) <= 10
    assert len(first_round) == 10, "claim_scan_limit is 100000"
    assert all(positions == [] for positions, _, _ in first_round)
    assert min(read for _, _, read in first_round) >= 100000, "the counters count"
    assert cursor_of(session, "f") == 1000000

    for _ in range(5):
        positions, more, read = claim_once()
        assert (positions, more) == ([], False)
        assert read < 100

    session.execute("SET lockstep.claim_scan_limit = 7")
    wanted = push(session, event_type="wanted")
    positions, more, read = claim_once()
    assert (positions, more) == ([wanted], False)
    assert read < 100


def test_behind_a_long_backlog_a_claim_of_one_in_ten_event_types_reads_ten_events_for_each_that_it_gives(session):
    session.execute(
        """
        INSERT INTO lockstep.events (tenant, position, aggregate_type, aggregate_id, sequence, event_type, payload, created_at)
        SELECT '', n, 't', 'a', n, 'type ' || n % 10, '{}', now() FROM generate_series(1, 200000) AS n;
        SELECT lockstep.ticket_resync();
        ANALYZE lockstep.events
        """
    )
    call(session, "projection_create", name="one", event_types=["type 3"])
    call(session, "projection_create", name="all", event_types=[f"type {n}" for n in range(10)])
    for name, share in ("one", 10), ("all", 1), ("one", 10), ("all", 1):
        with session.transaction():
            before = session.execute(TUPLES_READ).fetchone()[0]
            positions = claim(session, name, max_events=100)
            read = session.execute(TUPLES_READ).fetchone()[0] - before
            advance(session, name)
        assert len(positions) == 100
        assert 100 * share <= read + 1 and read < 150 * share, (name, read)


def test_a_claim_stops_at_its_scan_limit_and_loses_nothing_around_it(session):
    call(session, "projection_create", name="f", event_types=["wanted"])
    session.execute("SET lockstep.claim_scan_limit = 10")
    wanted = []
    for n in range(64):
        position = push(session, event_type="wanted" if n % 11 == 9 else "other")
        if n % 11 == 9:
            wanted.append(position)
    assert len(wanted) == 5
    assert drain(session, "f") == wanted
    assert cursor_of(session, "f") == log(session)[-1]


@pytest.mark.parametrize("by_hand", ["SELECT FROM {} FOR UPDATE", "UPDATE {} SET advanced_at = now()", "UPDATE {} SET position = position + 1000"])
def test_an_advance_waits_for_who_has_the_cursors_row_and_goes_by_what_it_says_then(db, session, by_hand):
    positions = push_many(session, 3)
    with session.transaction():
        claim(session, max_events=1)
        advance(session)
    with db.connect() as other:
        other.execute("BEGIN")
        other.execute(by_hand.format("lockstep.projection_cursors"))
        session.execute("BEGIN")
        assert claim(session, max_events=1) == positions[1:2]
        waiting = start(advance, session)
        with db.connect() as onlooker:
            wait_for_lock_wait(onlooker, session.info.backend_pid)
        other.execute("COMMIT")
    if "1000" in by_hand:
        with raises("22023") as caught:
            waiting.result(60)
        assert "behind the cursor" in caught.value.diag.message_primary
        session.execute("ROLLBACK")
        assert drain(session) == []
    else:
        assert waiting.result(60) == positions[1]
        session.execute("COMMIT")
        assert drain(session) == positions[2:]


def test_what_a_claim_and_an_advance_read_does_not_grow_with_the_turns_since_another_transaction_began(db, session):
    """That one keeps every version of the cursor that there has been since."""
    push_many(session, 3000)
    session.execute("""CREATE PROCEDURE public.turns(turns int) LANGUAGE plpgsql AS $$
        BEGIN
            FOR turn IN 1..turns LOOP
                PERFORM FROM lockstep.projection_claim('p', max_events => 1);
                PERFORM lockstep.projection_advance('p');
                COMMIT;
            END LOOP;
        END $$""")

    def pages_read(statement):
        plan = session.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}").fetchone()[0][0]["Plan"]
        return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]

    def pages_of_a_turn():
        with session.transaction():
            claimed = pages_read("SELECT FROM lockstep.projection_claim('p', max_events => 1)")
            return claimed, pages_read("SELECT lockstep.projection_advance('p')")

    with db.connect() as holder:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT 1")
        session.execute("CALL public.turns(200)")
        # An advance that finds its page full looks for twins of the row, in all pages: that is the one of many.
        before = [min(pages) for pages in zip(*(pages_of_a_turn() for _ in range(5)))]
        session.execute("CALL public.turns(2500)")
        after = [min(pages) for pages in zip(*(pages_of_a_turn() for _ in range(5)))]
        assert session.execute("SELECT pg_relation_size('lockstep.projection_cursors') / 8192").fetchone()[0] >= 15
        holder.execute("ROLLBACK")
    for now, then in zip(after, before):
        assert now <= then + 5, (before, after)


def test_an_idle_claim_assigns_no_transaction_id_and_writes_nothing(cluster, new_database):
    quiet = cluster(autovacuum="off", wal_level="minimal", max_wal_senders="0", checkpoint_timeout="1h")
    session = new_database(quiet, "idle").connect()
    session.execute("SELECT lockstep.projection_create('p')")
    call(session, "projection_create", name="f", event_types=["wanted"])
    push_many(session, 10)

    def idle_claims():
        for name in ("p", "f"):
            for barrier in (True, False):
                for wait in (True, False):
                    with session.transaction():
                        assert claim(session, name, barrier=barrier, wait=wait) == []
                        row = session.execute("SELECT pg_current_xact_id_if_assigned()").fetchone()
                        assert row == (None,)

    assert len(claim_and_advance(session)) == 10
    claim_and_advance(session, "f")
    session.execute("CHECKPOINT")
    for _ in range(2):  # hint bits, which checksums log
        idle_claims()
    before = session.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    for _ in range(5):
        idle_claims()
    assert session.execute("SELECT pg_current_wal_insert_lsn()").fetchone() == before
    # The measure measures: an advance is seen by it.
    push(session)
    claim_and_advance(session)
    assert session.execute("SELECT pg_current_wal_insert_lsn()").fetchone() > before


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_what_reads_after_waiting_is_refused_under_a_transaction_snapshot(session, level):
    push(session)
    for query in (
        "SELECT * FROM lockstep.projection_claim('p')",
        "SELECT * FROM lockstep.projection_claim('p', barrier => false)",
        "SELECT * FROM lockstep.read_events()",
        "SELECT lockstep.barrier()",
        "SELECT lockstep.horizon()",
    ):
        with raises("25000") as caught, session.transaction():
            session.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL " + level))
            session.execute(query)
        assert "READ COMMITTED" in caught.value.diag.message_hint


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_push_on_an_aggregate_that_moved_after_the_transactions_snapshot_is_40001(db, session, level):
    other = db.connect()
    push(session, "one")
    with raises("40001"), session.transaction():
        session.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL " + level))
        session.execute("SELECT count(*) FROM lockstep.events")
        push(other, "one")
        push(session, "one")
    with session.transaction():
        session.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL " + level))
        push(session, "one")
        push(session, "one")
    assert len(log(session)) == 4


def test_a_projection_dropped_by_the_transaction_that_claimed_it_leaves_no_cursor_for_its_successor(session):
    positions = [push(session) for _ in range(3)]
    with session.transaction():
        claim(session)
        session.execute("SELECT lockstep.projection_drop('p')")
        with raises("LS002"), session.transaction():
            advance(session)
    assert cursor_of(session) is None
    session.execute("SELECT lockstep.projection_create('p')")
    assert drain(session) == positions
