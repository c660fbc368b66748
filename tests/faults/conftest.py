"""Fixtures of tests that break the server while everything is in use."""

import contextlib
import importlib
from pathlib import Path

import pytest
import workers

# What a crash may take is taken: nothing reaches the disk before a commit asks for it.
SETTINGS = workers.SETTINGS | {
    "synchronous_commit": "on",
    "wal_writer_delay": "10s",
    "bgwriter_lru_maxpages": "0",
    "wal_retrieve_retry_interval": "100ms",
}


@pytest.fixture
def load(monkeypatch):
    """The module tests/stress/mixed_load.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "stress")
    return importlib.import_module("mixed_load")


@pytest.fixture
def loaded(cluster):
    """Makes a cluster for `load.Load`, with the library preloaded."""

    def make(start=True, **settings):
        return cluster(start, **(SETTINGS | settings))

    return make


@pytest.fixture
def thrown_away():
    """Destroys clusters that a test makes from others: `thrown_away(primary.standby())`."""
    with contextlib.ExitStack() as stack:

        def register(made):
            stack.callback(made.destroy)
            return made

        yield register
