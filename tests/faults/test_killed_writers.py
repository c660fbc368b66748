"""Writers that die: afterwards readers see what was committed and nothing else."""

import psycopg
import pytest
from server import wait_for_lock_wait
from sessions import claim, claim_and_advance, drain, log, push, start


@pytest.mark.parametrize("function", ["projection_claim", "read_events", "barrier"])
def test_a_barrier_that_waits_for_a_terminated_writer_goes_on_with_what_is_committed(db, function):
    writer, other, reader, observer = (db.connect() for _ in range(4))
    observer.execute("SELECT lockstep.projection_create('p')")
    writer.execute("BEGIN")
    lost = push(writer)
    kept = push(other)
    arguments = "'p'" if function == "projection_claim" else ""
    column = "r" if function == "barrier" else "r.position"
    query = f"SELECT {column} FROM lockstep.{function}({arguments}) AS r"
    waiting = start(lambda: reader.execute(query).fetchall())
    assert wait_for_lock_wait(observer, reader.info.backend_pid) == "virtualxid"
    observer.execute("SELECT pg_terminate_backend(%s)", (writer.info.backend_pid,))
    assert waiting.result(30) == [(kept,)]
    assert drain(reader) == log(observer) == [kept]
    after = push(other)
    assert drain(reader) == [after]
    assert lost not in log(observer)


def test_after_sigkill_of_a_writers_backend_claims_see_what_is_committed_and_nothing_else(cluster, new_database):
    own = cluster()
    database = new_database(own, "killed")
    writer, other, reader, observer = (database.connect() for _ in range(4))
    observer.execute("SELECT lockstep.projection_create('p')")
    seen = claim_and_advance(reader)
    kept = [push(other) for _ in range(3)]
    seen += claim_and_advance(reader, max_events=1)
    writer.execute("BEGIN")
    lost = push(writer)
    kept.append(push(other))
    reader.execute("BEGIN")
    waiting = start(claim, reader)
    assert wait_for_lock_wait(observer, reader.info.backend_pid) == "virtualxid"

    own.kill_backend(writer.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        waiting.result(60)
    own.wait_for_connections()

    again = database.connect()
    seen += drain(again)
    assert seen == kept == log(again)
    after = push(again)
    assert after > max(kept)
    assert drain(again) == [after]
    assert lost not in log(again)


def test_a_projection_whose_worker_is_terminated_is_claimed_by_the_next_with_the_same_events(db):
    worker, next_worker, observer = db.connect(), db.connect(), db.connect()
    observer.execute("SELECT lockstep.projection_create('p')")
    positions = [push(observer) for _ in range(3)]
    worker.execute("BEGIN")
    assert claim(worker) == positions
    worker.execute("SELECT lockstep.projection_advance('p')")
    waiting = start(claim_and_advance, next_worker, wait=True)
    wait_for_lock_wait(observer, next_worker.info.backend_pid)
    observer.execute("SELECT pg_terminate_backend(%s)", (worker.info.backend_pid,))
    assert waiting.result(30) == positions
    assert drain(observer) == []
