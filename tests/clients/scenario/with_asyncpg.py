"""The scenario with asyncpg. Other languages' programs beside it do the same: see ../test_scenario.py."""

import asyncio
import json
import sys
from datetime import timedelta

import asyncpg

RETRY = ("40001", "40P01", "55P03")  # the whole transaction, as it is
LOST = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError, asyncpg.ProtocolViolationError, OSError)


async def connect():
    # PGHOST, PGDATABASE and the like say where. No prepared statements: PgBouncer may give each transaction another session.
    return await asyncpg.connect(statement_cache_size=0)


class Client:
    def __init__(self, number, connection):
        self.number = number
        self.connection = connection

    async def value(self, query, *parameters):
        return await self.connection.fetchval(query, *parameters)

    async def record(self, what, outcome):
        await self.connection.execute("INSERT INTO outcomes VALUES ($1, $2, $3)", self.number, what, outcome)

    async def refused(self, what, query, *parameters):
        """Does what must fail, in a transaction of its own, and records the SQLSTATE."""
        try:
            async with self.connection.transaction():
                await self.connection.execute(query, *parameters)
        except asyncpg.PostgresError as error:
            await self.record(what, error.sqlstate)
        else:
            await self.record(what, "accepted")

    async def push(self, account, expected_sequence, event):
        """A deposit, once, however often it is pushed: it has an id of its own."""
        deposit = {
            "aggregate_type": "account",
            "aggregate_id": account,
            "event_type": "deposited",
            "event_id": f"00000000-0000-4000-8000-{self.number:06}{event:06}",
            "expected_sequence": expected_sequence,
            "payload": {"amount": 10 * self.number + event},
        }
        await self.connection.fetch("SELECT position, sequence FROM lockstep.push_events($1)", json.dumps([deposit]))

    async def sequence(self, account):
        query = "SELECT coalesce(max(sequence), 0) FROM lockstep.aggregate_events('account', $1)"
        return await self.value(query, account)

    async def pushes(self):
        own = f"own {self.number}"
        await self.push(own, 0, 1)
        # The answer to a push is lost with the connection: connect and push the same again.
        try:
            await self.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        except LOST:
            self.connection = await connect()
        try:
            await self.push(own, 0, 1)
        except asyncpg.PostgresError as error:
            if getattr(error, "constraint_name", None) != "events_tenant_event_id_key":
                raise
            await self.record("the same push again", error.sqlstate)
        # Somebody was faster: read, decide, push again.
        try:
            await self.push(own, 0, 2)
        except asyncpg.PostgresError as error:
            if error.sqlstate != "LS001":
                raise
            await self.record("push", error.sqlstate)
            await self.push(own, await self.sequence(own), 2)
        pushed = False
        while not pushed:
            try:
                await self.push("shared", await self.sequence("shared"), 3)
                pushed = True
            except asyncpg.PostgresError as error:
                if error.sqlstate != "LS001":
                    raise

    async def claim_and_apply(self):
        """Within a transaction: the events of a batch, applied, and whether there are more."""
        events = await self.connection.fetch(
            "SELECT position, aggregate_id, payload FROM lockstep.projection_claim('balances', max_events => 3, wait => true)"
        )
        for position, account, payload in events:
            await self.connection.execute("INSERT INTO applied VALUES ($1)", position)
            await self.connection.execute(
                "INSERT INTO balances AS b VALUES ($1, $2) ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total",
                account,
                json.loads(payload)["amount"],
            )
        return events, await self.value("SELECT more FROM lockstep.projection_claim_state('balances')")

    async def projection(self):
        await self.refused("advance without a claim", "SELECT lockstep.projection_advance('balances')")
        dies = self.connection.transaction()
        await dies.start()
        await self.claim_and_apply()
        await dies.rollback()  # all of this comes again
        more = True
        while more:
            async with self.connection.transaction():
                events, more = await self.claim_and_apply()
                if events:
                    last = events[-1]["position"]  # a Decimal
                    assert last == await self.value("SELECT lockstep.projection_advance('balances', up_to => $1)", last)

    async def lease(self):
        acquired = False
        while not acquired:
            acquired, token = await self.connection.fetchrow(
                "SELECT acquired, token FROM lockstep.lease_acquire('leader', $1, ttl => $2)",
                f"client {self.number}",
                timedelta(seconds=600),
            )
            if not acquired:
                await asyncio.sleep(0.01)
        async with self.connection.transaction():
            await self.connection.execute("SELECT lockstep.lease_guard('leader', $1)", token)
            await self.connection.execute("INSERT INTO led VALUES ($1, $2)", self.number, token)
        assert await self.value("SELECT lockstep.lease_release('leader', $1)", token)
        # From here on it is a former holder.
        await self.refused("guard", "SELECT lockstep.lease_guard('leader', $1)", token)
        try:
            async with self.connection.transaction():
                await self.connection.execute("INSERT INTO led VALUES ($1, NULL)", self.number)
                await self.connection.execute("SELECT lockstep.lease_guard_at_commit('leader', $1)", token)
        except asyncpg.PostgresError as error:
            await self.record("guard at commit", error.sqlstate)

    async def sync(self):
        resource = f"repository {self.number}"
        begin = "SELECT status, token FROM lockstep.replica_sync_begin($1, 'copy', $2, ttl => $3)"
        finish = "SELECT lockstep.replica_sync_finish($1, 'copy', $2)"
        await self.value("SELECT lockstep.resource_create($1, ARRAY['primary'])", resource)
        status, lost = await self.connection.fetchrow(begin, resource, "first", timedelta(microseconds=1))
        assert status == "started"
        status, token = await self.connection.fetchrow(begin, resource, "second", timedelta(minutes=1))
        assert status == "started"
        await self.record("sync of the first worker", await self.value(finish, resource, lost))
        await self.record("sync of the second worker", await self.value(finish, resource, token))
        await self.refused("copy to a current one", "SELECT lockstep.generation_replicated($1, 'primary', 'copy')", resource)
        await self.value("SELECT lockstep.generation_increment($1)", resource)  # the truth lives elsewhere: both are outdated
        await self.refused("write", "SELECT lockstep.generation_increment($1, ARRAY['primary'])", resource)
        await self.refused("sync from it", "SELECT lockstep.replica_sync_begin($1, 'copy', 'third', source => 'primary')", resource)

    async def jobs(self):
        queue = f"own {self.number}"
        claim = "SELECT job_id, token FROM lockstep.job_claim($1, $2, ttl => $3)"
        await self.value("SELECT lockstep.job_enqueue($1, 'key', 'greet')", queue)
        _, stale = await self.connection.fetchrow(claim, queue, "first", timedelta(microseconds=1))
        job, token = await self.connection.fetchrow(claim, queue, "second", timedelta(minutes=1))
        await self.refused("job guard", "SELECT lockstep.job_guard($1, $2)", job, stale)
        complete = "SELECT lockstep.job_complete($1, $2)"
        await self.record("job of the first worker", await self.value(complete, job, stale))
        await self.record("job of the second worker", await self.value(complete, job, token))
        for n in range(3):
            name = f"{self.number}.{n}"
            await self.value("SELECT lockstep.job_enqueue('shared', $1, 'greet', $2)", name, json.dumps({"name": name}))
        query = "SELECT job_id, token, payload FROM lockstep.job_claim('shared', $1)"
        while job := await self.connection.fetchrow(query, f"client {self.number}"):
            async with self.connection.transaction():
                await self.connection.execute("INSERT INTO greeted VALUES ($1)", json.loads(job["payload"])["name"])
                assert await self.value(complete, job["job_id"], job["token"]) == "completed"


