"""The registry's oracle: random changes, syncs, failures and kills, a history of what committed, and a replay that must agree.

By hand, against a database with the extension in it:

    python tests/stress/registry.py --seconds 300 --dsn "host=/tmp dbname=scratch user=postgres"

Each call inserts what it did and what it was told into a history, in its own transaction and while it holds its locks: so the
history of a resource is in the order in which its calls took effect, and holds those that committed. The replay is a model of a
registry without any concurrency; it must predict every answer, and at the end every row. Where a call locks nothing that the one
before it has locked, it may be told what was before that one, if the two were under way at once: the clients note on one clock
when each call began and when it had its answer. Beside it a reader polls: no
generation may be seen to fall within one incarnation.
"""

import argparse
import itertools
import math
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import psycopg

REPLICAS = ("a", "b", "c")
# Somebody else was first; the transaction did nothing.
EXPECTED_ERRORS = {"LS005", "LS006", "42704", "42710"}
KILLED = {"57P01", "57P02", "57P03"}

SCHEMA = """
    CREATE SCHEMA IF NOT EXISTS oracle;
    CREATE TABLE oracle.history (
        n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        call text NOT NULL, resource text NOT NULL, replica text, replicas text[], source text,
        token bigint, incarnation bigint, generation bigint, answer text, begun bigint
    );
"""

# The call comes first, in a part of its own: the number in the history is drawn under its locks.
RECORD = """
    WITH done AS MATERIALIZED ({call})
    INSERT INTO oracle.history (call, resource, replica, replicas, source, token, incarnation, generation, answer, begun)
    SELECT %(name)s, {resource}, {replica}, %(replicas)s::text[], %(source)s, {token}, {incarnation}, {generation}, {answer}, %(begun)s
    FROM done
    RETURNING resource, replica, token, answer, n, incarnation
"""


def recorded(call, **columns):
    defaults = {
        "resource": "%(resource)s",
        "replica": "%(replica)s::text",
        "token": "%(token)s::bigint",
        "incarnation": "NULL::bigint",
        "generation": "%(generation)s::bigint",
        "answer": "NULL::text",
    }
    return RECORD.format(call=call, **(defaults | columns))


CALLS = {
    "create": recorded(
        "SELECT lockstep.resource_create(%(resource)s, %(replicas)s) AS i", incarnation="i"
    ),
    "delete": recorded("SELECT lockstep.resource_delete(%(resource)s) AS d", answer="d::text"),
    "increment": recorded(
        "SELECT lockstep.generation_increment(%(resource)s, %(replicas)s) AS g", generation="g"
    ),
    "set": recorded(
        "SELECT lockstep.generation_set(%(resource)s, %(replica)s, %(generation)s) AS s", answer="s"
    ),
    "authoritative": recorded(
        "SELECT lockstep.replica_make_authoritative(%(resource)s, %(replica)s) AS g", generation="g"
    ),
    "drop": recorded("SELECT lockstep.replica_delete(%(resource)s, %(replica)s) AS d", answer="d::text"),
    "invalidate": recorded("SELECT lockstep.replica_invalidate(%(resource)s, %(replica)s) AS d", answer="d::text"),
    "begin": recorded(
        "SELECT * FROM lockstep.replica_sync_begin(%(resource)s, %(replica)s, 'w', %(source)s, %(ttl)s)",
        token="done.token", incarnation="done.incarnation", generation="done.generation", answer="done.status",
    ),
    "claim": recorded(
        "SELECT * FROM lockstep.replica_sync_claim('w', 3, %(ttl)s)",
        resource="done.resource", replica="done.target", token="done.token", incarnation="done.incarnation",
        generation="done.generation", answer="'started'",
    ),
    "finish": recorded(
        "SELECT lockstep.replica_sync_finish(%(resource)s, %(replica)s, %(token)s) AS s", answer="s"
    ),
    "fail": recorded(
        "SELECT lockstep.replica_sync_finish(%(resource)s, %(replica)s, %(token)s, 'no') AS s", answer="s"
    ),
}  # fmt: skip


@dataclass
class Claim:
    token: int
    generation: int
    source: str
    source_lost: bool = False


@dataclass
class Resource:
    incarnation: int
    created_by: int
    generation: int = 0
    replicas: dict = field(default_factory=dict)
    claims: dict = field(default_factory=dict)
    synced: dict = field(default_factory=dict)
    added: dict = field(default_factory=dict)
    deleted: bool = False


