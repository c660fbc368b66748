"""A load on all five topics at once, and an oracle of what its clients were told: for faults, which must take nothing back.

    with Load(cluster) as load:
        load.progress()         # everything moves
        cluster.crash()
        cluster.start()
        load.progress()         # and moves again
    load.check()

The clients connect again whenever they lose the server. Each notes an effect once it has been acknowledged, on its own side,
where no fault of the server reaches it. At the end everything that was acknowledged must be there, once, and no position, token or
job id may ever have been given twice or below one that somebody had before. Events, projections and syncs are judged by the
oracles beside this file; one projection is run by the workers in the server, and one reader keeps its cursor outside of it.

Where commits are lost, a test says from when on an acknowledgement may be void (`doubt`), and goes on elsewhere (`move`).
"""

import contextlib
import random
import threading
import time
import uuid
from collections import Counter

import oracle
import psycopg
import registry
from oracle import KILLED, TENANTS, Reader
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb
from sessions import call, raises

PATIENCE = 200.0  # how long the server may be away, and how long everything together may stand still
OWNER = "load_owner"
TTL = 0.4
GAP = 2**32  # what after_data_loss() adds

SCHEMA = f"""
    CREATE TABLE oracle.counters (name text PRIMARY KEY, n int NOT NULL);
    CREATE TABLE oracle.written (name text NOT NULL, n int NOT NULL, token bigint NOT NULL);
    CREATE TABLE oracle.done (tag text NOT NULL, job_id bigint NOT NULL, token bigint NOT NULL);
    GRANT USAGE ON SCHEMA lockstep, oracle TO {OWNER};
    GRANT INSERT ON oracle.seen TO {OWNER};
    GRANT EXECUTE ON FUNCTION lockstep.projection_create TO {OWNER};
    CREATE SCHEMA {OWNER} AUTHORIZATION {OWNER};
    SET ROLE {OWNER};
    CREATE FUNCTION {OWNER}.handle(e lockstep.events) RETURNS void LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO oracle.seen (reader, tenant, position) VALUES ('handled', e.tenant, e.position); END $$;
    SELECT lockstep.projection_create('handled', handler => '{OWNER}.handle(lockstep.events)',
                                      max_failures => 1000000, retry_after => '100 ms');
    RESET ROLE;
"""


class Where:
    """Where the clients find the server at present, and whether what it acknowledges holds."""

    def __init__(self, cluster, dbname):
        self.cluster, self.dbname = cluster, dbname
        self.turn, self.doubtful = 0, False
        self.client = threading.local()
        self.passing = set(KILLED)

    def connect(self, role):
        end = time.monotonic() + PATIENCE
        while True:
            turn = self.turn
            try:
                connection = self.cluster.connect(self.dbname, application_name=f"load {role}")
                self.client.turn = turn
                return connection
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def certain(self):
        """Whether what this thread's connection has just acknowledged is to hold for good."""
        return not self.doubtful and self.client.turn == self.turn

    def until(self, is_over, role, dice, step):
        """Repeats the step, each time with a connection, a new one after the server was lost."""
        connection = None
        while not is_over():
            try:
                connection = connection or self.connect(role)
                step(connection, dice)
            except psycopg.Error as error:
                if connection is None or not (connection.closed or error.sqlstate in self.passing):
                    raise
                connection.close()
                connection = None
        if connection is not None:
            connection.close()


class Numbers:
    """The numbers that clients were given, of each kind: each once, and none below what somebody had before the call."""

    def __init__(self):
        self.lock = threading.Lock()
        self.given, self.highest, self.problems = {}, Counter(), []

    def floor(self, kind):
        return self.highest[kind]

    def give(self, kind, number, what, floor):
        with self.lock:
            if (kind, number) in self.given:
                self.problems.append(f"{kind} {number} was given to {self.given[kind, number]} and to {what}")
            elif number <= floor:
                self.problems.append(f"{kind} {number} was given to {what} after {floor}")
            self.given[kind, number] = what
            self.highest[kind] = max(number, self.highest[kind])


