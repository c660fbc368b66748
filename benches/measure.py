"""What a measurement is, and what is said of several: ratios to the controls before and after, their median and range, LOST, invalid."""

import statistics
from dataclasses import asdict, dataclass, field

DRIFT = 0.15  # by how much the two controls of an attempt may differ, of their mean
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Measurement:
    """One run of one system: its figure in the cell's unit, and what the oracle says of it."""

    value: float
    lost: int = 0  # acknowledged or committed, and not there, or never passed on
    doubled: int = 0  # there, or passed on, more than once
    failed: int = 0  # attempts that were refused and had to be made again
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """A B A: the control, the system, the control again."""

    round: int
    before: Measurement
    subject: Measurement
    after: Measurement

    @property
    def control(self):
        return (self.before.value + self.after.value) / 2

    @property
    def ratio(self):
        return self.subject.value / self.control if self.control else float("inf")

    @property
    def drift(self):
        return abs(self.before.value - self.after.value) / self.control if self.control else float("inf")

    @property
    def valid(self):
        return self.drift <= DRIFT


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio, or on the figure itself."""

    least: float | None = None
    most: float | None = None
    of: str = "ratio"  # or "value"
    unit: str = ""

    def __str__(self):
        sign, bound = ("≥", self.least) if self.least is not None else ("≤", self.most)
        return f"{sign} {bound:g}{' ' + self.unit if self.unit else ''}"

    def met(self, number):
        return number >= self.least if self.least is not None else number <= self.most


@dataclass(frozen=True)
class Summary:
    """What is reported of one system in one cell."""

    state: str  # "measured" | "lost" | "invalid" | "unfinished" (fewer rounds than wanted) | "error" | "none" (no round was made)
    rounds: int  # valid ones
    ratio: float | None = None
    least: float | None = None
    greatest: float | None = None
    value: float | None = None  # the median figure of the valid rounds; for the JSON and goals on figures
    lost: int = 0
    doubled: int = 0
    failed: int = 0

    def __str__(self):
        if self.state == "lost":
            return f"LOST {self.lost:,}"
        return {"measured": f"{self.ratio:.2f}" if self.ratio is not None else "", "none": "not measured"}.get(self.state, self.state)


def summarize(attempts, wanted, errors=0):
    """The summary of all attempts at a system in a cell, of which `wanted` were to be valid.

    One lost event is enough: no speed makes up for it, so the attempts need not even be valid for that.
    """
    lost = sum(attempt.subject.lost for attempt in attempts)
    doubled = sum(attempt.subject.doubled for attempt in attempts)
    failed = sum(attempt.subject.failed for attempt in attempts)
    valid = [attempt for attempt in attempts if attempt.valid]
    if lost:
        return Summary("lost", len(valid), lost=lost, doubled=doubled, failed=failed)
    if not attempts:
        return Summary("error" if errors else "none", 0)
    if len(valid) < min(wanted, LEAST_ROUNDS):
        return Summary("invalid" if len(attempts) >= wanted else "unfinished", len(valid), doubled=doubled, failed=failed)
    ratios = [attempt.ratio for attempt in valid]
    return Summary(
        "measured", len(valid), statistics.median(ratios), min(ratios), max(ratios),
        statistics.median(attempt.subject.value for attempt in valid), 0, doubled, failed,
    )  # fmt: skip


def tail(timed):
    """The median of the 99th percentiles of each second of a load, so that one hiccup of the machine is in one of them. `timed`: of each
    transaction, or look, the second at which it was due and its figure."""
    begun = min(due for due, _ in timed)
    seconds = {}
    for due, figure in timed:
        seconds.setdefault(int(due - begun), []).append(figure)
    most = max(map(len, seconds.values()))
    return statistics.median(percentile(figures, 0.99) for figures in seconds.values() if len(figures) > most / 2)


def percentile(numbers, part):
    """The least of the numbers that this part of them does not exceed."""
    ordered = sorted(numbers)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def as_json(attempt):
    return asdict(attempt) | {"ratio": attempt.ratio, "drift": attempt.drift, "valid": attempt.valid}


def from_json(document):
    return Attempt(document["round"], *(Measurement(**document[part]) for part in ("before", "subject", "after")))