class Model:
    """A registry that is told one call after the other. What depends on the clock it believes, as far as that can be true."""

    def __init__(self, answered):
        self.answered = answered
        self.resources = {}
        self.wrong = []
        self.answers = Counter()

    def need_not_know(self, row, n):
        """Whether the call of this row began before the one of that number had its answer, if it ever had."""
        return self.answered.get(n, math.inf) > row["begun"]

    def tell(self, row):
        call, resource, answer = row["call"], self.resources.get(row["resource"]), row["answer"]
        live = resource is not None and not resource.deleted
        # Once a tombstone is purged there is no row to lock: a call that finds nothing may be numbered after a creation that had
        # not yet committed.
        if live and answer in ("false", "gone") and self.need_not_know(row, resource.created_by):
            live = False
        expected = getattr(self, call)(row, resource if live else None)
        given = {"create": row["incarnation"], "increment": row["generation"], "authoritative": row["generation"]}.get(call, answer)
        self.answers[f"{call} {answer or 'done'}"] += 1
        if given not in (expected if isinstance(expected, tuple) else (expected,)):
            self.wrong.append(f"{row}: expected {expected}")

    def create(self, row, resource):
        before = self.resources.get(row["resource"])
        if resource or (before and before.incarnation >= row["incarnation"]):
            return "no such creation"
        self.resources[row["resource"]] = Resource(row["incarnation"], row["n"], replicas=dict.fromkeys(row["replicas"], 0))
        return row["incarnation"]

    def delete(self, _, resource):
        if resource:
            resource.deleted, resource.replicas, resource.claims = True, {}, {}
        return str(bool(resource)).lower()

    def increment(self, row, resource):
        if not resource:
            return "42704"
        followers = [name for name in row["replicas"] or () if resource.replicas.get(name) == resource.generation]
        if row["replicas"] is not None and not followers:
            return "LS005"
        resource.generation += 1
        resource.replicas |= dict.fromkeys(followers, resource.generation)
        return resource.generation

    def set(self, row, resource):
        if not resource:
            return "gone"
        held = resource.replicas.get(row["replica"])
        if held is not None and held >= row["generation"]:
            return "unchanged" if held == row["generation"] else "downgrade"
        resource.replicas[row["replica"]] = row["generation"]
        resource.generation = max(resource.generation, row["generation"])
        return "applied"

    def authoritative(self, row, resource):
        if not resource or row["replica"] not in resource.replicas:
            return "42704"
        resource.generation += 1
        resource.replicas[row["replica"]] = resource.generation
        resource.claims.pop(row["replica"], None)
        return resource.generation

    def drop(self, row, resource):
        if not resource or row["replica"] not in resource.replicas:
            return "false"
        del resource.replicas[row["replica"]]
        resource.claims.pop(row["replica"], None)
        for claim in resource.claims.values():
            claim.source_lost |= claim.source == row["replica"]
        return "true"

    def invalidate(self, row, resource):
        answer = self.drop(row, resource)
        if answer == "true" and not resource.replicas:
            self.delete(row, resource)
        return answer

    def begin(self, row, resource):
        if not resource:
            return "gone"
        name = row["replica"]
        if name not in resource.replicas:
            resource.added[name] = row["n"]
        if resource.replicas.setdefault(name) == resource.generation:
            return "current"
        if row["answer"] in ("busy", "backoff"):
            return "busy" if name in resource.claims and row["answer"] == "busy" else "backoff"
        if (row["incarnation"], row["generation"]) != (resource.incarnation, resource.generation):
            return "another generation"
        if row["source"] and resource.replicas.get(row["source"]) != resource.generation:
            return "LS006"
        if name in resource.claims and resource.claims[name].token >= row["token"]:
            return "a greater token"
        resource.claims[name] = Claim(row["token"], row["generation"], row["source"])
        return "started"

    claim = begin

    def finish(self, row, resource):
        name = row["replica"]
        if not resource or row["token"] < resource.incarnation or name not in resource.replicas:
            return "gone"
        claim = resource.claims.get(name)
        if claim is None or claim.token != row["token"]:
            # A begin that adds the replica anew and this call share the resource: either may be numbered first.
            return ("lost", "gone") if name in resource.added and self.need_not_know(row, resource.added[name]) else "lost"
        del resource.claims[name]
        if row["call"] == "fail":
            return "failed"
        if claim.source and (claim.source_lost or resource.replicas.get(claim.source) != resource.generation):
            return "source_lost"
        # Two syncs of one resource go on at once: this one need not have seen what has just made its source current.
        synced = resource.synced.get(claim.source)
        if row["answer"] == "source_lost" and synced is not None and self.need_not_know(row, synced):
            return "source_lost"
        resource.synced[name] = row["n"]
        held = resource.replicas[name]
        resource.replicas[name] = claim.generation if held is None else max(held, claim.generation)
        return "current" if resource.replicas[name] == resource.generation else "outdated"

    fail = finish

    def loss(self, row, _):
        """after_data_loss(): no token from before is anybody's."""
        for resource in self.resources.values():
            for claim in resource.claims.values():
                claim.token += row["token"]