class Events(oracle.Run):
    """Writers, projections whose claims are committed by clients, one that workers run, and a cursor outside of the server."""

    CLAIMED = (
        Reader("barrier"),
        Reader("horizon-wait", barrier=False, wait=True, batch=3),
        Reader("barrier-filtered", batch=50, event_types=("closed",)),
    )
    HANDLED = Reader("handled")

    def __init__(self, where, numbers):
        super().__init__(None, None, prepares=False)
        self.where, self.numbers = where, numbers
        self.passing = where.passing
        self.readers = self.CLAIMED
        self.positions = {}  # of the events that are to be there for good
        self.followed = {tenant: [] for tenant in TENANTS}

    def connect(self, role):
        return self.where.connect(role)

    def send(self, connection, events, tenant):
        floor = self.numbers.floor("ticket")
        rows = connection.execute("SELECT position FROM lockstep.push_events(%s, %s)", (Jsonb(events), tenant)).fetchall()
        pushed = self.where.client.__dict__.setdefault("pushed", {})
        pushed.update({event["event_id"]: (position, floor) for event, (position,) in zip(events, rows, strict=True)})

    def ended(self, into, tags, what):
        pushed = self.where.client.__dict__.pop("pushed", {})
        if into is self.committed:
            for tag in tags:
                position, floor = pushed[tag]
                if position == int(position):  # the first of a push, of which the number is
                    self.numbers.give("ticket", int(position), f"event {tag}", floor)
            if not self.where.certain():
                self.count("transactions in doubt")
                return
            self.positions.update({tag: pushed[tag][0] for tag in tags})
        super().ended(into, tags, what)

    def follow(self, number):
        """What copies the log to another system: its cursor is the last position that it has."""
        finished = False

        def step(connection, _):
            nonlocal finished
            draining, found = self.draining.is_set(), False
            for tenant, seen in self.followed.items():
                rows = connection.execute(
                    "SELECT position, event_id::text FROM lockstep.read_events(%s, 50, tenant => %s)",
                    (seen[-1][0] if seen else 0, tenant),
                ).fetchall()
                seen += rows
                found |= bool(rows)
                self.count("events followed", len(rows))
            finished = draining and not found

        self.where.until(lambda: finished, "follower", None, step)

    def judge(self, lossy=False):
        self.readers = (*self.CLAIMED, self.HANDLED)
        report = super().judge()
        with self.connect("judge") as connection:
            log = {tenant: [] for tenant in TENANTS}
            for tenant, position, tag in connection.execute(
                "SELECT tenant, position, event_id::text FROM lockstep.events ORDER BY position"
            ):
                log[tenant].append((position, tag))
            failed = connection.execute("SELECT count(*) FROM lockstep.failed_events WHERE skipped_at IS NOT NULL").fetchone()[0]
        there = {tag: position for rows in log.values() for position, tag in rows}
        moved = [tag for tag, position in self.positions.items() if there.get(tag, position) != position]
        if moved:
            self.problem(f"{len(moved)} events are not at the position that their writer was told")
        if failed:
            self.problem(f"{failed} events were skipped by their handler")
        for tenant, rows in log.items():
            followed = self.followed[tenant]
            passed, unknown = set(rows) - set(followed), set(followed) - set(rows)
            if passed:
                self.problem(f"a cursor outside passed {len(passed)} events of {tenant!r}: {sorted(passed)[:3]}")
            if unknown and not lossy:
                self.problem(f"a cursor outside saw {len(unknown)} events of {tenant!r} that are not there")
            positions = [position for position, _ in followed]
            if any(after <= before for before, after in zip(positions, positions[1:], strict=False)):
                self.problem(f"a cursor outside went back in {tenant!r}")
        return report


