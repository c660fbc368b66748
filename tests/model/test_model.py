"""The protocol's model, searched by spin in every interleaving; and the same with one step broken, which spin must find.

A counterexample is not only any failure: each mutant must fail by the assertion that is about what it breaks.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("barrier.pml")

PASSED = r"assertion violated +!\(\(mine&\(\(1<<(logged_)?cursor\[[01]\]\)-1\)\)\)"
PASSED_ON_STANDBY = r"assertion violated +!\(\(mine&\(\(1<<logged_cursor\[[01]\]\)-1\)\)\)"
LEFT_OUT = r"assertion violated \(applied\[projection\]==\(\(visible&"
READ_AGAIN = r"assertion violated +(!\(\(batch&applied\[projection\]\)\)|\(position>=cursor\[projection\]\))"
SEQUENCE = r"assertion violated \(sequence==length\["
WAITS_IN_FLIGHT = r"assertion violated \(mine\|\| !\(\(writers&"
DEADLOCK = r"invalid end state"
NEVER = r"acceptance cycle"
WITNESSED = r"assertion violated "


@dataclass
class Search:
    """What pan printed."""

    output: str

    @property
    def states(self):
        return int(re.search(r"^\s*(\d+) states, stored", self.output, re.MULTILINE)[1])

    @property
    def violation(self):
        found = re.search(r"^pan:1: (.*)", self.output, re.MULTILINE)
        return found and found[1]

    @property
    def complete(self):
        return "errors: 0" in self.output and "not completed" not in self.output and "too small" not in self.output

    @property
    def unreached(self):
        """The lines of the model's sessions that no interleaving came to."""
        section = re.search(r"^unreached in proctype session\n((?:\t.*\n)*)", self.output, re.MULTILINE)[1]
        return set(re.findall(r"^\t\S+?:(\d+), state", section, re.MULTILINE))


@pytest.fixture
def search(tmp_path):
    """Searches the model with these macros: `search("CUT_AFTER_BARRIER", WRITERS=1)`. `claim`: the promise to check, else assertions."""

    def run(*flags, claim=None, **bounds):
        macros = [f"-D{name}={value}" for name, value in bounds.items()] + [f"-D{flag}" for flag in flags]
        # COLLAPSE halves the memory of a large search; NFAIR: room for what fairness counts.
        options = ["-DCOLLAPSE", "-DNFAIR=3"] if claim else ["-DCOLLAPSE", "-DSAFETY"]
        _run(tmp_path, "spin", "-a", *macros, str(MODEL))
        # A search that ends early is compiled longer than it runs.
        _run(tmp_path, "cc", "-w", "-O0" if flags else "-O1", *options, "-o", "pan", "pan.c")
        output = _run(tmp_path, "./pan", "-m1000000", *(["-a", "-f", "-N", claim] if claim else []))
        assert "max search depth too small" not in output, output
        return Search(output)

    return run


def _run(directory, *command):
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 or command[0] == "./pan", done.stdout
    return done.stdout


def bounds(writers=0, readers=0, both=0, transactions=1, pushes=1, prepares=0):
    sessions = {"WRITERS": writers, "READERS": readers, "BOTH": both}
    return sessions | {"TRANSACTIONS": transactions, "PUSHES": pushes, "PREPARES": prepares}


# Each with the least number of states that it must have: fewer would mean that something is no longer tried.
SMALL = {
    "two writers, one reader": (bounds(writers=2, readers=1), 150_000),
    "one writer, one that does both": (bounds(writers=1, both=1, pushes=2), 200_000),
    "one writer, two readers": (bounds(writers=1, readers=2), 90_000),
    "three writers of two aggregates": (bounds(writers=3), 20_000),
    "one writer that prepares, one reader": (bounds(writers=1, readers=1, transactions=2, prepares=1), 200_000),
}
LARGE = {
    "two writers, one prepares, one reader": (bounds(writers=2, readers=1, prepares=1), 2_000_000),
    "a writer, a reader, one that does both": (bounds(writers=1, readers=1, both=1), 800_000),
    "two readers, two transactions": (bounds(writers=1, readers=2, transactions=2), 700_000),
    "three writers of two pushes": (bounds(writers=3, pushes=2), 2_000_000),
    "two pushes a transaction": (bounds(writers=2, readers=1, pushes=2), 2_000_000),
    "three writers, one reader": (bounds(writers=3, readers=1), 4_000_000),
    "two pushes a transaction, one does both": (bounds(writers=1, readers=1, both=1, pushes=2), 10_000_000),
    "two transactions each": (bounds(writers=2, readers=1, transactions=2), 10_000_000),
}


