"""The workers of docs/job.md, as they stand there."""

import signal
import subprocess

import programs
import pytest
from pages import ROOT, blocks_of
from server import wait_until

# Marked so that test_docs.py does not run them: they do not end by themselves.
FENCES = {"python": "py", "js": "javascript"}


@pytest.fixture(params=FENCES)
def worker(request, db, tmp_path):
    """Starts a worker of a queue; it is killed at the end of the test if it has not ended."""
    (block,) = blocks_of(ROOT / "docs" / "job.md", FENCES[request.param])
    file = tmp_path / "worker"
    file.write_text(block.body)
    program = programs.command(request.param, file, tmp_path)
    environment = programs.environment(db)
    started = []

    def start(ttl):
        process = subprocess.Popen(
            [*program, "q", str(ttl)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def session(db):
    connection = db.connect()
    connection.execute("CREATE TABLE greetings (name text NOT NULL)")
    return connection


def enqueue(session, kind, payload, **arguments):
    named = "".join(f", {name} => %({name})s" for name in arguments)
    session.execute(
        f"SELECT lockstep.job_enqueue('q', %(kind)s || random(), %(kind)s, %(payload)s{named})",
        {"kind": kind, "payload": payload} | arguments,
    )


def is_empty(session):
    return session.execute("SELECT NOT EXISTS (SELECT FROM lockstep.jobs)").fetchone()[0]


def greetings(session):
    return [name for (name,) in session.execute("SELECT name FROM greetings ORDER BY 1").fetchall()]


def test_a_worker_does_what_is_there_and_what_comes_and_ends_at_sigterm(session, worker):
    for name in ("ada", "eve"):
        enqueue(session, "greet", f'{{"name": "{name}"}}')
    process = worker(30)
    wait_until(lambda: is_empty(session))
    enqueue(session, "greet", '{"name": "zoe"}')
    wait_until(lambda: is_empty(session))
    assert greetings(session) == ["ada", "eve", "zoe"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_a_job_that_fails_leaves_nothing_and_is_tried_again_until_it_is_dead(session, worker):
    session.execute("SELECT lockstep.queue_configure('q', backoff => '1 millisecond')")
    enqueue(session, "unheard of", "{}", max_attempts=2)
    worker(30)
    wait_until(lambda: is_empty(session))
    row = session.execute("SELECT attempts, error FROM lockstep.dead_jobs").fetchone()
    assert row == (2, "no handler for unheard of")


def test_the_heartbeat_keeps_a_job_that_takes_longer_than_its_ttl(session, worker):
    enqueue(session, "sleep", '{"seconds": 4}')
    worker(1)
    query = "SELECT clock_timestamp() > claimed_at + interval '2 seconds' FROM lockstep.jobs WHERE token IS NOT NULL"
    wait_until(lambda: (session.execute(query).fetchone() or [False])[0])
    assert session.execute("SELECT count(*) FROM lockstep.job_claim('q', 'thief')").fetchone() == (0,)
    wait_until(lambda: is_empty(session))


def test_sigterm_lets_it_finish_its_job(session, worker):
    enqueue(session, "sleep", '{"seconds": 2}')
    enqueue(session, "greet", '{"name": "later"}')
    process = worker(30)
    wait_until(lambda: session.execute("SELECT count(*) FROM lockstep.jobs WHERE token IS NOT NULL").fetchone() == (1,))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert session.execute("SELECT kind, state FROM lockstep.jobs").fetchall() == [("greet", "ready")]


def test_a_worker_that_stood_still_loses_its_job_and_what_it_wrote(session, worker):
    enqueue(session, "sleep", '{"seconds": 1}')
    process = worker(1)
    wait_until(lambda: session.execute("SELECT count(*) FROM lockstep.jobs WHERE token IS NOT NULL").fetchone() == (1,))
    process.send_signal(signal.SIGSTOP)
    query = "SELECT job_id, token FROM lockstep.job_claim('q', 'other')"
    job = wait_until(lambda: session.execute(query).fetchone())
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == f"job {job[0]} was lost\n"
    assert session.execute("SELECT lockstep.job_complete(%s, %s)", job).fetchone() == ("completed",)