class Leases:
    """Holders that count under a guard, pause beyond their time, and wake up."""

    NAMES = ("one", "two", "three")

    def __init__(self, where, numbers):
        self.where, self.numbers = where, numbers
        self.counts, self.problems = Counter(), []
        self.highest, self.written = Counter(), set()
        self.life = 0

    def set_up(self, connection):
        connection.execute("INSERT INTO oracle.counters SELECT unnest(%s::text[]), 0", (list(self.NAMES),))

    def hold(self, connection, dice):
        name = dice.choice(self.NAMES)
        self.life += 1
        floor = self.numbers.floor("token")
        acquired, token = connection.execute(
            "SELECT acquired, token FROM lockstep.lease_acquire(%s, %s, %s)",
            (name, f"{threading.get_ident()}-{self.life}-{dice.random()}", f"{TTL} s"),
        ).fetchone()
        if not acquired:
            time.sleep(0.01)
            return
        self.numbers.give("token", token, f"lease {name}", floor)
        if self.where.certain():
            self.highest[name] = max(token, self.highest[name])
        for _ in range(dice.randint(1, 4)):
            if dice.random() < 0.05:
                time.sleep(dice.uniform(0, 2 * TTL))
            if not self.write(connection, dice, name, token):
                return
            if dice.random() < 0.3:
                connection.execute("SELECT FROM lockstep.lease_renew(%s, %s)", (name, token))
        if dice.random() < 0.7:
            connection.execute("SELECT lockstep.lease_release(%s, %s)", (name, token))

    def write(self, connection, dice, name, token):
        guard = dice.choice(("lease_guard", "lease_guard_at_commit"))
        try:
            connection.execute("BEGIN")
            connection.execute(f"SELECT lockstep.{guard}(%s, %s)", (name, token))
            # A plain read, and a value computed from it: the guard alone protects the two.
            (n,) = connection.execute("SELECT n FROM oracle.counters WHERE name = %s", (name,)).fetchone()
            connection.execute("UPDATE oracle.counters SET n = %s WHERE name = %s", (n + 1, name))
            connection.execute("INSERT INTO oracle.written VALUES (%s, %s, %s)", (name, n + 1, token))
            connection.execute("COMMIT")
        except psycopg.Error as error:
            if error.sqlstate != "LS003":
                raise
            connection.execute("ROLLBACK")
            self.counts["refused"] += 1
            return False
        self.counts["written"] += 1
        if self.where.certain():
            self.written.add((name, n + 1, token))
        return True

    def judge(self, connection):
        rows = connection.execute("SELECT name, n, token FROM oracle.written ORDER BY name, n, token").fetchall()
        lost = self.written - set(rows)
        if lost:
            self.problems.append(f"{len(lost)} guarded writes are lost: {sorted(lost)[:3]}")
        for name, n in connection.execute("SELECT name, n FROM oracle.counters").fetchall():
            tokens = [token for at, _, token in rows if at == name]
            if [count for at, count, _ in rows if at == name] != list(range(1, n + 1)):
                self.problems.append(f"an update under lease {name} is lost")
            if tokens != sorted(tokens):
                self.problems.append(f"a former holder of lease {name} wrote after a later one")
        for name, token in connection.execute("SELECT name, token FROM lockstep.leases").fetchall():
            if token < self.highest[name]:
                self.problems.append(f"lease {name} is at token {token}, and {self.highest[name]} was given")


class Jobs:
    """Jobs that are done in the transaction that completes them, by workers that fail, pause beyond their time and wake up."""

    def __init__(self, where, numbers):
        self.where, self.numbers = where, numbers
        self.counts, self.problems = Counter(), []
        self.tried, self.enqueued, self.done = set(), set(), set()

    def enqueue(self, connection, dice):
        tag = str(uuid.UUID(int=dice.getrandbits(128), version=4))
        self.tried.add(tag)
        floor = self.numbers.floor("job id")
        (job_id,) = connection.execute(
            "SELECT job_id FROM lockstep.job_enqueue('q', %s, %s, max_attempts => NULL)", (str(dice.randrange(8)), tag)
        ).fetchone()
        self.numbers.give("job id", job_id, f"job {tag}", floor)
        self.counts["enqueued"] += 1
        if self.where.certain():
            self.enqueued.add(tag)
        time.sleep(0.01)

    def work(self, connection, dice):
        floor = self.numbers.floor("token")
        jobs = connection.execute(
            "SELECT job_id, token, kind FROM lockstep.job_claim('q', 'worker', 3, %s)", (f"{TTL} s",)
        ).fetchall()
        for job_id, token, tag in jobs:
            self.numbers.give("token", token, f"job {tag}", floor)
        for job_id, token, tag in jobs:
            what = dice.random()
            if what < 0.05:
                time.sleep(dice.uniform(0, 2 * TTL))
            if what > 0.9:
                connection.execute("SELECT lockstep.job_fail(%s, %s, 'no', '0')", (job_id, token))
            else:
                self.do(connection, job_id, token, tag)
        if not jobs:
            time.sleep(0.02)

    def do(self, connection, job_id, token, tag):
        try:
            connection.execute("BEGIN")
            connection.execute("SELECT lockstep.job_guard(%s, %s)", (job_id, token))
            connection.execute("INSERT INTO oracle.done VALUES (%s, %s, %s)", (tag, job_id, token))
            (answer,) = connection.execute("SELECT lockstep.job_complete(%s, %s)", (job_id, token)).fetchone()
            if answer != "completed":
                self.problems.append(f"a guarded job was {answer}")
            connection.execute("COMMIT")
        except psycopg.Error as error:
            if error.sqlstate != "LS007":
                raise
            connection.execute("ROLLBACK")
            self.counts["refused"] += 1
            return
        self.counts["done"] += 1
        if self.where.certain():
            self.done.add((tag, job_id, token))

    def left(self, connection):
        return connection.execute("SELECT count(*) FROM lockstep.jobs").fetchone()[0]

    def judge(self, connection):
        rows = connection.execute("SELECT tag, job_id, token FROM oracle.done").fetchall()
        tags = Counter(tag for tag, _, _ in rows)
        dead = connection.execute("SELECT count(*) FROM lockstep.dead_jobs").fetchone()[0]
        for what, wrong in (
            ("were enqueued and are not done", self.enqueued - set(tags)),
            ("were done and are not", self.done - set(rows)),
            ("were done twice", [tag for tag, count in tags.items() if count > 1]),
            ("were never enqueued", set(tags) - self.tried),
            ("are left or dead", range(self.left(connection) + dead)),
        ):
            if wrong:
                self.problems.append(f"{len(wrong)} jobs {what}")


