"""The oracle passes the extension's readers, and fails the two that lose events."""

import importlib
from pathlib import Path

import pytest
from server import wait_for_lock_wait
from sessions import call, log, push, start


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("oracle")


def test_every_projection_sees_exactly_what_was_committed_once_and_in_order(oracle, db, stress_seconds):
    report = oracle.Run(db.dsn, stress_seconds).run()
    print(report)
    assert report.good, f"\n{report}"
    for what in ("transactions committed", "transactions rolled back", "prepared transactions ended", "connections killed", "claims rolled back"):
        assert report.counts[what], f"no {what}: this run has shown little\n{report}"


@pytest.mark.parametrize("mode", ["naive", "early_snapshot"])
def test_the_oracle_reports_the_losses_of_a_reader_that_loses_events(oracle, db, mode):
    report = oracle.Run(db.dsn, 5.0, mode=mode).run()
    print(report)
    assert report.problems == []
    assert report.lost, f"\n{report}"
    assert not report.good


@pytest.fixture
def overlapping(db):
    """A writer that is open, and a commit above it: (writer, its position, the position above it)."""
    writer, other = db.connect(), db.connect()
    writer.execute("BEGIN")
    return writer, push(writer), push(other)


def test_a_reader_of_everything_above_the_last_position_seen_loses_the_slower_writers_event(db, overlapping):
    writer, slower, faster = overlapping
    reader = db.connect()
    query = "SELECT position FROM lockstep.events WHERE position > %s ORDER BY position"
    seen = [position for (position,) in reader.execute(query, (0,))]
    writer.execute("COMMIT")
    seen += [position for (position,) in reader.execute(query, (max(seen),))]
    assert log(reader) == [slower, faster]
    assert seen == [faster]


def test_a_reader_whose_snapshot_is_from_before_the_wait_loses_what_it_waited_for(db, oracle, overlapping):
    writer, slower, faster = overlapping
    reader, observer = db.connect(), db.connect()

    def read(after):
        parameters = {"tenant": "", "after": after, "batch": 100}
        return [position for (position,) in reader.execute(oracle.EARLY_SNAPSHOT, parameters).fetchall()]

    waiting = start(read, 0)
    assert wait_for_lock_wait(observer, reader.info.backend_pid) == "virtualxid"
    writer.execute("COMMIT")
    seen = waiting.result(30)
    seen += read(max(seen))
    assert log(observer) == [slower, faster]
    assert seen == [faster]


def test_read_events_in_the_same_place_loses_nothing(db, overlapping):
    writer, slower, faster = overlapping
    reader, observer = db.connect(), db.connect()
    waiting = start(call, reader, "read_events")
    assert wait_for_lock_wait(observer, reader.info.backend_pid) == "virtualxid"
    writer.execute("COMMIT")
    assert [row[1] for row in waiting.result(30)] == [slower, faster]
