"""Processes are killed and the server is shut down in the middle of everything; what was acknowledged stays, and nothing is doubled."""

import psycopg
import pytest
from server import wait_until

WORKERS = ["lockstep worker", "lockstep launcher", "lockstep supervisor"]
POSTGRESQL = ["walwriter", "checkpointer", "background writer", "autovacuum launcher"]


def kill(cluster, kinds):
    """SIGKILL to a process of one of the kinds; returns when the server has recovered."""
    query = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = ANY (%s) ORDER BY random() LIMIT 1"

    def killed():
        with cluster.connect() as connection:
            row = connection.execute(query, (kinds,)).fetchone()
        try:
            return row and (cluster.kill_backend(row[0]), True)
        except (ValueError, ProcessLookupError):
            return None  # it has ended meanwhile

    wait_until(killed, 60)
    cluster.wait_for_connections()


def kill_backend(cluster):
    kill(cluster, ["client backend"])


def kill_worker(cluster):
    kill(cluster, WORKERS)


def kill_any(cluster):
    kill(cluster, ["client backend", *WORKERS, *POSTGRESQL])


def kill_postmaster(cluster):
    cluster.kill_postmaster()
    with pytest.raises(psycopg.OperationalError):
        cluster.connect()
    cluster.start()


def stop_immediately(cluster):
    cluster.stop("immediate")
    cluster.start()


def cut_the_power(cluster):
    cluster.crash()
    cluster.start()


FAULTS = (kill_backend, kill_worker, kill_any, kill_postmaster, stop_immediately, cut_the_power)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(FAULTS, id="each once"),
        *(pytest.param((fault,) * 12, id=f"{fault.__name__} 12 times", marks=pytest.mark.slow) for fault in FAULTS),
    ],
)
@pytest.mark.timeout(900)
def test_what_was_acknowledged_is_there_once_after(faults, load, loaded):
    cluster = loaded()
    with load.Load(cluster) as running:
        running.progress()
        for fault in faults:
            fault(cluster)
            running.progress()
    running.check()
