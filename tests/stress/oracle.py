"""The stress oracle: random writers, concurrent readers, and whether each reader saw what was committed.

By hand, against a database with the extension in it:

    python tests/stress/oracle.py --seconds 300 --dsn "host=/tmp dbname=scratch user=postgres"

Writers hold transactions open for random times, push several times in one, roll back, use savepoints, prepare (where
max_prepared_transactions lets them), and are killed. Readers insert what they see into a table in the transaction that moves their cursor, so nothing but the reading
protocol decides what is in it. Every reader's table must hold exactly what is in the log, once, in order, and the log
exactly what writers committed.

The modes `naive` and `early_snapshot` replace the readers by protocols that lose events; they show that it can tell.
"""

import argparse
import random
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

import psycopg
from psycopg.types.json import Jsonb

TENANTS = ("", "blue", "green")
# 40P01: several pushes in one transaction may meet another's in the opposite order. LS001: somebody else was first.
EXPECTED_ERRORS = {"40P01", "LS001"}
PREPARED = 8  # transactions that are prepared and not ended, about
KILLED = {"57P01", "57P02", "57P03"}

SCHEMA = """
    CREATE SCHEMA IF NOT EXISTS oracle;
    CREATE TABLE oracle.seen (
        nth bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        reader text NOT NULL, tenant text NOT NULL, position numeric NOT NULL
    );
    CREATE TABLE oracle.cursors (
        reader text, tenant text, position numeric NOT NULL DEFAULT 0, PRIMARY KEY (reader, tenant)
    );
"""


@dataclass(frozen=True)
class Reader:
    """How one projection reads; each has several workers."""

    name: str
    barrier: bool = True
    wait: bool = False
    batch: int = 20
    event_types: tuple = ()


LOCKSTEP_READERS = (
    Reader("barrier"),
    Reader("barrier-wait", wait=True, batch=7),
    Reader("horizon", barrier=False),
    Reader("horizon-wait", barrier=False, wait=True, batch=3),
    Reader("barrier-filtered", batch=5, event_types=("added", "closed")),
    Reader("horizon-filtered", barrier=False, batch=50, event_types=("closed",)),
)


@dataclass
class Verdict:
    """What a reader saw against what was committed."""

    reader: str
    expected: int
    seen: int
    lost: list = field(default_factory=list)
    surplus: list = field(default_factory=list)
    duplicates: list = field(default_factory=list)
    disordered: list = field(default_factory=list)

    @property
    def good(self):
        return not (self.lost or self.surplus or self.duplicates or self.disordered)


@dataclass
class Report:
    """A run's outcome. `problems`: unexpected errors, or a log that is not what was committed, in whatever mode."""

    mode: str
    seed: int
    verdicts: list
    problems: list
    counts: Counter

    @property
    def lost(self):
        return sum(len(verdict.lost) for verdict in self.verdicts)

    @property
    def good(self):
        return not self.problems and all(verdict.good for verdict in self.verdicts)

    def __str__(self):
        lines = [
            f"mode {self.mode}, seed {self.seed}: "
            + ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        ]
        for v in self.verdicts:
            lines.append(
                f"  {v.reader:20} saw {v.seen} of {v.expected}: lost {len(v.lost)}, surplus {len(v.surplus)}, "
                f"duplicates {len(v.duplicates)}, out of order {len(v.disordered)}"
            )
            for what in ("lost", "surplus", "duplicates", "disordered"):
                lines += [f"    {what}: {tenant!r} {position}" for tenant, position in getattr(v, what)[:5]]
        lines += [f"  PROBLEM: {problem}" for problem in self.problems[:20]]
        return "\n".join(lines)


