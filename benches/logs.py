"""A system as an event log: what writes to it, what consumes it, and what the oracle asks it in the end.

A `Log` runs a peer by pgbench, with its statements; a `ClientLog` by driver.py or driver.js, with its client library. All systems are in
databases of their own; the control in Python and in Node is another driver on a database like that of the control in pgbench.
"""

import time
from contextlib import contextmanager
from functools import cached_property

from load import Driver, Pgbench
from measure import Measurement
from peers import install, payload
from servers import server

POLL = 100  # milliseconds that a polling consumer sleeps, on average
# Seconds without a new event after which a consumer is taken to have missed what it was not passed: if it was passed a later one, and else.
PATIENCE, LONG_PATIENCE = 5, 60

# Of each consumer: the committed events that it was not passed, and the times that it was passed one again.
ORACLE = """WITH committed AS MATERIALIZED ({committed}),
passed AS (SELECT consumer, position, count(*) AS times FROM bench.applied GROUP BY 1, 2)
SELECT count(*) FILTER (WHERE p.times IS NULL), coalesce(sum(p.times - 1), 0)::bigint
FROM generate_series(1, {consumers}) AS consumer (consumer) CROSS JOIN committed AS c (position)
LEFT JOIN passed AS p ON p.consumer = consumer.consumer AND p.position = c.position
"""

# Whether a consumer was not passed the last event of the log yet: it may only be slow.
BEHIND = """SELECT coalesce((SELECT max(position) FROM ({committed}) AS c (position)), 0) > min(coalesce(last, 0))
FROM generate_series(1, {consumers}) AS consumer (consumer)
LEFT JOIN (SELECT consumer, max(position) AS last FROM bench.applied GROUP BY 1) AS passed USING (consumer)
"""


class Log:
    def __init__(self, peer, on="plain", suffix=""):
        self.peer = peer
        self.on = on
        self.database = f"bench_{peer.name.replace(' ', '_').replace('-', '_').lower()}{suffix}"

    def __str__(self):
        return self.peer.name

    @cached_property
    def server(self):
        """The server, on which the database is made at the first use."""
        place = server(self.on)
        place.create_database(self.database)
        install.before(self.peer, place, self.database)
        place.execute(self.database, self.peer.schema)
        install.after(self.peer, place, self.database)
        return place

    def sql(self, *statements):
        return self.server.execute(self.database, *statements)

    def value(self, query):
        return self.sql(query)[0][0]

    def reset(self, consumers=0):
        """An empty log, and consumers at its beginning."""
        self.sql(self.peer.reset.replace("{consumers}", str(consumers)))
        self.server.settle(self.database)

    # Writing

    def append(self, hold=0, hot=False):
        """The script of a writer, who adds 10 events to an aggregate and goes on to the next; `hold`: milliseconds, at most, before COMMIT."""
        if hot:
            return self.peer.hot + "\\set n :n + 1\n"
        script = "\\set aggregate :first + :n / 10\n\\set sequence :n % 10 + 1\n"
        if self.peer.before or hold:
            sleep = f"\\set hold random(0, {hold})\n\\sleep :hold ms\n" if hold else ""
            script += f"BEGIN;\n{self.peer.before}{self.peer.append}{sleep}COMMIT;\n"
        else:
            script += self.peer.append
        return script + "\\set n :n + 1\n"

    def write(self, window, clients, size=150, hold=0, hot=False, rate=None, options=""):
        variables = {"payload": payload(size)}
        return Pgbench(
            self.server, self.database, self.append(hold, hot), clients, window, rate=rate, variables=variables,
            options=f"{self.peer.options} {options}",
        )  # fmt: skip

    def write_measured(self, window, clients, **how):
        """Events a second, and whether each acknowledged one is there once."""
        self.reset()
        loaded = self.write(window, clients, **how).finish()
        return self.measurement_of(loaded)

    def measurement_of(self, loaded):
        there = self.committed()
        return Measurement(
            loaded.rate, max(0, loaded.count - there), max(0, there - loaded.count), loaded.failed, {"acknowledged": loaded.count, "there": there}
        )

    def committed(self):
        return self.value(f"SELECT count(*) FROM ({self.peer.committed}) AS committed")

    # Consuming

    def turn(self, batch=1000, each=False):
        return self.peer.turn.format(batch=batch, each=str(each).lower()) + "\n"

    def poll(self, consumers, seconds, batch=1000):
        """Consumers that poll, out of step with each other as sessions are that began at different times; the caller ends them."""
        script = f"\\set pause random({POLL // 2}, {POLL * 3 // 2})\n\\sleep :pause ms\n{self.turn(batch)}"
        return Pgbench(self.server, self.database, script, consumers, seconds + 60, options=self.peer.options)

    @contextmanager
    def polled(self, consumers, seconds):
        """Consumers beside what is done meanwhile, and until they have been passed everything, or nothing more for a while."""
        if not consumers:
            yield
            return
        with self.poll(consumers, seconds) as load:
            yield
            self.wait_for_consumers(consumers, load)
            load.stop()
        self.wait_for_silence()

    def wait_for_consumers(self, consumers, load):
        before, since, patience = -1, time.monotonic(), LONG_PATIENCE
        while time.monotonic() < since + patience:
            if load.process.poll() is not None:
                load.finish()
                raise RuntimeError(f"the consumers of {self} have ended")
            if self.peer.settle:
                self.sql(self.peer.settle)
            if self.oracle(consumers)[0] == 0:
                return
            now = self.value("SELECT count(*) FROM bench.applied")
            if now != before:
                before, since = now, time.monotonic()
            patience = LONG_PATIENCE if self.sql(BEHIND.format(committed=self.peer.committed, consumers=consumers))[0][0] else PATIENCE
            time.sleep(0.1)

    def wait_for_silence(self):
        """Until what a client that was killed had begun has ended."""
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
        deadline = time.monotonic() + 30
        while self.value(query) and time.monotonic() < deadline:
            time.sleep(0.02)

    def oracle(self, consumers):
        """How many events were not passed on, and how many more than once."""
        return self.sql(ORACLE.format(committed=self.peer.committed, consumers=consumers))[0]

    def fill(self, events):
        self.sql(self.peer.reset.replace("{consumers}", "16"))
        self.sql(*(statement.format(events=events) for statement in self.peer.fill))
        self.server.settle(self.database)


class ClientLog(Log):
    """A peer that is run by its client library, in Python or Node."""

    def __init__(self, peer, language, program, on="plain", suffix=""):
        super().__init__(peer, on, suffix or f"_{language}")
        self.language, self.program = language, program

    def driver(self, *arguments):
        return Driver(self.language, self.server, self.database, self.program, *arguments, path=self.path())

    @cached_property
    def server(self):
        place = super().server
        if self.peer.own_schema:
            Driver(self.language, place, self.database, self.program, "create", path=self.path()).finish()
        return place

    def path(self):
        if self.language == "node":
            install.node()
        return install.python() if self.peer.own_schema and self.language == "python" else None

    def write(self, window, clients, size=150, hold=0, hot=False, rate=None, options=""):
        return self.driver("append", clients, window, size, int(hot))

    def write_batches(self, window, size):
        self.reset()
        loaded = self.driver("batch", 1, window, size).finish()
        there = self.committed()
        expected = loaded.count * size
        return Measurement(loaded.rate * size, max(0, expected - there), max(0, there - expected))

    def poll(self, consumers, seconds, batch=1000):
        return self.driver("consume", consumers, POLL, batch)