class Run:
    def __init__(self, dsn, seconds, workers=8, resources=5000):
        self.dsn, self.seconds, self.workers, self.resources = dsn, seconds, workers, resources
        self.counts = Counter()
        self.problems = []
        self.stopping = threading.Event()
        self.pids = {}
        self.clock, self.answered_at = itertools.count(), {}
        self.passing = set(KILLED)  # errors after which a client connects again and goes on

    def connect(self):
        return psycopg.connect(self.dsn, autocommit=True)

    def set_up(self, admin):
        admin.execute(SCHEMA)
        for n in range(self.resources):
            self.call(admin, "create", resource=f"r{n}", replicas=list(REPLICAS))

    def run(self):
        with self.connect() as admin:
            self.set_up(admin)
            threads = [threading.Thread(target=self.guarded, args=(self.work, seed)) for seed in range(self.workers)]
            threads += [threading.Thread(target=self.guarded, args=(task,)) for task in (self.kill, self.poll, self.purge)]
            for thread in threads:
                thread.start()
            time.sleep(self.seconds)
            self.stopping.set()
            for thread in threads:
                thread.join()
            self.judge(admin)
        return self

    def guarded(self, task, *arguments):
        try:
            task(*arguments)
        except Exception as error:
            self.problems.append(f"{task.__name__}: {error!r}")
            self.stopping.set()

    def call(self, connection, name, **arguments):
        values = dict.fromkeys(("resource", "replica", "replicas", "source", "token", "generation", "ttl")) | arguments
        rows = connection.execute(CALLS[name], values | {"name": name, "begun": next(self.clock)}).fetchall()
        for row in rows:
            self.answered_at[row[4]] = next(self.clock)
        return rows

    def work(self, seed):
        chance = random.Random(seed)
        connection, syncs = None, []
        while not self.stopping.is_set():
            try:
                connection = connection or self.connect()
                self.pids[seed] = connection.info.backend_pid
                self.step(connection, chance, syncs)
                self.counts["calls"] += 1
            except psycopg.Error as error:
                state = getattr(error, "sqlstate", None)
                if state in EXPECTED_ERRORS:
                    self.counts[state] += 1
                elif state in self.passing or connection is None or connection.closed:
                    self.counts["killed"] += 1
                    connection = None
                else:
                    raise
        if connection:
            connection.close()

    def step(self, connection, chance, syncs):
        # Half of what happens meets on a few resources.
        resource = f"r{chance.randrange(20 if chance.random() < 0.5 else self.resources)}"
        replica = chance.choice(REPLICAS)
        ttl = f"{chance.choice((20, 200, 5000))} milliseconds"
        what = chance.random()
        if what < 0.42 and syncs:
            # The oldest, so that some claims have expired, and others' changes have come in between.
            resource, replica, token = syncs.pop(0)
            call = "fail" if chance.random() < 0.1 else "finish"
            if chance.random() < 0.1:
                with connection.transaction(force_rollback=True):
                    self.call(connection, call, resource=resource, replica=replica, token=token)
            self.call(connection, call, resource=resource, replica=replica, token=token)
        elif what < 0.62:
            source = chance.choice(REPLICAS) if chance.random() < 0.4 else None
            for row in self.call(connection, "begin", resource=resource, replica=replica, source=source, ttl=ttl):
                if row[3] == "started":
                    syncs.append(row[:3])
        elif what < 0.70:
            syncs += [row[:3] for row in self.call(connection, "claim", ttl=ttl)]
        elif what < 0.84:
            named = chance.choice((None, None, [replica], list(REPLICAS)))
            self.call(connection, "increment", resource=resource, replicas=named)
        elif what < 0.89:
            self.call(connection, "set", resource=resource, replica=replica, generation=chance.randint(0, 30))
        elif what < 0.92:
            self.call(connection, "authoritative", resource=resource, replica=replica)
        elif what < 0.94:
            # Not the last one: its generation never falls within one incarnation of the resource.
            self.call(connection, chance.choice(("drop", "invalidate")), resource=resource, replica=chance.choice(REPLICAS[:-1]))
        elif what < 0.97:
            self.call(connection, "delete", resource=resource)
        else:
            self.call(connection, "create", resource=resource, replicas=chance.sample(REPLICAS, 2))

    def kill(self):
        chance = random.Random(0)
        with self.connect() as connection:
            while not self.stopping.wait(0.1):
                if self.pids:
                    connection.execute("SELECT pg_terminate_backend(%s)", (chance.choice(list(self.pids.values())),))

    def purge(self):
        with self.connect() as connection:
            while not self.stopping.wait(0.3):
                (purged,) = connection.execute("SELECT lockstep.resource_purge('0.1 s')").fetchone()
                self.counts["purged"] += purged

    def poll(self):
        """The generations of the resources that all meet on, and of their replicas."""
        seen = {}
        with self.connect() as connection:
            while not self.stopping.is_set():
                self.look(connection, seen)
        self.counts["polled"] = len(seen)

    def look(self, connection, seen):
        rows = connection.execute(
            """
            SELECT r.resource, r.incarnation, r.generation, p.replica, p.generation
            FROM lockstep.resources AS r LEFT JOIN lockstep.replicas AS p USING (tenant, resource)
            WHERE r.resource = ANY (%s) AND r.deleted_at IS NULL
            """,
            ([f"r{n}" for n in range(20)],),
        ).fetchall()
        self.counts["polls"] += 1
        for resource, incarnation, generation, replica, held in rows:
            self.grows(seen, (resource,), (incarnation, generation))
            if replica == REPLICAS[-1] and held is not None:
                self.grows(seen, (resource, replica), (incarnation, held))
            if held is not None and held > generation:
                self.problems.append(f"replica {replica} of {resource} is at {held}, above {generation}")

    def grows(self, seen, key, value):
        if value < seen.get(key, value):
            self.problems.append(f"{key} was seen at {seen[key]} and then at {value}")
        seen[key] = value

    def judge(self, admin):
        """Replays the history and compares; adds what is wrong to the problems."""
        model = Model(self.answered_at)
        cursor = admin.execute("SELECT * FROM oracle.history ORDER BY n")
        columns = [column.name for column in cursor.description]
        for row in cursor:
            model.tell(dict(zip(columns, row, strict=True)))
        self.problems += model.wrong
        self.counts.update(model.answers)
        expected = {
            (name, r.incarnation, r.generation, *sorted(r.replicas.items())) for name, r in model.resources.items() if not r.deleted
        }
        actual = {}
        for name, incarnation, generation, replica, held in admin.execute(
            """
            SELECT r.resource, r.incarnation, r.generation, p.replica, p.generation
            FROM lockstep.resources AS r LEFT JOIN lockstep.replicas AS p USING (tenant, resource)
            WHERE r.deleted_at IS NULL ORDER BY p.replica
            """
        ):
            actual.setdefault((name, incarnation, generation), []).extend([(replica, held)] if replica else [])
        found = {(*key, *replicas) for key, replicas in actual.items()}
        self.problems += [f"lost: {row}" for row in expected - found] + [f"resurrected or wrong: {row}" for row in found - expected]
        # What wants a sync is due, and what is current is not.
        stuck = admin.execute(
            """
            SELECT count(*) FROM lockstep.replicas AS p JOIN lockstep.resources AS r USING (tenant, resource)
            WHERE r.deleted_at IS NULL AND (p.due_at IS NULL) <> (p.generation IS NOT DISTINCT FROM r.generation)
            """
        ).fetchone()[0]
        if stuck:
            self.problems.append(f"{stuck} replicas are due and current, or neither")

    def __str__(self):
        lines = [f"{what}: {count}" for what, count in sorted(self.counts.items())]
        return "\n".join([*lines, f"{len(self.problems)} problems", *self.problems[:20]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--seconds", type=float, default=20)
    given = parser.parse_args()
    finished = Run(given.dsn, given.seconds).run()
    print(finished)
    sys.exit(bool(finished.problems))