class Run:
    def __init__(self, dsn, seconds, mode="lockstep", writers=8, workers=2, kills=True, prepares=True, seed=None):
        self.dsn, self.seconds, self.mode, self.kills, self.prepares = dsn, seconds, mode, kills, prepares
        self.writers, self.workers = writers, workers
        self.seed = random.randrange(2**32) if seed is None else seed
        self.readers = LOCKSTEP_READERS if mode == "lockstep" else (Reader(mode),)
        self.writing, self.draining = threading.Event(), threading.Event()
        self.committed, self.aborted = set(), set()  # the tags that writers know to be in the log, or not to be
        self.prepared = {}  # of transactions that are to be ended, by their global identifiers: the tags
        self.counts, self.problems = Counter(), []
        self.lock = threading.Lock()
        self.passing = set(KILLED)  # errors after which a client connects again and goes on

    def set_up(self, connection):
        connection.execute(SCHEMA)
        for reader in self.readers:
            connection.execute(
                "SELECT lockstep.projection_create(%s, event_types => %s)",
                (reader.name, list(reader.event_types) or None),
            )
            for tenant in TENANTS:
                connection.execute("INSERT INTO oracle.cursors VALUES (%s, %s)", (reader.name, tenant))

    def run(self):
        with self.connect("setup") as connection:
            self.set_up(connection)
            places = connection.execute("SELECT current_setting('max_prepared_transactions')::int").fetchone()[0]
            self.prepares = self.prepares and places >= PREPARED + self.writers
        self.writing.set()
        readers = [
            threading.Thread(target=self.guarded, args=(self.read_all, reader, number))
            for reader in self.readers
            for number in range(self.workers)
        ]
        writers = [
            threading.Thread(target=self.guarded, args=(self.write_all, number)) for number in range(self.writers)
        ]
        if self.kills:
            writers.append(threading.Thread(target=self.guarded, args=(self.kill_all,)))
        ender = threading.Thread(target=self.guarded, args=(self.end_prepared, writers))
        for thread in [*readers, *writers, ender]:
            thread.start()
        self.pause(self.seconds)
        self.writing.clear()
        for thread in [*writers, ender]:
            thread.join()
        self.draining.set()
        for thread in readers:
            thread.join()
        return self.judge()

    def connect(self, role):
        return psycopg.connect(self.dsn, autocommit=True, application_name=f"oracle {role}")

    def guarded(self, target, *arguments):
        """An error that nobody expected ends the thread and is in the report."""
        try:
            target(*arguments)
        except Exception as error:
            self.problem(f"{target.__name__}: {type(error).__name__} {getattr(error, 'sqlstate', '')} {error}")
            self.writing.clear()

    def problem(self, text):
        with self.lock:
            self.problems.append(text)

    def count(self, what, number=1):
        with self.lock:
            self.counts[what] += number

    def pause(self, seconds):
        """Returns when the time is over, or before if the run has failed."""
        end = time.monotonic() + seconds
        while self.writing.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    # Writers

    def write_all(self, number):
        dice = random.Random(f"{self.seed} writer {number}")
        connection = self.connect("writer")
        while self.writing.is_set():
            try:
                self.write(connection, dice)
            except psycopg.Error as error:
                if not connection.closed and error.sqlstate not in self.passing:
                    raise
                connection.close()
                self.count("connections killed")
                connection = self.connect("writer")
        connection.close()

    def write(self, connection, dice):
        """One transaction. What it pushed is known to be committed or aborted, unless it was killed in its COMMIT."""
        tags = []
        connection.execute("BEGIN")
        try:
            for _ in range(dice.choice((1, 1, 1, 2, 3))):
                self.hold(dice)
                if dice.random() < 0.15:
                    self.push_and_roll_back(connection, dice)
                elif dice.random() < 0.3:
                    connection.execute("SAVEPOINT s")
                    tags += self.push(connection, dice)
                    connection.execute("RELEASE s")
                else:
                    tags += self.push(connection, dice)
            self.hold(dice)
            if dice.random() < 0.15:
                connection.execute("ROLLBACK")
                self.ended(self.aborted, tags, "transactions rolled back")
                return
        except psycopg.Error as error:
            self.ended(self.aborted, tags, "transactions failed")
            if error.diag.sqlstate not in EXPECTED_ERRORS:
                raise
            self.count(f"errors {error.diag.sqlstate}")
            connection.execute("ROLLBACK")
            return
        if self.prepares and len(self.prepared) < PREPARED and dice.random() < 0.15:
            gid = f"oracle {dice.getrandbits(64)}"
            self.prepared[gid] = tags
            try:
                connection.execute(f"PREPARE TRANSACTION '{gid}'")
            except psycopg.Error:  # killed, in time or not
                self.prepared.pop(gid, None)
                raise
            return
        connection.execute("COMMIT")
        self.ended(self.committed, tags, "transactions committed")

    def end_prepared(self, writers):
        """Ends what was prepared, some time later, while its session goes on; also what a kill left, of which nobody knows."""
        dice = random.Random(f"{self.seed} ender")
        there = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY random() LIMIT 1"
        with self.connect("ender") as connection:
            while any(thread.is_alive() for thread in writers) or connection.execute(there).fetchone():
                time.sleep(dice.choice((0, 0.002, 0.02)))
                for (gid,) in connection.execute(there).fetchall():
                    commits = dice.random() < 0.8
                    try:
                        connection.execute(f"{'COMMIT' if commits else 'ROLLBACK'} PREPARED '{gid}'")
                    except psycopg.errors.ObjectNotInPrerequisiteState:  # its PREPARE has not returned
                        continue
                    tags = self.prepared.pop(gid, ())
                    self.ended(self.committed if commits else self.aborted, tags, "prepared transactions ended")

    def ended(self, into, tags, what):
        with self.lock:
            into.update(tags)
            self.counts[what] += 1

    def push_and_roll_back(self, connection, dice):
        connection.execute("SAVEPOINT s")
        tags = self.push(connection, dice)
        self.hold(dice)
        connection.execute("ROLLBACK TO s")
        with self.lock:
            self.aborted.update(tags)

    def push(self, connection, dice):
        tags, events = [], []
        for _ in range(dice.choice((1, 1, 1, 2, 5))):
            tags.append(str(uuid.UUID(int=dice.getrandbits(128), version=4)))
            event = {
                "aggregate_type": "order",
                "aggregate_id": str(min(dice.randrange(200), dice.randrange(200))),
                "event_type": dice.choice(("added", "removed", "moved", "closed")),
                "event_id": tags[-1],
            }
            if dice.random() < 0.02:
                event["expected_sequence"] = 0
            events.append(event)
        self.send(connection, events, dice.choice(TENANTS))
        return tags

    def send(self, connection, events, tenant):
        connection.execute("SELECT FROM lockstep.push_events(%s, %s)", (Jsonb(events), tenant))

    def hold(self, dice):
        """Most transactions are short, some are slow."""
        time.sleep(dice.choice((0, 0, 0, 0.001, 0.005, 0.02, 0.1 if dice.random() < 0.2 else 0)))

    def kill_all(self):
        """Terminates random writers and readers, whatever they are doing."""
        dice = random.Random(f"{self.seed} killer")
        with self.connect("killer") as connection:
            while self.writing.is_set():
                self.pause(dice.uniform(0.05, 0.4))
                connection.execute(
                    """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE datname = current_database()
                         AND application_name = ANY (%s) ORDER BY random() LIMIT 1""",
                    (["oracle writer", "oracle writer", "oracle reader"],),
                )

    # Readers

    def read_all(self, reader, number):
        """Reads until the writers have ended and a whole round over the tenants found nothing."""
        dice = random.Random(f"{self.seed} reader {reader.name} {number}")
        connection = self.connect("reader")
        while True:
            draining, left = self.draining.is_set(), False
            for tenant in dice.sample(TENANTS, len(TENANTS)):
                try:
                    left |= self.read(connection, reader, tenant, dice)
                except psycopg.Error as error:
                    if not connection.closed and error.sqlstate not in self.passing:
                        raise
                    connection.close()
                    self.count("connections killed")
                    connection, left = self.connect("reader"), True
            if draining and not left:
                break
        connection.close()

    def read(self, connection, reader, tenant, dice):
        """One transaction of a reader; true if there may be more to read."""
        connection.execute("BEGIN")
        read = {"lockstep": self.claim, "naive": self.naive, "early_snapshot": self.early_snapshot}[self.mode]
        positions, left, advance = read(connection, reader, tenant, dice)
        if positions:
            if dice.random() < 0.2:
                positions = positions[: dice.randint(1, len(positions))]
            connection.execute(
                "INSERT INTO oracle.seen (reader, tenant, position) SELECT %s, %s, unnest(%s::numeric[])",
                (reader.name, tenant, positions),
            )
            advance(positions[-1])
            if dice.random() < 0.1:
                connection.execute("ROLLBACK")
                self.count("claims rolled back")
                return True
            self.count("batches read")
        connection.execute("COMMIT")
        return bool(left or positions)

    def claim(self, connection, reader, tenant, dice):
        size = dice.choice((None, 1, reader.batch, reader.batch))
        rows = connection.execute(
            "SELECT position FROM lockstep.projection_claim(%s, %s, barrier => %s, wait => %s, tenant => %s)",
            (reader.name, size, reader.barrier, reader.wait, tenant),
        ).fetchall()
        status, more = connection.execute(
            "SELECT status, more FROM lockstep.projection_claim_state(%s, %s)", (reader.name, tenant)
        ).fetchone()

        def advance(position):
            connection.execute("SELECT lockstep.projection_advance(%s, %s, %s)", (reader.name, position, tenant))

        return [position for (position,) in rows], more or status == "busy", advance

    def own_cursor(self, connection, reader, tenant, query):
        """A reader that keeps its cursor in a table of its own, locked while it reads."""
        (after,) = connection.execute(
            "SELECT position FROM oracle.cursors WHERE reader = %s AND tenant = %s FOR UPDATE", (reader.name, tenant)
        ).fetchone()
        parameters = {"tenant": tenant, "after": after, "batch": reader.batch}

        def advance(position):
            connection.execute(
                "UPDATE oracle.cursors SET position = %s WHERE reader = %s AND tenant = %s",
                (position, reader.name, tenant),
            )

        return [position for (position,) in connection.execute(query, parameters).fetchall()], False, advance

    def naive(self, connection, reader, tenant, dice):
        """What people write first: everything above the last position seen."""
        return self.own_cursor(
            connection,
            reader,
            tenant,
            """SELECT position FROM lockstep.events WHERE tenant = %(tenant)s AND position > %(after)s
               ORDER BY position LIMIT %(batch)s""",
        )

    def early_snapshot(self, connection, reader, tenant, dice):
        """The barrier in the statement that reads: its snapshot is from before the wait."""
        return self.own_cursor(connection, reader, tenant, EARLY_SNAPSHOT)

    # The verdict

    def judge(self):
        with self.connect("judge") as connection:
            log = connection.execute(
                "SELECT tenant, position, event_type, event_id::text FROM lockstep.events ORDER BY tenant, position"
            ).fetchall()
            tags = {tag for _, _, _, tag in log}
            for what, wrong in (
                ("committed but not in", self.committed - tags),
                ("rolled back but in", self.aborted & tags),
            ):
                if wrong:
                    self.problem(f"{len(wrong)} events {what} the log: {sorted(wrong)[:5]}")
            gaps = connection.execute(
                """SELECT count(*) FROM (
                     SELECT FROM lockstep.events GROUP BY tenant, aggregate_type, aggregate_id
                     HAVING max(sequence) <> count(*) OR min(sequence) <> 1) AS wrong"""
            ).fetchone()[0]
            if gaps:
                self.problem(f"{gaps} aggregates whose sequences have gaps")
            verdicts = [self.verdict(connection, reader, log) for reader in self.readers]
        self.counts["events committed"] = len(log)
        if not log:
            self.problem("nothing was committed: this run shows nothing")
        return Report(self.mode, self.seed, verdicts, self.problems, self.counts)

    def verdict(self, connection, reader, log):
        expected = [
            (tenant, position)
            for tenant, position, event_type, _ in log
            if not reader.event_types or event_type in reader.event_types
        ]
        seen = connection.execute(
            "SELECT tenant, position FROM oracle.seen WHERE reader = %s ORDER BY nth", (reader.name,)
        ).fetchall()
        last, disordered = {}, []
        for tenant, position in seen:
            if position <= last.get(tenant, 0):
                disordered.append((tenant, position))
            last[tenant] = max(position, last.get(tenant, 0))
        return Verdict(
            reader.name,
            expected=len(expected),
            seen=len(seen),
            lost=sorted(set(expected) - set(seen)),
            surplus=sorted(set(seen) - set(expected)),
            duplicates=[key for key, number in Counter(seen).items() if number > 1],
            disordered=disordered,
        )


EARLY_SNAPSHOT = """
    WITH settled AS MATERIALIZED (SELECT lockstep.barrier(%(tenant)s) AS position)
    SELECT e.position FROM settled CROSS JOIN lockstep.events AS e
    WHERE e.tenant = %(tenant)s AND e.position > %(after)s AND e.position <= settled.position
    ORDER BY e.position LIMIT %(batch)s
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dsn", required=True, help="a database with the extension in it, as a superuser")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--mode", choices=("lockstep", "naive", "early_snapshot"), default="lockstep")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="for each reader")
    parser.add_argument("--seed", type=int)
    options = vars(parser.parse_args())
    report = Run(options.pop("dsn"), options.pop("seconds"), **options).run()
    print(report)
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()
