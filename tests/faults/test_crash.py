"""SIGKILL to the whole server, as in a power cut, with synchronous_commit on."""

import pytest
from sessions import call, claim, claim_and_advance, drain, log, push, push_many


@pytest.fixture
def durable(cluster, new_database):
    """A cluster that keeps what it confirmed and nothing more, and a database in it."""
    own = cluster(fsync="on", synchronous_commit="on", wal_writer_delay="10s", bgwriter_lru_maxpages="0")
    return own, new_database(own, "crash")


def burn(session, count):
    """Draws tickets and gives nothing for them: nobody waits for their WAL, so a crash may hand them out again."""
    for _ in range(count):
        with session.transaction(force_rollback=True):
            push(session)


def test_after_a_crash_no_number_that_barrier_returned_names_a_later_event(durable):
    own, database = durable
    promised, confirmed, repeated = [], [], 0
    for _ in range(4):
        own.stop_wal_writer()
        session, writer = database.connect(), database.connect()
        confirmed += [push(session) for _ in range(3)]
        confirmed += push_many(session, 2)
        burn(session, 40)  # more than a sequence writes ahead to the WAL
        writer.execute("BEGIN")
        burnt = push(writer)
        promised += call(session, "horizon")[0]
        writer.execute("ROLLBACK")
        promised += call(session, "barrier")[0]
        writer.execute("BEGIN")
        push(writer)
        own.crash()
        own.start()

        session = database.connect()
        assert log(session) == confirmed
        later = [push(session) for _ in range(50)]
        assert min(later) > max(promised)
        repeated += min(later) <= burnt
        assert set(promised) <= set(confirmed), "each is the position of an event that is there"
        confirmed += later
    assert repeated, "no crash handed a ticket out again: this test has shown nothing"


def test_after_a_crash_projections_see_every_committed_event_once(durable):
    own, database = durable
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    call(session, "projection_create", name="f", event_types=["wanted"])
    seen, wanted, wanted_seen = [], [], []
    for _ in range(3):
        session, worker, writer = database.connect(), database.connect(), database.connect()
        for _ in range(3):
            push(session)
        seen += claim_and_advance(worker, max_events=2)
        burn(session, 40)
        wanted_seen += drain(worker, "f")  # nothing matches: the claim itself moves the cursor
        assert wanted_seen == wanted
        writer.execute("BEGIN")
        push(writer, event_type="wanted")
        worker.execute("BEGIN")
        claim(worker, barrier=False)
        call(worker, "projection_advance", name="p")
        own.crash()
        own.start()
        session = database.connect()
        wanted += [push(session, event_type="wanted") for _ in range(50)]
        seen += claim_and_advance(session, barrier=False)
    assert wanted_seen + drain(session, "f") == wanted
    assert seen + drain(session) == log(session)
