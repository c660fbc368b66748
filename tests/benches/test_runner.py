"""What the benchmarks say is what was measured: the statistics, the order, the oracle, the table and the charts. No peer is fetched for it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from server import BINDIR, SERVER_USER

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches"))

import charts
import logs
import report
import schedule
from cells import CORE, Bench, all_cells, is_core
from measure import Attempt, Goal, Measurement, as_json, from_json, percentile, summarize, tail
from peers import insert, lockstep, payload, snapshot_xmin
from servers import Server

runner = SimpleNamespace(**runpy.run_path(ROOT / "benches" / "run"))


def attempt(before, subject, after, lost=0):
    return Attempt(1, Measurement(before), Measurement(subject, lost=lost), Measurement(after))


# Statistics


def test_the_ratio_is_to_the_mean_of_the_controls_before_and_after():
    assert attempt(90, 200, 110).ratio == 2
    assert attempt(100, 50, 100).ratio == 0.5


@pytest.mark.parametrize(("before", "after", "valid"), [(100, 100, True), (93, 107, True), (92, 108, False), (108, 92, False), (0, 0, False)])
def test_an_attempt_whose_controls_differ_by_more_than_15_percent_is_invalid(before, after, valid):
    assert attempt(before, 100, after).valid is valid


def test_the_median_and_the_range_are_those_of_the_valid_ratios():
    attempts = [attempt(100, 100 + n, 100) for n in (1, 9, 2, 4, 3)] + [attempt(50, 900, 150)]
    summary = summarize(attempts, 5)
    assert (summary.state, summary.rounds) == ("measured", 5)
    assert (summary.ratio, summary.least, summary.greatest) == (1.03, 1.01, 1.09)


def test_a_cell_without_five_valid_rounds_is_invalid():
    valid, drifted = attempt(100, 100, 100), attempt(50, 100, 150)
    assert summarize([valid] * 5 + [drifted], 6).state == "measured"
    assert summarize([valid] * 4 + [drifted] * 6, 5).state == "invalid"
    assert summarize([valid] * 4, 5).state == "unfinished"
    assert summarize([valid] * 2, 2).state == "measured"  # as many as were wanted


def test_one_lost_event_takes_the_place_of_the_figure():
    summary = summarize([attempt(100, 500, 100)] * 9 + [attempt(100, 500, 300, lost=3)], 5)
    assert str(summary) == "LOST 3"
    assert summary.ratio is None


def test_what_failed_or_was_not_measured_says_so():
    assert str(summarize([], 5, errors=2)) == "error"
    assert str(summarize([], 5)) == "not measured"


def test_percentiles_are_of_the_numbers():
    assert percentile(range(1, 101), 0.99) == 100
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([7], 0.99) == 7


def test_goals_bound_from_one_side():
    assert Goal(0.95).met(0.95)
    assert not Goal(0.95).met(0.94)
    assert Goal(most=1.5).met(1.5)
    assert not Goal(most=1.5).met(1.51)


def test_attempts_survive_the_json():
    made = Attempt(3, Measurement(1.5), Measurement(2.5, lost=1, facts={"p50": 1}), Measurement(1.6))
    assert from_json(json.loads(json.dumps(as_json(made)))) == made


# The schedule


def fake_cell(name, control, **subjects):
    """A cell whose measurements come from lists; they are noted in the order made."""
    made = []

    def measure(system, values):
        def one():
            made.append(system)
            return Measurement(values.pop(0) if len(values) > 1 else values[0])

        return one

    listed = [schedule.Subject(system, measure(system, list(values))) for system, values in subjects.items()]
    return schedule.Cell("fake", name, "x", "control", measure("control", list(control)), listed), made


def test_each_system_is_measured_between_two_controls():
    cell, made = fake_cell("a", [100], one=[100], two=[100])
    schedule.run([cell], 3, seed=1, deadline=float("inf"), say=lambda text: None)
    assert len(made) == 3 * 5
    for n in range(0, len(made), 5):
        assert made[n : n + 5 : 2] == ["control"] * 3
        assert {made[n + 1], made[n + 3]} == {"one", "two"}


def test_all_pairs_of_cell_and_round_come_in_an_order_that_the_seed_fixes():
    listed = [fake_cell(name, [1])[0] for name in "abcdef"]
    order = schedule.order(listed, 5, seed=7)
    assert sorted((number, cell.variant) for number, cell in order) == sorted((number, name) for number in range(1, 6) for name in "abcdef")
    assert order == schedule.order(listed, 5, seed=7)
    assert order != schedule.order(listed, 5, seed=8)
    assert [cell.variant for _, cell in order] != sorted(cell.variant for _, cell in order)


def test_what_is_invalid_is_measured_again_but_not_for_ever():
    steady, made = fake_cell("steady", [100, 200, *[100] * 50], one=[100])
    (result,) = schedule.run([steady], 5, seed=1, deadline=float("inf"), say=lambda text: None)
    assert sum(one.valid for one in result.attempts) == 5
    assert len(result.attempts) == 6 or not result.attempts[0].valid
    noisy, made = fake_cell("noisy", [100, 200] * 100, one=[100])
    (result,) = schedule.run([noisy], 5, seed=1, deadline=float("inf"), say=lambda text: None)
    assert len(result.attempts) == 10
    assert schedule.summary_of(result, 5).state == "invalid"


def test_a_system_that_lost_something_is_not_measured_again_and_the_others_are():
    cell, made = fake_cell("a", [100], one=[100])

    def losing():
        made.append("losing")
        return Measurement(100, lost=3)

    cell.subjects.append(schedule.Subject("losing", losing))
    results = schedule.run([cell], 5, seed=1, deadline=float("inf"), say=lambda text: None)
    assert {result.subject.system: str(schedule.summary_of(result, 5)) for result in results} == {"one": "1.00", "losing": "LOST 3"}
    assert (made.count("one"), made.count("losing")) == (5, 1)


def test_a_tail_is_that_of_most_seconds_and_an_incomplete_one_does_not_count():
    steady = [(second + n / 100, 2.0 if n == 99 else 1.0) for second in range(5) for n in range(100)]
    hiccup = [(due, 50.0 if 2.2 < due < 2.6 else figure) for due, figure in steady]
    assert percentile([figure for _, figure in hiccup], 0.99) == 50
    assert tail(hiccup) == tail(steady) == tail([*steady, (5.0, 90.0), (6.0, 90.0)]) == 2
    assert tail([(due, 50.0 if int(due) % 2 == 0 else figure) for due, figure in steady]) == 50


def test_a_peer_that_breaks_ends_its_own_cell_only():
    def broken():
        raise RuntimeError("it broke")

    cell, _ = fake_cell("a", [100], one=[100])
    cell.subjects.append(schedule.Subject("broken", broken))
    results = schedule.run([cell], 5, seed=1, deadline=float("inf"), say=lambda text: None)
    assert {result.subject.system: str(schedule.summary_of(result, 5)) for result in results} == {"one": "1.00", "broken": "error"}


def test_what_was_measured_is_kept_when_the_time_is_over_or_somebody_interrupts():
    steady, _ = fake_cell("a", [100], one=[100])
    results = schedule.run([steady], 5, seed=1, deadline=0, say=lambda text: None)
    assert [result.attempts for result in results] == [[]]

    def interrupt():
        raise KeyboardInterrupt

    steady.subjects.append(schedule.Subject("interrupted", interrupt))
    results = schedule.run([steady], 5, seed=1, deadline=float("inf"), say=lambda text: None)
    assert len(results) == 2


def test_a_run_that_is_continued_measures_what_is_missing():
    cell, made = fake_cell("a", [100], one=[100], two=[100], three=[100])
    valid, drifted, lost = attempt(100, 100, 100), attempt(50, 100, 150), attempt(100, 100, 100, lost=1)
    earlier = {(cell.name, "one"): [valid] * 5, (cell.name, "two"): [valid, drifted, valid, valid], (cell.name, "three"): [lost]}
    assert schedule.lacks(cell, earlier, 5) == 2
    results = schedule.run([cell], 5, seed=1, deadline=float("inf"), earlier=earlier, say=lambda text: None)
    assert (made.count("one"), made.count("two"), made.count("three")) == (0, 2, 0)
    assert [(result.subject.system, len(result.attempts)) for result in results] == [("one", 5), ("two", 6), ("three", 1)]
    assert earlier[cell.name, "two"] == [valid, drifted, valid, valid]
    now = {(cell.name, result.subject.system): result.attempts for result in results}
    assert schedule.lacks(cell, now, 5) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"source": "of another commit"}, "another source"),
        ({"changed": True}, "local changes"),
        ({"machine": {"processor": "a", "cores": 4}}, "another machine"),
        ({"versions": {"plain": "PostgreSQL 18.5"}}, "other versions"),
        ({"versions": {}}, None),
    ],
)
def test_results_are_continued_only_by_what_can_stand_beside_them(monkeypatch, changed, words):
    monkeypatch.setattr(report, "git", lambda *words: "")
    monkeypatch.setattr(report, "source", lambda: "of this commit")
    monkeypatch.setattr(report, "machine", lambda: {"processor": "a", "cores": 2, "load_before": 0.1})
    before = {"source": "of this commit", "changed": False, "machine": {"processor": "a", "cores": 2}, "versions": {"plain": "PostgreSQL 18.6"}}
    why = report.cannot_continue(before | changed, {"plain": SimpleNamespace(value=lambda *query: "PostgreSQL 18.6")})
    assert (why is None) if words is None else (words in why)


def test_joined_results_have_each_cell_once_and_name_both_runs():
    def cell(variant, attempts):
        return {"topic": "t", "variant": variant, "system": "lockstep", "attempts": [as_json(attempt(100, 100, 100))] * attempts}

    before = {"seed": 1, "versions": {"plain": "18"}, "cells": [cell("a", 5), cell("b", 2)]}
    after = {"seed": 2, "versions": {"old": "15"}, "cells": [cell("b", 5), cell("c", 1)]}
    joined = report.joined(before, after)
    assert [(one["variant"], len(one["attempts"])) for one in joined["cells"]] == [("a", 5), ("b", 5), ("c", 1)]
    assert (joined["seed"], [run["seed"] for run in joined["earlier"]]) == (2, [1])
    assert joined["versions"] == {"plain": "18", "old": "15"}
    again = report.joined(joined, {"seed": 3, "versions": {}, "cells": []})
    assert [run["seed"] for run in again["earlier"]] == [1, 2]
    assert len(report.attempts(joined)["t: b", "lockstep"]) == 5


def test_the_cells_and_the_rounds_follow_from_the_time():
    listed = [fake_cell(str(n), [1], one=[1])[0] for n in range(10)]

    def plan(minutes):
        return schedule.plan(listed, minutes, 4, lambda cell: cell.variant in "123")

    chosen, rounds, window, _ = plan(120)
    assert (chosen, window) == (listed, 4)
    assert rounds > schedule.LEAST_ROUNDS
    chosen, rounds, window, _ = plan(14)
    assert (chosen, window) == (listed, 2)
    assert rounds >= schedule.LEAST_ROUNDS
    chosen, rounds, _, said = plan(4)
    assert [cell.variant for cell in chosen] == ["1", "2", "3"]
    assert rounds >= schedule.LEAST_ROUNDS
    assert "the core" in said
    _, rounds, _, said = plan(1)
    assert rounds < schedule.LEAST_ROUNDS
    assert "5 rounds" in said


def test_the_core_has_every_topic_and_every_pattern_of_it_names_a_cell():
    listed = all_cells(Bench())
    assert {cell.topic for cell in listed if is_core(cell)} == {cell.topic for cell in listed}
    for pattern in CORE.strip().splitlines():
        assert any(re.fullmatch(pattern, cell.name) for cell in listed), pattern


# The oracle


@pytest.fixture
def log(server, monkeypatch):
    """Makes a system's log on the tests' server, in a database of its own."""
    made = []
    monkeypatch.setattr(logs, "server", lambda name: Server(name, str(server.host), server.port))

    def make(peer):
        made.append(logs.Log(peer, suffix="_oracle"))
        made[-1].reset(1)
        return made[-1]

    yield make
    with server.connect() as connection:
        for one in made:
            connection.execute(f'DROP DATABASE "{one.database}" WITH (FORCE)')


def writer(module, connection):
    client = module.Client.__new__(module.Client)
    client.connection = connection
    return client


def commit_out_of_order(log, module):
    """An event whose writer draws its position first commits after the consumer has read a later one."""
    with log.server.connect(log.database) as slow, log.server.connect(log.database) as quick:
        slow.execute("BEGIN")
        writer(module, slow).append("slow", 1, payload(150))
        writer(module, quick).append("quick", 1, payload(150))
        log.sql("SELECT bench.turn(1, 1000)")
        slow.execute("COMMIT")
    log.sql("SELECT bench.turn(1, 1000)")
    return log.oracle(1)


def test_the_oracle_says_that_the_unprotected_loop_lost_an_event(log):
    lost, doubled = commit_out_of_order(log(insert.PEER), insert)
    assert (lost, doubled) == (1, 0)
    assert str(summarize([attempt(1, 1, 1, lost=lost)], 1)) == "LOST 1"


@pytest.mark.parametrize(("peer", "module"), [(lockstep.PEER, lockstep), (snapshot_xmin.PEER, insert)], ids=["lockstep", "snapshot xmin"])
def test_the_oracle_says_that_a_protected_reader_lost_none(log, peer, module):
    assert commit_out_of_order(log(peer), module) == (0, 0)


def test_the_oracle_counts_what_was_passed_on_twice_and_what_was_not_acknowledged(log):
    unprotected = log(insert.PEER)
    with unprotected.server.connect(unprotected.database) as connection:
        for n in range(1, 4):
            writer(insert, connection).append("a", n, payload(150))
    unprotected.sql("SELECT bench.turn(1, 2)", "UPDATE bench.cursors SET position = 0", "SELECT bench.turn(1, 3)")
    assert unprotected.oracle(1) == (0, 2)
    assert unprotected.oracle(2) == (3, 2)
    assert unprotected.committed() == 3


def test_a_consumer_that_is_behind_is_told_from_one_that_passed_over(log):
    unprotected = log(insert.PEER)

    def behind(consumers):
        return unprotected.value(logs.BEHIND.format(committed=insert.PEER.committed, consumers=consumers))

    assert not behind(1)  # nothing to be behind of
    commit_out_of_order(unprotected, insert)
    assert not behind(1)
    assert behind(2)
    with unprotected.server.connect(unprotected.database) as connection:
        writer(insert, connection).append("later", 1, payload(150))
    assert behind(1)


def test_a_payload_has_the_size_asked_for():
    for size in 150, 2048:
        assert len(payload(size)) == size
        assert json.loads(payload(size))["customer"] == "c-7391"


# What is shown


def result(system, *attempts, topic="append", goal=None, ahead=False, less=False):
    return {
        "topic": topic, "variant": "8 clients", "unit": "events/s", "control": "bare INSERT", "system": system, "less_is_better": less,
        "ahead": ahead, "goal": goal, "errors": [], "attempts": [as_json(one) for one in attempts],
    }  # fmt: skip


@pytest.fixture
def document():
    goal = {"least": 0.95, "most": None, "of": "ratio", "unit": ""}
    return {
        "begun": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "changed": False, "seed": 5, "window": 4, "rounds": 5, "minutes": 9.5,
        "machine": {"processor": "Z80", "cores": 2, "memory_gib": 24}, "versions": {"plain": "PostgreSQL 18.1 on x86_64", "pg": "8"},
        "cells": [
            result("lockstep", *[attempt(100, 97, 100)] * 5, goal=goal, ahead=True),
            result("slow peer", *[attempt(100, 40, 100)] * 5),
            result("position > last seen", *[attempt(100, 99, 100, lost=2)] * 5, topic="loss"),
            result("lockstep", *[attempt(100, 90, 100)] * 5, topic="loss"),
            result("noisy peer", *[attempt(100, 40, 200)] * 9, topic="loss"),
        ],
    }  # fmt: skip


def test_the_table_shows_ratios_verdicts_and_losses(document):
    table = report.markdown(document)
    assert "| 8 clients | bare INSERT | lockstep | 0.97 | 0.97–0.97 | 5 | ≥ 0.95: met; ahead of its peers: met |" in table
    assert "| 8 clients | bare INSERT | slow peer | 0.40 | 0.40–0.40 | 5 |  |" in table
    assert "| position > last seen | LOST 10 |" in table
    assert "| lockstep | 0.90 | 0.90–0.90 | 5 | loses nothing: met |" in table
    assert "| noisy peer | invalid |" in table
    assert "2026-01-02" in table and "0123456789" in table and "PostgreSQL 18.1" in table and "trial" not in table
    assert "trial" in report.markdown(document | {"rounds": 2})


def test_a_goal_that_is_not_met_is_shown_as_missed(document):
    document["cells"][0]["attempts"] = [as_json(attempt(100, 30, 100))] * 5
    assert "≥ 0.95: missed; ahead of its peers: missed" in report.markdown(document)


@pytest.mark.parametrize("failed, verdict", [(0, "met"), (3, "missed")])
def test_an_attempt_that_lockstep_refused_at_a_hot_aggregate_is_a_goal_missed(document, failed, verdict):
    refused = Attempt(1, Measurement(100), Measurement(97, failed=failed), Measurement(100))
    document["cells"] = [result("lockstep", *[refused] * 5, topic="hot aggregate"), result("peer", *[refused] * 5, topic="hot aggregate")]
    assert report.markdown(document).count(f"no attempt refused: {verdict}") == 1


def test_lockstep_too_is_said_to_have_lost(document):
    document["cells"][3]["attempts"] = [as_json(attempt(100, 90, 100, lost=1))] * 5
    assert "| lockstep | LOST 5 |  | 5 | missed |" in report.markdown(document)


def test_charts_are_the_same_bytes_each_time(document, tmp_path):
    charts.draw(document, tmp_path / "one")
    charts.draw(document, tmp_path / "two")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert set(drawn) == {"append.svg", "loss.svg"}
    assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert b"LOST 10" in drawn["loss.svg"] and b"slow peer" in drawn["append.svg"]


def test_what_was_finished_elsewhere_is_shown_beside_the_results(document, tmp_path):
    other = document | {"commit": "fedcba9876543210", "machine": document["machine"] | {"processor": "6502"}}
    other["cells"] = [
        result("lockstep", *[attempt(100, 50, 100)] * 5),
        result("lockstep", *[attempt(100, 70, 100)] * 5, topic="decay"),
        result("unfinished peer", *[attempt(100, 70, 100)] * 4, topic="decay"),
    ]
    report.save(document, tmp_path / "results.json")
    report.save(other, tmp_path / "results-6502.json")
    both = report.load(tmp_path / "results.json")
    report.write_table(both, tmp_path / "results.md")
    first, second = (tmp_path / "results.md").read_text().split("## Measured too")
    assert "Z80" in first and "lockstep | 0.97" in first and "decay" not in first
    assert "6502" in second and "lockstep | 0.50" in second and "lockstep | 0.70" in second and "unfinished peer" not in second
    assert "Z80" in report.paragraph(both) and "6502" in report.paragraph(both) and "decay.svg" in report.paragraph(both)
    charts.draw(both, tmp_path / "img")
    assert {path.name for path in (tmp_path / "img").iterdir()} == {"append.svg", "loss.svg", "decay.svg"}
    assert "Z80" in (tmp_path / "img" / "append.svg").read_text() and "6502" in (tmp_path / "img" / "decay.svg").read_text()
    assert "beside" not in report.joined(both, {"seed": 3, "versions": {}, "cells": []})["earlier"][0]


def test_the_readme_shows_the_charts_of_the_committed_results(tmp_path):
    results, readme = ROOT / "benches" / "results.json", (ROOT / "README.md").read_text()
    if not results.exists():
        assert "No results are committed yet" in readme and "docs/img/" not in readme
        return
    document = report.load(results)
    assert report.paragraph(document) in readme
    report.write_table(document, tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (ROOT / "benches" / "results.md").read_text()
    (tmp_path / "results.md").unlink()
    charts.draw(document, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "img").glob("*.svg")}
    for path in tmp_path.iterdir():
        drawn, committed = comparable(path), comparable(ROOT / "docs" / "img" / path.name)
        assert drawn[0] == committed[0], path.name
        assert drawn[1] == pytest.approx(committed[1], abs=0.1), path.name


def comparable(path):
    """A chart without its numbers and ids, and its numbers: another processor may round otherwise."""
    text = re.sub(r"\b[a-z][0-9a-f]{10}\b", "id", path.read_text())
    number = r"-?\d+\.\d+"
    return re.sub(number, "number", text), [float(found) for found in re.findall(number, text)]


def test_each_cell_is_explained():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    cells_part = page[page.index("\n## The cells\n") : page.index("\n## The peers\n")]
    listed = subprocess.run([sys.executable, ROOT / "benches" / "run", "--list"], check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    assert len(listed) == len(set(listed)) > 100
    assert list(dict.fromkeys(name.split(":")[0] for name in listed)) == re.findall(r"^### (.*)$", cells_part, re.MULTILINE)


def test_each_peer_is_explained():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    files = {path.name for path in (ROOT / "benches" / "peers").iterdir() if path.suffix in (".py", ".js")} - {"__init__.py", "install.py"}
    assert files - set(re.findall(r"benches/peers/([\w.]+)", page)) == set()


def test_every_call_whose_instructions_are_counted_can_be_executed(cluster):
    counter = SimpleNamespace(**runpy.run_path(ROOT / "benches" / "instructions"))
    single = counter.Server(BINDIR, cluster(start=False).directory, SERVER_USER)
    for call in (counter.NOTHING, *counter.CALLS):
        single.execute("base", call.statements(20))


def test_the_quick_run_has_room_for_five_rounds():
    quick = runner.chosen(all_cells(Bench()), "", quick=True, servers={})
    assert {cell.topic for cell in quick} == {"append", "loss"}
    assert {subject.system for cell in quick for subject in cell.subjects} == set(runner.QUICK_SYSTEMS)
    assert schedule.plan(quick, runner.QUICK_MINUTES, 1)[1] >= schedule.LEAST_ROUNDS


def test_cells_of_a_server_that_is_not_there_are_left_out():
    def names(servers):
        return {cell.name for cell in runner.chosen(all_cells(Bench()), "", quick=False, servers=servers)}

    assert names({"old": ...}) - names({}) == {cell.name for cell in all_cells(Bench()) if "PostgreSQL 15" in cell.name}
