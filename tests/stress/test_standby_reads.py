"""Reading from a standby under load: every read is a prefix, without holes, of what the primary has in the end."""

import importlib
from pathlib import Path

import pytest
from sessions import claim_and_advance, push

LOG = "SELECT tenant, position, aggregate_type, event_type FROM lockstep.events ORDER BY position"


@pytest.fixture
def oracles(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("oracle"), importlib.import_module("standby_oracle")


def run(shared_pair, oracles, seconds, query):
    """The oracle's writers, killers and projections on the primary, readers on the standby; what they saw, judged."""
    oracle, standby_oracle = oracles
    database, standby = shared_pair
    database.cluster.wait_for_replay(standby)
    with standby_oracle.Readers(lambda: standby.connect(database.name), query=query) as readers:
        report = oracle.Run(database.dsn, seconds).run()
    assert report.good, f"\n{report}"
    assert readers.problems == []
    log = database.connect().execute(LOG).fetchall()
    judgement = standby_oracle.judge(readers.reads, log)
    print(f"seed {readers.seed}: {judgement}\n{readers.counts}")
    # All is drained, so all is settled, for the standby too.
    database.cluster.wait_for_replay(standby)
    with standby.connect(database.name) as session:
        for tenant in standby_oracle.TENANTS:
            for filters in standby_oracle.FILTERS:
                last = standby_oracle.read(session, standby_oracle.SETTLED, tenant, filters, 0, 1_000_000)
                assert not standby_oracle.judge([last], log).wrong
                assert standby_oracle.judge([last], log).partial == 0, "the standby does not show what all have read"
    return judgement


def test_every_read_of_a_standby_is_a_prefix_without_holes_of_the_primarys_log(shared_pair, oracles, stress_seconds):
    judgement = run(shared_pair, oracles, stress_seconds / 2, oracles[1].SETTLED)
    assert not judgement.wrong, f"\n{judgement}"
    assert judgement.with_events > 50 and judgement.partial > 20, f"this run has shown little: {judgement}"


@pytest.mark.slow
def test_the_oracle_reports_the_holes_of_a_reader_of_all_that_is_visible(shared_pair, oracles):
    assert run(shared_pair, oracles, 10, oracles[1].VISIBLE).wrong


def test_a_reader_of_all_that_is_visible_on_a_standby_passes_the_slower_writers_event(shared_pair, oracles):
    _, standby_oracle = oracles
    database, standby = shared_pair
    writer, session = database.connect(), database.connect()
    session.execute("SELECT lockstep.projection_create('p')")
    first = push(session)
    claim_and_advance(session)
    writer.execute("BEGIN")
    slower, faster = push(writer), push(session)
    claim_and_advance(session, barrier=False)
    database.cluster.wait_for_replay(standby)
    replica = standby.connect(database.name)
    visible, settled = (
        standby_oracle.read(replica, query, "", (None, None), 0, 100)
        for query in (standby_oracle.VISIBLE, standby_oracle.SETTLED)
    )
    writer.execute("COMMIT")
    assert visible.positions == (first, faster)
    assert settled.positions == (first,)
    log = session.execute(LOG).fetchall()
    assert [position for _, position, _, _ in log] == [first, slower, faster]
    assert standby_oracle.judge([visible], log).wrong
    assert not standby_oracle.judge([settled], log).wrong
