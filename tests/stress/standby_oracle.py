"""What concurrent readers of a standby saw, against what the primary finally has.

Each read asks for the events after some position, at most so many, of one tenant and one filter. It must be the beginning of what
the primary's log holds after that position at last: no hole, nothing that is not there, in order. Where to begin is the end of
the reader's last read, any position that it has seen, or 0.
"""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass

import psycopg

TENANTS = ("", "blue", "green")
FILTERS = (
    (None, None),
    (("order",), None),
    (None, ("closed",)),
    (None, ("added", "removed")),
)

SETTLED = """
    SELECT position FROM lockstep.read_events(%(after)s, %(most)s, %(aggregate_types)s, %(event_types)s, tenant => %(tenant)s)
"""
# What loses events on a standby as it does on a primary: everything that is visible.
VISIBLE = """
    SELECT position FROM lockstep.events
    WHERE tenant = %(tenant)s AND position > %(after)s
      AND (%(aggregate_types)s::text[] IS NULL OR aggregate_type = ANY (%(aggregate_types)s))
      AND (%(event_types)s::text[] IS NULL OR event_type = ANY (%(event_types)s))
    ORDER BY position LIMIT %(most)s
"""


@dataclass(frozen=True)
class Read:
    tenant: str
    aggregate_types: tuple | None
    event_types: tuple | None
    after: object
    most: int
    positions: tuple


def read(session, query, tenant, filters, after, most):
    aggregate_types, event_types = filters
    parameters = {
        "tenant": tenant,
        "aggregate_types": aggregate_types and list(aggregate_types),
        "event_types": event_types and list(event_types),
        "after": after,
        "most": most,
    }
    rows = session.execute(query, parameters).fetchall()
    return Read(tenant, aggregate_types, event_types, after, most, tuple(position for (position,) in rows))


class Readers:
    """Threads that read until told to stop; `connect()` opens a session on the standby."""

    def __init__(self, connect, count=4, query=SETTLED, seed=None):
        self.connect, self.query = connect, query
        self.seed = random.randrange(2**32) if seed is None else seed
        self.reads, self.problems, self.counts = [], [], Counter()
        self.going = threading.Event()
        self.threads = [threading.Thread(target=self._guarded, args=(number,)) for number in range(count)]

    def __enter__(self):
        self.going.set()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.going.clear()
        for thread in self.threads:
            thread.join()

    def _guarded(self, number):
        try:
            self._read_all(random.Random(f"{self.seed} {number}"))
        except Exception as error:
            self.problems.append(f"{type(error).__name__} {getattr(error, 'sqlstate', '')} {error}")

    def _read_all(self, dice):
        ends = {}
        with self.connect() as session:
            while self.going.is_set():
                tenant, filters = dice.choice(TENANTS), dice.choice(FILTERS)
                seen = ends.setdefault((tenant, filters), [0])
                after = dice.choice((seen[-1], seen[-1], dice.choice(seen), 0))
                most = dice.choice((1, 7, 100, 1_000_000))
                try:
                    self._read(session, dice, tenant, filters, after, most, seen)
                except psycopg.errors.SerializationFailure:  # a conflict with recovery; it says to repeat
                    self.counts["conflicts"] += 1

    def _read(self, session, dice, tenant, filters, after, most, seen):
        if dice.random() < 0.1:
            # One snapshot for two reads: what lies between them is of no account.
            with session.transaction():
                session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                made = read(session, self.query, tenant, filters, after, most)
                time.sleep(dice.uniform(0, 0.02))
                if read(session, self.query, tenant, filters, after, most) != made:
                    self.problems.append(f"two reads in one snapshot differ after {after}")
        else:
            made = read(session, self.query, tenant, filters, after, most)
        self.reads.append(made)
        if made.positions:
            seen.append(made.positions[-1])


@dataclass
class Judgement:
    reads: int
    with_events: int
    partial: int  # ended by what is settled, with more of the log to come: where a hole could have been
    wrong: list

    def __str__(self):
        lines = [f"{self.reads} reads, {self.with_events} with events, {self.partial} that ended before the log did"]
        return "\n".join(lines + [f"  WRONG: {text}" for text in self.wrong[:10]])


def judge(reads, log):
    """`log`: the primary's (tenant, position, aggregate_type, event_type) at last, by position."""
    result = Judgement(len(reads), 0, 0, [])
    wanted = {}
    for made in reads:
        key = (made.tenant, made.aggregate_types, made.event_types)
        if key not in wanted:
            wanted[key] = [
                position
                for tenant, position, aggregate_type, event_type in log
                if tenant == made.tenant
                and (made.aggregate_types is None or aggregate_type in made.aggregate_types)
                and (made.event_types is None or event_type in made.event_types)
            ]
        after = [position for position in wanted[key] if position > made.after]
        expected = tuple(after[: len(made.positions)])
        if made.positions != expected:
            missing = sorted(set(expected) - set(made.positions))
            surplus = sorted(set(made.positions) - set(wanted[key]))
            result.wrong.append(f"{made.tenant!r} after {made.after}: missing {missing[:5]}, surplus {surplus[:5]}")
        result.with_events += bool(made.positions)
        result.partial += len(made.positions) < min(made.most, len(after))
    return result