class Registry(registry.Run):
    """The registry's own oracle, and that each call that was answered is in its history."""

    def __init__(self, where, numbers):
        super().__init__(None, None, workers=2, resources=30)
        self.where, self.numbers = where, numbers
        self.passing = where.passing
        self.answered, self.seen = {}, {}

    def connect(self):
        return self.where.connect("registry")

    def call(self, connection, name, **arguments):
        floor = self.numbers.floor("token")
        rows = super().call(connection, name, **arguments)
        if connection.info.transaction_status == TransactionStatus.IDLE:
            for resource, _, token, answer, n, incarnation in rows:
                if answer == "started":
                    self.numbers.give("token", token, f"sync of {resource}", floor)
                if name == "create":
                    self.numbers.give("token", incarnation, f"resource {resource}", floor)
                if self.where.certain():
                    self.answered[n] = (name, resource, answer)
        return rows

    def poll(self):
        self.where.until(self.stopping.is_set, "poll", None, lambda connection, _: self.look(connection, self.seen))

    def judge(self, admin):
        super().judge(admin)
        history = {n: row for n, *row in admin.execute("SELECT n, call, resource, answer FROM oracle.history")}
        lost = [n for n, row in self.answered.items() if tuple(history.get(n, ())) != row]
        if lost:
            self.problems.append(f"{len(lost)} calls of the registry are lost: {[self.answered[n] for n in lost[:3]]}")


class Claims:
    """A lease, a sync of a resource and a job, all of this name, claimed for an hour. `again`: they are claimed, until now."""

    def __init__(self, session, name, again=False):
        self.name = name
        if again:
            session.execute("UPDATE lockstep.leases SET expires_at = now() - interval '1 second' WHERE name = %s", (name,))
            session.execute("UPDATE lockstep.replicas SET sync_expires_at = now() - interval '1 second' WHERE resource = %s", (name,))
            session.execute("UPDATE lockstep.jobs SET claimed_until = now() - interval '1 second' WHERE queue = %s", (name,))
        else:
            call(session, "resource_create", resource=name, replicas=["a"])
            call(session, "generation_increment", resource=name)
            call(session, "job_enqueue", queue=name, key="k", kind="work")
        ((acquired, self.lease, *_),) = call(session, "lease_acquire", name=name, holder=str(uuid.uuid4()), ttl="1 hour")
        begun = call(session, "replica_sync_begin", resource=name, target="a", holder="w", ttl="1 hour")
        ((status, self.sync, _, self.generation),) = begun
        assert acquired and status == "started"
        claimed = "SELECT job_id, token FROM lockstep.job_claim(%s, 'w', 1, '1 hour')"
        ((self.job_id, self.job),) = session.execute(claimed, (name,)).fetchall()

    def tokens(self):
        return [self.lease, self.sync, self.job]

    def are_held(self, session):
        """Each counts, and is given back."""
        call(session, "lease_guard", name=self.name, token=self.lease)
        call(session, "job_guard", job_id=self.job_id, token=self.job)
        assert call(session, "lease_release", name=self.name, token=self.lease) == [(True,)]
        assert call(session, "replica_sync_finish", resource=self.name, target="a", token=self.sync) == [("current",)]
        assert call(session, "job_complete", job_id=self.job_id, token=self.job) == [("completed",)]
        assert call(session, "resource_delete", resource=self.name) == [(True,)]

    def are_refused(self, session):
        for guard, state in (("lease_guard(%s, %s)", "LS003"), ("job_guard(%s, %s)", "LS007")):
            values = (self.name, self.lease) if state == "LS003" else (self.job_id, self.job)
            with raises(state):
                session.execute(f"SELECT lockstep.{guard}", values)
        assert call(session, "lease_renew", name=self.name, token=self.lease)[0][0] in ("lost", "unknown")
        assert call(session, "lease_release", name=self.name, token=self.lease) == [(False,)]
        sync = {"resource": self.name, "target": "a", "token": self.sync}
        assert call(session, "replica_sync_renew", **sync) == [(False,)]
        assert call(session, "replica_sync_finish", **sync)[0][0] in ("lost", "gone")
        assert call(session, "job_renew", job_ids=[self.job_id], tokens=[self.job]) == []
        assert call(session, "job_fail", job_id=self.job_id, token=self.job, error="no") == [("lost",)]
        assert call(session, "job_complete", job_id=self.job_id, token=self.job) == [("lost",)]