async def work(number):
    client = Client(number, await connect())
    for part in (client.pushes, client.projection, client.lease, client.sync, client.jobs):
        await part()
    await client.connection.close()


async def push(connection, aggregate):
    await connection.execute("SELECT lockstep.push_event('race', $1, 'ran')", aggregate)


async def races():
    """Two sessions in each other's way: what to try again."""
    one, other = Client(0, await connect()), Client(0, await connect())

    async def serializable(disturbed):
        async with one.connection.transaction(isolation="serializable"):
            await one.value("SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable')")
            if disturbed:
                await push(other.connection, "serializable")
            await push(one.connection, "serializable")

    try:
        await serializable(disturbed=True)
    except asyncpg.PostgresError as error:
        if error.sqlstate not in RETRY:
            raise
        await other.record("serializable", error.sqlstate)
        await serializable(disturbed=False)

    claim = "SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)"
    async with one.connection.transaction():
        await one.value(claim)
        try:
            async with other.connection.transaction():
                await other.connection.execute("SET LOCAL lock_timeout = '10ms'")
                await other.value(claim)
        except asyncpg.PostgresError as error:
            if error.sqlstate not in RETRY:
                raise
            busy = error.sqlstate
    await other.record("wait for a claim", busy)
    await other.value(claim)

    for client, aggregate in ((one, "a"), (other, "b")):
        await client.connection.execute("BEGIN")
        await push(client.connection, aggregate)

    async def second(client, aggregate):
        try:
            await push(client.connection, aggregate)
            await client.connection.execute("COMMIT")
        except asyncpg.PostgresError as error:
            await client.connection.execute("ROLLBACK")
            if error.sqlstate not in RETRY:
                raise
            await client.record("opposite orders", error.sqlstate)
            async with client.connection.transaction():  # all of it again
                await push(client.connection, "a")
                await push(client.connection, "b")

    await asyncio.gather(second(one, "b"), second(other, "a"))


async def floats(batch):
    """What becomes of the position of a batch's last event that was made a float."""
    client = Client(0, await connect())
    outer = client.connection.transaction()
    await outer.start()
    claim = "SELECT position FROM lockstep.projection_claim('balances', max_events => $1)"
    events = await client.connection.fetch(claim, batch)
    for what, query in (
        ("advance", "SELECT lockstep.projection_advance('balances', up_to => $1)::text"),
        ("read", "SELECT count(*)::text FROM lockstep.read_events(after => $1)"),
    ):
        try:
            async with client.connection.transaction():
                outcome = await client.value(query, float(events[-1]["position"]))
        except asyncpg.PostgresError as error:
            outcome = error.sqlstate
        print(what, outcome)
    await outer.rollback()


async def main():
    if sys.argv[1] == "floats":
        await floats(int(sys.argv[2]))
    else:
        await asyncio.gather(*(work(number + 1) for number in range(int(sys.argv[1]))))
        await races()


asyncio.run(main())