def test_no_interleaving_loses_an_event_or_reads_one_twice_and_every_line_is_reached(search):
    never_reached = None
    for name, (limits, least) in SMALL.items():
        result = search(**limits)
        assert result.complete and not result.violation, f"{name}:\n{result.output}"
        assert result.states >= least, f"{name}: {result.states} states"
        never_reached = result.unreached if never_reached is None else never_reached & result.unreached
    assert not never_reached, f"no search comes to these lines of {MODEL.name}: {sorted(never_reached)}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LARGE)
def test_nor_in_larger_bounds(search, name):
    limits, least = LARGE[name]
    result = search(**limits)
    assert result.complete and not result.violation, result.output
    assert result.states >= least


LOG = bounds(writers=2, readers=1)
CLAIMS = bounds(writers=1, readers=2, transactions=2)

MUTANTS = {
    # The reader
    "CUT_AFTER_BARRIER": (PASSED, LOG),
    "SNAPSHOT_BEFORE_WAIT": (LEFT_OUT, LOG),
    "NO_BARRIER": (PASSED, LOG),
    "CUT_AFTER_LOCKS": (PASSED, LOG),
    "SNAPSHOT_BEFORE_LOCKS": (LEFT_OUT, LOG),
    "MISSING_START_IS_AN_END": (f"{PASSED}|{LEFT_OUT}", bounds(writers=2, readers=1, prepares=1)),
    "NO_NUMBER": (f"{PASSED}|{LEFT_OUT}", bounds(writers=1, readers=1, transactions=3, prepares=1)),
    "NUMBER_BEFORE_START": (f"{PASSED}|{LEFT_OUT}", bounds(writers=2, readers=1, transactions=2, prepares=1)),
    # The writer
    "TICKET_BEFORE_LOCK": (PASSED, LOG),
    "START_AFTER_TICKET": (PASSED, LOG),
    "CACHED_TICKETS": (PASSED, bounds(writers=2, readers=1, transactions=2)),
    "SAVEPOINT_RELEASES_ALL": (PASSED, bounds(writers=2, readers=1, pushes=2)),
    "SEQUENCE_BEFORE_LOCK": (SEQUENCE, bounds(writers=3)),
    "WRITER_BEFORE_AGGREGATE": (WAITS_IN_FLIGHT, bounds(writers=3)),
    # What the protocol expects of PostgreSQL
    "LOCKS_BEFORE_VISIBLE": (PASSED, LOG),
    "VISIBLE_BEFORE_LOGGED": (PASSED_ON_STANDBY, LOG),
    # The claim
    "NO_CLAIM_LOCK": (READ_AGAIN, CLAIMS),
    "CURSOR_BEFORE_LOCK": (READ_AGAIN, CLAIMS),
    "BARRIER_AFTER_PUSH": (DEADLOCK, bounds(both=2)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_one_step_out_of_place_is_found(search, mutant):
    expected, limits = MUTANTS[mutant]
    result = search(mutant, **limits)
    assert result.violation and re.match(expected, result.violation), result.output


PROMISES = {
    "a_push_gets_the_writers_lock": "QUEUEING_BARRIER",  # though a barrier waits for a writer that never ends
    "what_is_committed_is_read": "START_IS_KEPT",
}


@pytest.mark.parametrize("claim", PROMISES)
def test_what_is_promised_to_happen_happens(search, claim):
    result = search("LIVENESS", claim=claim, **LOG)
    assert result.complete and not result.violation, result.output
    assert result.states >= 20_000
    broken = search("LIVENESS", PROMISES[claim], claim=claim, **LOG)
    assert broken.violation and re.match(NEVER, broken.violation), broken.output


WITNESSES = {
    "both projections have read what they want": "visible == 3 && applied[0] == 3 && applied[1] == 1",
    "a writer draws a ticket while a barrier waits for another": "waits_for[2] == 1 && writers == 3 && ticket == 2",
    "an event above the ticket of a push that was rolled back is read": "visible == 2 && applied[0] == 2 && !running",
    "a reader has passed nothing of the writer in flight below it": "visible == 2 && start[0] == 1 && cursor[1] == 0 && waits_for[2] == 0",
}


@pytest.mark.parametrize("name", WITNESSES)
def test_the_model_comes_to_where_it_matters(search, name):
    result = search(f"REACHES='({WITNESSES[name]})'", **LOG)  # spin hands it to a shell
    assert result.violation and re.match(WITNESSED, result.violation), result.output