class Load:
    def __init__(self, cluster, dbname="load", seed=None):
        self.seed = random.randrange(2**32) if seed is None else seed
        self.where = Where(cluster, dbname)
        self.numbers = Numbers()
        self.events = Events(self.where, self.numbers)
        self.leases = Leases(self.where, self.numbers)
        self.jobs = Jobs(self.where, self.numbers)
        self.registry = Registry(self.where, self.numbers)
        self.problems, self.lossy, self.starts = [], False, 0
        self.stopping, self.draining = threading.Event(), threading.Event()
        self.clients, self.drains = [], []

    @staticmethod
    def make_owner(cluster):
        """The role that owns the handler; roles are in no dump."""
        with cluster.connect() as connection:
            connection.execute(f"CREATE ROLE {OWNER} LOGIN")

    def set_up(self):
        """Makes the database and what the clients need, and lets workers run in it."""
        cluster, dbname = self.where.cluster, self.where.dbname
        self.make_owner(cluster)
        with cluster.connect() as connection:
            connection.execute(f"CREATE DATABASE {dbname}")
        with cluster.connect(dbname) as connection:
            connection.execute("CREATE EXTENSION lockstep")
            self.where.client.turn = self.where.turn
            self.events.set_up(connection)
            self.registry.set_up(connection)
            connection.execute(SCHEMA)
            self.leases.set_up(connection)
        cluster.conf(**{"lockstep.databases": dbname})

    def __enter__(self):
        self.set_up()
        self._start()
        return self

    @contextlib.contextmanager
    def started(self):
        """What `with` does, where the database is there already."""
        self._start()
        try:
            yield self
        except BaseException:
            self._end()
            raise
        self._stop()

    def _start(self):
        self.starts += 1
        self.events.seed = f"{self.seed} {self.starts}"  # else a second start would push the same event ids
        self.stopping.clear()
        self.draining.clear()
        self.registry.stopping.clear()
        self.events.draining.clear()
        self.events.writing.set()
        is_over, is_drained = self.stopping.is_set, self._is_drained
        clients = [("writer", self.events.write_all, (number,)) for number in range(3)]
        clients += [("registry", self.registry.work, (number,)) for number in range(2)]
        clients += [("poll", self.registry.poll, ())]
        for number in range(3):
            clients.append(("holder", self._repeat, (is_over, f"holder {number}", self.leases.hold)))
        clients.append(("enqueuer", self._repeat, (is_over, "enqueuer", self.jobs.enqueue)))
        drains = [("reader", self.events.read_all, (reader, 0)) for reader in self.events.CLAIMED]
        drains += [("follower", self.events.follow, (0,))]
        for number in range(2):
            drains.append(("job worker", self._repeat, (is_drained, f"job worker {number}", self.jobs.work)))
        self.clients, self.drains = map(self._threads, (clients, drains))

    def _threads(self, calls):
        threads = [threading.Thread(target=self._guarded, args=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        return threads

    def _guarded(self, role, target, arguments):
        try:
            target(*arguments)
        except Exception as error:
            self.problems.append(f"{role}: {type(error).__name__} {getattr(error, 'sqlstate', '')} {error}")

    def _repeat(self, is_over, role, step):
        self.where.until(is_over, role, random.Random(f"{self.events.seed} {role}"), step)

    def _is_drained(self):
        if not self.draining.is_set():
            return False
        with self.where.connect("watcher") as connection:
            return self.jobs.left(connection) == 0

    def __exit__(self, kind, *_):
        if kind is None:
            self._stop()
        else:
            self._end()

    def _end(self):
        self.stopping.set()
        self.registry.stopping.set()
        self.events.writing.clear()
        for thread in self.clients:
            thread.join(PATIENCE)
        self.events.draining.set()
        self.draining.set()
        for thread in self.drains:
            thread.join(PATIENCE)
        for thread in self.clients + self.drains:
            if thread.is_alive():
                self.problems.append(f"a client does not end: {thread}")

    def _stop(self):
        """Ends the clients, and waits until everything that was begun is read, run and done."""
        self._end()
        behind = """SELECT count(*) FROM lockstep.tenants AS t
                    LEFT JOIN lockstep.projection_cursors AS c ON c.tenant = t.tenant AND c.projection = 'handled'
                    WHERE COALESCE(c.position, 0) < t.head"""
        if not self.problems:
            with self.where.connect("watcher") as connection:
                self._wait(lambda: connection.execute(behind).fetchone()[0], "the workers are behind in tenants")

    def _moved(self):
        with self.where.connect("watcher") as connection:
            (handled,) = connection.execute("SELECT COALESCE(max(nth), 0) FROM oracle.seen WHERE reader = 'handled'").fetchone()
        events = self.events.counts
        return Counter(
            {
                "transactions of writers": events["transactions committed"] + events["transactions in doubt"],
                "batches of projections": events["batches read"],
                "events followed": events["events followed"],
                "events handled by workers": handled,
                "guarded writes": self.leases.counts["written"],
                "jobs done": self.jobs.counts["done"],
                "calls of the registry": self.registry.counts["calls"],
            }
        )

    def progress(self, steps=20):
        """Waits until everything has moved by so many steps. What is read after a loss may be above that at once."""
        before = self._moved()

        def moved():
            now = self._moved()
            standing = [what for what, count in now.items() if count < before[what] + steps]
            assert not self.problems, self  # a client has ended; what is wrong with the rest is for the end
            return standing

        self._wait(moved, "does not go on")

    def _wait(self, unfinished, what):
        end = time.monotonic() + PATIENCE
        while left := unfinished():
            assert time.monotonic() < end, f"{left}: {what}"
            time.sleep(0.02)

    def doubt(self):
        """From now on the server may forget what it acknowledges, until `move`."""
        self.where.doubtful = True

    def move(self, cluster):
        """The clients go on with another server. If there was doubt, commits are lost."""
        if self.where.doubtful:
            self.lossy = True
            self.registry.seen = {}
        self.where.cluster = cluster
        self.where.turn += 1
        self.where.doubtful = False

    def after_data_loss(self, cluster):
        """Calls it, and tells the registry's model."""
        with cluster.connect(self.where.dbname) as connection, connection.transaction():
            connection.execute("SELECT lockstep.after_data_loss()")
            connection.execute("INSERT INTO oracle.history (call, resource, token) VALUES ('loss', '', %s)", (GAP,))

    def _problems(self):
        topics = (self.events, self.leases, self.jobs, self.registry, self.numbers)
        return self.problems + [problem for topic in topics for problem in topic.problems]

    def judge(self):
        """Everything that is wrong, in words."""
        report = self.events.judge(self.lossy)
        with self.where.connect("judge") as connection:
            for topic in (self.leases, self.jobs, self.registry):
                topic.judge(connection)
        return self._problems() + [str(report)] * any(not verdict.good for verdict in report.verdicts)

    def check(self):
        problems = self.judge()
        print(self)
        assert not problems, "\n".join([*problems[:20], str(self)])
        for what, count in (("guarded writes", self.leases.counts["written"]), ("jobs", self.jobs.counts["done"])):
            assert count, f"no {what}: this run has shown little"

    def __str__(self):
        counts = {
            "events": self.events.counts, "leases": self.leases.counts, "jobs": self.jobs.counts,
            "numbers": {"given": len(self.numbers.given)}, "registry": {"calls": self.registry.counts["calls"]},
        }  # fmt: skip
        lines = [f"{topic}: " + ", ".join(f"{n} {what}" for what, n in sorted(c.items())) for topic, c in counts.items()]
        return "\n".join([f"seed {self.seed}", *lines, *self._problems()[:20]])
