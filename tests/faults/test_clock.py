"""A server whose clock goes back: libfaketime around the server, told by a file what to show."""

import shutil
import subprocess
from datetime import timedelta

import pytest
from sessions import claim, claim_and_advance, drain, log, push, push_many


class Clock:
    """The clock of a cluster, started with it; set it at any time: `clock.set("-10")`."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.file = cluster.directory / "clock"

    def start(self, offset):
        faketime = shutil.which("faketime")
        if faketime is None:
            pytest.fail("the program faketime is missing: install the package faketime (make setup does)")
        shown = subprocess.run([faketime, "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True)
        self.set(offset)
        self.cluster.start(
            env={
                "LD_PRELOAD": shown.stdout.strip(),
                "FAKETIME_TIMESTAMP_FILE": str(self.file),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_RESET": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
        )

    def set(self, offset):
        """Seconds relative to the true time, with a sign."""
        replacement = self.file.with_name("clock.new")
        replacement.write_text(offset + "\n")
        replacement.chmod(0o644)
        replacement.rename(self.file)


def now(session):
    return session.execute("SELECT clock_timestamp()").fetchone()[0]


def test_a_clock_that_goes_back_ten_seconds_changes_nothing(cluster, new_database):
    own = cluster(start=False)
    clock = Clock(own)
    clock.start("+0")
    database = new_database(own, "clock")
    session, writer, worker = database.connect(), database.connect(), database.connect()
    session.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('late')")
    positions = [push(session, "one"), *push_many(session, 3)]
    seen = claim_and_advance(worker, max_events=3)
    writer.execute("BEGIN")
    positions.append(push(writer, "two"))

    before = now(session)
    clock.set("-10")
    assert before - timedelta(seconds=10) <= now(session) < before - timedelta(seconds=5), "the clock went back"

    positions += [push(session, "one"), *push_many(session, 3)]
    with worker.transaction():
        claimed = claim(worker, barrier=False)
        assert claimed == positions[3:4]
        worker.execute("SELECT lockstep.projection_advance('p')")
    seen += claimed
    writer.execute("COMMIT")
    positions.append(push(session, "two"))
    assert positions == sorted(positions) == log(session)
    assert seen + drain(worker) == positions
    assert drain(worker, "late", barrier=False) == positions
    times = session.execute("SELECT created_at FROM lockstep.events ORDER BY position").fetchall()
    assert times != sorted(times), "the log holds times from before and after"


def test_a_server_whose_clock_was_an_hour_ahead_goes_on_as_before(cluster, new_database):
    own = cluster(start=False)
    Clock(own).start("+3600")
    database = new_database(own, "clock")
    session = database.connect()
    session.execute("SELECT lockstep.projection_create('p'), lockstep.projection_create('late')")
    positions = [push(session, "one"), *push_many(session, 3)]
    seen = claim_and_advance(session, max_events=2)
    session.execute("BEGIN")
    positions.append(push(session, "two"))
    session.execute("PREPARE TRANSACTION 'held'")
    ahead = now(session)

    own.stop()
    own.start()
    session = database.connect()
    assert ahead - timedelta(minutes=61) < now(session) < ahead - timedelta(minutes=58), "the clock went back"
    positions += [push(session, "one"), *push_many(session, 3)]
    seen += claim_and_advance(session, barrier=False)
    assert seen == positions[:4], "the prepared push is still respected"
    session.execute("COMMIT PREPARED 'held'")
    positions.append(push(session, "two"))
    assert positions == sorted(positions) == log(session)
    assert seen + drain(session) == positions
    assert drain(session, "late", barrier=False) == positions
