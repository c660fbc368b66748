"""Processes are killed and the server is shut down in the middle of everything; what was acknowledged stays, and nothing is doubled."""

import random

import psycopg
import pytest
from server import wait_until

# What a client sees of the processes of its server: backends, workers, and PostgreSQL's own.
VICTIMS = """
    SELECT pid FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = ANY (%s) ORDER BY random() LIMIT 1
"""
KINDS = {
    "a backend": ["client backend"],
    "a worker": ["lockstep worker", "lockstep launcher", "lockstep supervisor"],
    "any process": ["client backend", "lockstep worker", "walwriter", "checkpointer", "background writer", "autovacuum launcher"],
}


def kill_one(cluster, kinds):
    """SIGKILL to a process that does something for the load; returns when the server has recovered."""

    def killed():
        with cluster.connect() as connection:
            row = connection.execute(VICTIMS, (kinds,)).fetchone()
        try:
            return row and (cluster.kill_backend(row[0]), True)
        except (ValueError, ProcessLookupError):
            return None  # it has ended meanwhile

    wait_until(killed, 60)
    cluster.wait_for_connections()


def kill(cluster, dice):
    kill_one(cluster, KINDS[dice.choice(list(KINDS))])


def kill_postmaster(cluster, dice):
    cluster.kill_postmaster()
    with pytest.raises(psycopg.OperationalError):
        cluster.connect()
    cluster.start()


def stop_immediately(cluster, dice):
    cluster.stop("immediate")
    cluster.start()


def cut_the_power(cluster, dice):
    cluster.crash()
    cluster.start()


FAULTS = (kill, kill_postmaster, stop_immediately, cut_the_power)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(FAULTS, id="each once"),
        *(pytest.param((fault,) * 12, id=f"{fault.__name__} 12 times", marks=pytest.mark.slow) for fault in FAULTS),
    ],
)
@pytest.mark.timeout(900)
def test_what_was_acknowledged_is_there_once_after(faults, load, loaded):
    dice, cluster = random.Random(7), loaded()
    with load.Load(cluster) as running:
        running.progress()
        for fault in faults:
            fault(cluster, dice)
            running.progress()
    running.check()
