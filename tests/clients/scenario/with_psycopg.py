"""The scenario with psycopg 3. Other languages' programs beside it do the same: see ../test_scenario.py."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
from psycopg.types.json import Jsonb

RETRY = ("40001", "40P01", "55P03")  # the whole transaction, as it is


def connect():
    # PGHOST, PGDATABASE and the like say where. No prepared statements: PgBouncer may give each transaction another session.
    return psycopg.connect(autocommit=True, prepare_threshold=None)


class Client:
    def __init__(self, number):
        self.number = number
        self.connection = connect()

    def row(self, query, *parameters):
        return self.connection.execute(query, parameters).fetchone()

    def record(self, what, outcome):
        self.connection.execute("INSERT INTO outcomes VALUES (%s, %s, %s)", [self.number, what, outcome])

    def refused(self, what, query, *parameters):
        """Does what must fail, in a transaction of its own, and records the SQLSTATE."""
        try:
            with self.connection.transaction():
                self.connection.execute(query, parameters)
        except psycopg.Error as error:
            self.record(what, error.sqlstate)
        else:
            self.record(what, "accepted")

    def push(self, account, expected_sequence, event):
        """A deposit, once, however often it is pushed: it has an id of its own."""
        deposit = {
            "aggregate_type": "account",
            "aggregate_id": account,
            "event_type": "deposited",
            "event_id": f"00000000-0000-4000-8000-{self.number:06}{event:06}",
            "expected_sequence": expected_sequence,
            "payload": {"amount": 10 * self.number + event},
        }
        return self.row("SELECT position, sequence FROM lockstep.push_events(%s)", Jsonb([deposit]))

    def sequence(self, account):
        query = "SELECT coalesce(max(sequence), 0) FROM lockstep.aggregate_events('account', %s)"
        return self.row(query, account)[0]

    def pushes(self):
        own = f"own {self.number}"
        self.push(own, 0, 1)
        # The answer to a push is lost with the connection: connect and push the same again.
        try:
            self.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        except psycopg.OperationalError:
            self.connection = connect()
        try:
            self.push(own, 0, 1)
        except psycopg.Error as error:
            if error.diag.constraint_name != "events_tenant_event_id_key":
                raise
            self.record("the same push again", error.sqlstate)
        # Somebody was faster: read, decide, push again.
        try:
            self.push(own, 0, 2)
        except psycopg.Error as error:
            if error.sqlstate != "LS001":
                raise
            self.record("push", error.sqlstate)
            self.push(own, self.sequence(own), 2)
        pushed = False
        while not pushed:
            try:
                self.push("shared", self.sequence("shared"), 3)
                pushed = True
            except psycopg.Error as error:
                if error.sqlstate != "LS001":
                    raise

    def claim_and_apply(self):
        """Within a transaction: the events of a batch, applied, and whether there are more."""
        events = self.connection.execute(
            "SELECT position, aggregate_id, payload FROM lockstep.projection_claim('balances', max_events => 3, wait => true)"
        ).fetchall()
        for position, account, payload in events:
            self.connection.execute("INSERT INTO applied VALUES (%s)", [position])
            self.connection.execute(
                "INSERT INTO balances AS b VALUES (%s, %s) ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total",
                [account, payload["amount"]],
            )
        (more,) = self.row("SELECT more FROM lockstep.projection_claim_state('balances')")
        return events, more

    def projection(self):
        self.refused("advance without a claim", "SELECT lockstep.projection_advance('balances')")
        with self.connection.transaction(force_rollback=True):
            self.claim_and_apply()  # the worker dies: all of this comes again
        more = True
        while more:
            with self.connection.transaction():
                events, more = self.claim_and_apply()
                if events:
                    last = events[-1][0]  # a Decimal
                    assert self.row("SELECT lockstep.projection_advance('balances', up_to => %s)", last) == (last,)

    def lease(self):
        holder = f"client {self.number}"
        acquired = False
        while not acquired:
            query = "SELECT acquired, token FROM lockstep.lease_acquire('leader', %s, ttl => %s * interval '1 second')"
            acquired, token = self.row(query, holder, 600)
            if not acquired:
                time.sleep(0.01)
        with self.connection.transaction():
            self.row("SELECT lockstep.lease_guard('leader', %s)", token)
            self.connection.execute("INSERT INTO led VALUES (%s, %s)", [self.number, token])
        assert self.row("SELECT lockstep.lease_release('leader', %s)", token) == (True,)
        # From here on it is a former holder.
        self.refused("guard", "SELECT lockstep.lease_guard('leader', %s)", token)
        try:
            with self.connection.transaction():
                self.connection.execute("INSERT INTO led VALUES (%s, NULL)", [self.number])
                self.row("SELECT lockstep.lease_guard_at_commit('leader', %s)", token)
        except psycopg.Error as error:
            self.record("guard at commit", error.sqlstate)

    def sync(self):
        resource = f"repository {self.number}"
        begin = "SELECT status, token FROM lockstep.replica_sync_begin(%s, 'copy', %s, ttl => %s * interval '1 microsecond')"
        finish = "SELECT lockstep.replica_sync_finish(%s, 'copy', %s)"
        self.row("SELECT lockstep.resource_create(%s, ARRAY['primary'])", resource)
        status, lost = self.row(begin, resource, "first", 1)
        assert status == "started"
        status, token = self.row(begin, resource, "second", 60_000_000)
        assert status == "started"
        self.record("sync of the first worker", self.row(finish, resource, lost)[0])
        self.record("sync of the second worker", self.row(finish, resource, token)[0])
        self.refused("copy to a current one", "SELECT lockstep.generation_replicated(%s, 'primary', 'copy')", resource)
        self.row("SELECT lockstep.generation_increment(%s)", resource)  # the truth lives elsewhere: both are outdated
        self.refused("write", "SELECT lockstep.generation_increment(%s, ARRAY['primary'])", resource)
        self.refused("sync from it", "SELECT lockstep.replica_sync_begin(%s, 'copy', 'third', source => 'primary')", resource)

    def jobs(self):
        queue = f"own {self.number}"
        claim = "SELECT job_id, token FROM lockstep.job_claim(%s, %s, ttl => %s * interval '1 microsecond')"
        self.row("SELECT lockstep.job_enqueue(%s, 'key', 'greet')", queue)
        _, stale = self.row(claim, queue, "first", 1)
        job, token = self.row(claim, queue, "second", 60_000_000)
        self.refused("job guard", "SELECT lockstep.job_guard(%s, %s)", job, stale)
        self.record("job of the first worker", self.row("SELECT lockstep.job_complete(%s, %s)", job, stale)[0])
        self.record("job of the second worker", self.row("SELECT lockstep.job_complete(%s, %s)", job, token)[0])
        for n in range(3):
            payload = Jsonb({"name": f"{self.number}.{n}"})
            self.row("SELECT lockstep.job_enqueue('shared', %s, 'greet', %s)", f"{self.number}.{n}", payload)
        query = "SELECT job_id, token, payload FROM lockstep.job_claim('shared', %s)"
        while job := self.row(query, f"client {self.number}"):
            job_id, token, payload = job
            with self.connection.transaction():
                self.connection.execute("INSERT INTO greeted VALUES (%s)", [payload["name"]])
                assert self.row("SELECT lockstep.job_complete(%s, %s)", job_id, token) == ("completed",)


def work(number):
    client = Client(number)
    for part in (client.pushes, client.projection, client.lease, client.sync, client.jobs):
        part()
    client.connection.close()


def push(connection, aggregate):
    connection.execute("SELECT lockstep.push_event('race', %s, 'ran')", [aggregate])


def races():
    """Two sessions in each other's way: what to try again."""
    one, other = Client(0), Client(0)

    def serializable(disturbed):
        with one.connection.transaction():
            one.connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            one.row("SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable')")
            if disturbed:
                push(other.connection, "serializable")
            push(one.connection, "serializable")

    try:
        serializable(disturbed=True)
    except psycopg.Error as error:
        if error.sqlstate not in RETRY:
            raise
        other.record("serializable", error.sqlstate)
        serializable(disturbed=False)

    claim = "SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)"
    with one.connection.transaction():
        one.row(claim)
        try:
            with other.connection.transaction():
                other.connection.execute("SET LOCAL lock_timeout = '10ms'")
                other.row(claim)
        except psycopg.Error as error:
            if error.sqlstate not in RETRY:
                raise
            busy = error.sqlstate
    other.record("wait for a claim", busy)
    other.row(claim)

    for client, aggregate in ((one, "a"), (other, "b")):
        client.connection.execute("BEGIN")
        push(client.connection, aggregate)

    def second(client, aggregate):
        try:
            push(client.connection, aggregate)
            client.connection.execute("COMMIT")
        except psycopg.Error as error:
            client.connection.execute("ROLLBACK")
            if error.sqlstate not in RETRY:
                raise
            client.record("opposite orders", error.sqlstate)
            with client.connection.transaction():  # all of it again
                push(client.connection, "a")
                push(client.connection, "b")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(second, (one, other), ("b", "a")))


def floats(batch):
    """What becomes of the position of a batch's last event that was made a float."""
    client = Client(0)
    with client.connection.transaction(force_rollback=True):
        claim = "SELECT position FROM lockstep.projection_claim('balances', max_events => %s)"
        (last,) = client.connection.execute(claim, [batch]).fetchall()[-1]
        for what, query in (
            ("advance", "SELECT lockstep.projection_advance('balances', up_to => %s)::text"),
            ("read", "SELECT count(*)::text FROM lockstep.read_events(after => %s)"),
        ):
            try:
                with client.connection.transaction():
                    (outcome,) = client.row(query, float(last))
            except psycopg.Error as error:
                outcome = error.sqlstate
            print(what, outcome)


if __name__ == "__main__":
    if sys.argv[1] == "floats":
        floats(int(sys.argv[2]))
    else:
        clients = int(sys.argv[1])
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(work, range(1, clients + 1)))
        races()
