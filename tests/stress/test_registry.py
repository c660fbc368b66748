"""The registry under random changes, syncs, failures and kills, and an oracle that can tell."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("registry")


def test_a_replay_of_the_history_predicts_every_answer_and_every_row(registry, db, stress_seconds):
    run = registry.Run(db.dsn, 2 * stress_seconds).run()
    print(run)
    assert not run.problems, f"\n{run}"
    answers = ("current", "outdated", "gone", "lost", "source_lost")
    for what in (*(f"finish {answer}" for answer in answers), "killed", "fail failed", "delete true", "purged", "LS005", "LS006"):
        assert run.counts[what], f"no {what}: this run has shown little\n{run}"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE lockstep.replicas SET generation = generation - 1 WHERE generation = (SELECT max(generation) FROM lockstep.replicas)",
        "UPDATE lockstep.resources SET deleted_at = NULL WHERE deleted_at IS NOT NULL",
        "DELETE FROM lockstep.replicas WHERE generation = (SELECT max(generation) FROM lockstep.replicas)",
        "UPDATE oracle.history SET answer = 'current' WHERE answer = 'outdated'",
        "UPDATE lockstep.replicas SET due_at = NULL",
    ],
    ids=["a lost update", "a resurrection", "a replica that is gone", "a false answer", "what is never due"],
)
def test_the_oracle_notices(registry, db, damage):
    run = registry.Run(db.dsn, 2, resources=30)
    run.purge = lambda: None
    assert not run.run().problems, f"\n{run}"
    with db.connect() as admin:
        admin.execute(damage)
        run.judge(admin)
    assert run.problems
