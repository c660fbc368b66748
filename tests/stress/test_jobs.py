"""Jobs under load: workers that are killed, heartbeats beside completions, enqueuers beside failures."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sessions import start

WORKER = Path(__file__).with_name("job_worker.py")
JOBS, KEYS, WORKERS = 20_000, 500, 8


@pytest.mark.timeout(600)
def test_workers_that_are_killed_lose_no_job_and_never_work_on_one_key_together(db, stress_seconds):
    session = db.connect()
    session.execute(
        """
        CREATE TABLE done (job_id bigint NOT NULL, key text NOT NULL);
        CREATE TABLE violations (job_id bigint NOT NULL, key text NOT NULL);
        """
    )
    session.execute(
        "SELECT lockstep.job_enqueue('q', (n %% %s)::text, n::text, max_attempts => NULL) FROM generate_series(1, %s) AS n",
        (KEYS, JOBS),
    )
    numbers = iter(range(10**6))

    def worker():
        return subprocess.Popen([sys.executable, WORKER, db.dsn, f"worker {next(numbers)}", "300 milliseconds"])

    workers, killed = [worker() for _ in range(WORKERS)], 0
    try:
        end = time.monotonic() + 3 * stress_seconds
        while time.monotonic() < end and any(process.poll() is None for process in workers):
            time.sleep(random.uniform(0.02, 0.3))
            victim = random.randrange(WORKERS)
            if workers[victim].poll() is None:
                workers[victim].kill()
                workers[victim].wait()
                killed += 1
                workers[victim] = worker()
        for process in workers:
            assert process.wait(300) == 0
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert killed > stress_seconds
    assert session.execute("SELECT count(*) FROM lockstep.jobs").fetchone() == (0,), "none is left in progress"
    assert session.execute("SELECT count(*) FROM lockstep.dead_jobs").fetchone() == (0,)
    assert session.execute("SELECT count(*), count(DISTINCT job_id) FROM done").fetchone() == (JOBS, JOBS)
    assert session.execute("SELECT * FROM violations").fetchall() == []


def test_heartbeats_completions_failures_and_enqueuers_never_deadlock(db, stress_seconds):
    """One enqueue a transaction: several could meet another's in the opposite order, which is the enqueuer's to avoid."""
    errors, counts = [], {"completed": 0, "retry": 0, "lost": 0, "renewed": 0, "enqueued": 0}
    held = {}
    end = time.monotonic() + 6 * stress_seconds

    def enqueuer():
        session = db.connect()
        while time.monotonic() < end and not errors:
            session.execute(
                "SELECT lockstep.job_enqueue('q', (random() * 60)::int::text, (random() * 3)::int::text, max_attempts => NULL)"
            )
            counts["enqueued"] += 1

    def worker(number):
        session = db.connect()
        while time.monotonic() < end and not errors:
            jobs = session.execute(
                "SELECT job_id, token FROM lockstep.job_claim('q', %s, 8, '1 second')", (f"w {number}",)
            ).fetchall()
            held[number] = jobs
            random.shuffle(jobs)
            with session.transaction(force_rollback=random.random() < 0.1):
                for job_id, token in jobs:
                    if random.random() < 0.3:
                        query = "SELECT lockstep.job_fail(%s, %s, 'no', retry_after => '0')"
                    else:
                        query = "SELECT lockstep.job_complete(%s, %s)"
                    (answer,) = session.execute(query, (job_id, token)).fetchone()
                    counts[answer] += 1

    def heartbeat():
        session = db.connect()
        while time.monotonic() < end and not errors:
            jobs = [job for jobs in list(held.values()) for job in list(jobs)]
            random.shuffle(jobs)
            if jobs:
                ids, tokens = map(list, zip(*jobs, strict=True))
                with session.transaction():
                    for _ in range(2):
                        counts["renewed"] += len(
                            session.execute("SELECT lockstep.job_renew(%s, %s, '1 second')", (ids, tokens)).fetchall()
                        )

    def guarded(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            errors.append(error)

    calls = [(enqueuer,)] * 3 + [(worker, number) for number in range(4)] + [(heartbeat,)] * 5
    for future in [start(guarded, *call) for call in calls]:
        future.result(6 * stress_seconds + 60)
    assert errors == [], [str(e) for e in errors]
    assert all(counts[what] > 10 for what in ("completed", "retry", "renewed", "enqueued")), counts
    observer = db.connect()
    busy = "SELECT key FROM lockstep.jobs WHERE state = 'in_progress' GROUP BY tenant, queue, key HAVING count(*) > 1"
    assert observer.execute(busy).fetchall() == []
