"""In which order the cells are measured, how often, and within which time.

All pairs of cell and round come in one shuffled order. Within a pair the systems come in shuffled order too, with the control before
and after each: A B A C A. What is invalid is measured again at the end, at most once more for each round that was wanted.
"""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from measure import LEAST_ROUNDS, Attempt, Goal, Measurement, summarize

MOST_ROUNDS = 15
RESERVE = 0.84  # the part of the time that the first attempts may take; the rest is for those made again


@dataclass(frozen=True)
class Subject:
    """A system that is measured in a cell. A control of its own takes the place of the cell's."""

    system: str
    measure: Callable[[], Measurement]
    control: Callable[[], Measurement] | None = None


@dataclass
class Cell:
    topic: str  # its heading in docs/benchmarks.md
    variant: str
    unit: str
    control_name: str
    control: Callable[[], Measurement] | None
    subjects: list[Subject]
    goal: Goal | None = None  # of lockstep
    less_is_better: bool = False
    ahead: bool = False  # lockstep is to be ahead of every other system that loses nothing
    extra: float = 1.5  # seconds that a measurement takes beside its window, the warm-up's included
    once: float = 0  # seconds that it takes to make what the cell needs
    windows: float = 1  # how many windows it is long
    quick: bool = False  # part of the quick run

    @property
    def name(self):
        return f"{self.topic}: {self.variant}"

    def seconds(self, window):
        """About how long one round takes."""
        own = sum(subject.control is not None for subject in self.subjects)
        measurements = len(self.subjects) + 2 * own + (len(self.subjects) - own + 1 if own < len(self.subjects) else 0)
        return measurements * (self.windows * window + self.extra)


@dataclass
class Result:
    cell: Cell
    subject: Subject
    attempts: list[Attempt] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def plan(cells, minutes, window, is_core=lambda cell: True):
    """The cells, the rounds and the window for this time, and what is to be said of them.

    If there is no time for 5 rounds of all cells, the core is measured; if not for that either, as many rounds of it as there is time for.
    """
    core = [cell for cell in cells if is_core(cell)]
    for chosen in (cells, core):
        for shorter in (window, window / 2, 1):
            shorter = max(1, shorter)
            one, once = sum(cell.seconds(shorter) for cell in chosen), sum(cell.once for cell in chosen)
            rounds = int(max(0, minutes * 60 * RESERVE - once) / one)
            if rounds >= LEAST_ROUNDS:
                break
        if rounds >= LEAST_ROUNDS:
            break
    rounds = max(1, min(rounds, MOST_ROUNDS))
    number = f"{len(chosen)} cells" if len(chosen) == len(cells) else f"{len(chosen)} of {len(cells)} cells (the core)"
    said = f"{number}, {rounds} rounds, windows of {shorter:g} s, about {(once + rounds * one) / 60:.0f} of {minutes:g} minutes"
    if rounds < LEAST_ROUNDS:
        said += f"; {LEAST_ROUNDS} rounds, which figures to be published need, take {(once + LEAST_ROUNDS * one) / RESERVE / 60:.0f}"
    return chosen, rounds, shorter, said


def lacks(cell, earlier, rounds):
    """How many rounds a cell is to be measured yet."""
    made = [Result(cell, subject, earlier.get((cell.name, subject.system), [])) for subject in cell.subjects]
    return max((0 if _has_lost(result) else max(0, rounds - _valid(result)) for result in made), default=rounds)


def order(cells, rounds, seed, earlier=None):
    """All pairs of round and cell, shuffled."""
    pairs = [(number, cell) for cell in cells for number in range(rounds - lacks(cell, earlier or {}, rounds) + 1, rounds + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs


def run(cells, rounds, seed, deadline, earlier=None, say=lambda text: print(text, file=sys.stderr, flush=True)):
    """Measures; returns a Result for each system in each cell. Stops at the deadline, or when it is interrupted, and keeps what it has.
    `earlier`: attempts by cell and system that were made before."""
    earlier = earlier or {}
    keys = [(cell, subject, (cell.name, subject.system)) for cell in cells for subject in cell.subjects]
    results = {key: Result(cell, subject, list(earlier.get(key, []))) for cell, subject, key in keys}
    dice = random.Random(seed)
    try:
        if _all_rounds(results, order(cells, rounds, seed, earlier), rounds, dice, deadline, say):
            _again(results, rounds, dice, deadline, say)
    except KeyboardInterrupt:
        say("==> Interrupted: what was measured is kept")
    return list(results.values())


def _all_rounds(results, pairs, rounds, dice, deadline, say):
    """Tells whether there was time for all pairs."""
    for number, (round_number, cell) in enumerate(pairs, 1):
        if time.monotonic() > deadline:
            say(f"==> The time is over: {len(pairs) - number + 1} of {len(pairs)} pairs of cell and round are left out")
            return False
        say(f"[{number}/{len(pairs)}] {cell.name}, round {round_number}")
        subjects = list(cell.subjects)
        dice.shuffle(subjects)
        before = None
        for subject in subjects:
            if not _wants_more(results[cell.name, subject.system], rounds):
                continue
            before = _attempt(results[cell.name, subject.system], round_number, before, say)
    return True


def _again(results, rounds, dice, deadline, say):
    """What was invalid, at most once more for each round."""
    left = dict.fromkeys(results, rounds)
    while again := [key for key, result in results.items() if left[key] > 0 and _wants_more(result, rounds)]:
        dice.shuffle(again)
        for key in again:
            if time.monotonic() > deadline:
                say("==> The time is over: not all that was invalid was measured again")
                return
            left[key] -= 1
            say(f"[again] {key[0]}, {key[1]}")
            _attempt(results[key], rounds + 1, None, say)


def _has_lost(result):
    return any(attempt.subject.lost for attempt in result.attempts)


def _valid(result):
    return sum(attempt.valid for attempt in result.attempts)


def _wants_more(result, rounds):
    return not _has_lost(result) and _valid(result) < rounds


def _attempt(result, round_number, before, say):
    """One A B A; returns the control after it, which is the control before the next."""
    own = result.subject.control
    control = own or result.cell.control
    try:
        if own or before is None:
            before = control()
        measured = result.subject.measure()
        after = control()
    except Exception as error:  # a peer that breaks ends its own cell, not the run
        result.errors.append(f"{type(error).__name__}: {error}")
        say(f"    {result.subject.system}: {result.errors[-1]}")
        return None
    attempt = Attempt(round_number, before, measured, after)
    result.attempts.append(attempt)
    verdict = f"LOST {measured.lost}" if measured.lost else "" if attempt.valid else f"invalid, drift {attempt.drift:.0%}"
    say(f"    {result.subject.system}: {before.value:,.1f} {measured.value:,.1f} {after.value:,.1f} {result.cell.unit}, {attempt.ratio:.2f} {verdict}")
    return None if own else after


def summary_of(result, rounds):
    return summarize(result.attempts, rounds, len(result.errors))
