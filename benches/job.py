"""Jobs: against a table worked on with FOR UPDATE SKIP LOCKED and DELETE, against other queues in Node, and in a large backlog."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time

from bench import DATABASE, HERE, create_database, finish, psql

BACKLOGS = 1_000, 100_000, 1_000_000

# The control has what a claim looks at, and no keys, tokens, attempts or dead letters.
FILL = """CREATE EXTENSION lockstep;
CREATE TABLE queue (id bigserial PRIMARY KEY, key text NOT NULL, kind text NOT NULL, payload jsonb NOT NULL,
                    priority int NOT NULL DEFAULT 0, run_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON queue (priority DESC, id);
INSERT INTO queue (key, kind, payload) SELECT 'key ' || n, 'work', '{{"n": 1}}' FROM generate_series(1, {backlog}) AS n;
SELECT count(*) FROM (SELECT lockstep.job_enqueue('bench', 'key ' || n, 'work', '{{"n": 1}}') FROM generate_series(1, {backlog}) AS n) AS e"""

# One job is enqueued for each that is done, so the backlog stays as it is.
ENQUEUE = (
    "INSERT INTO queue (key, kind, payload) VALUES ('new ' || :first || ' ' || :n, 'work', :payload) RETURNING id;\n",
    "SELECT * FROM lockstep.job_enqueue('bench', 'new ' || :first || ' ' || :n, 'work', :payload);\n",
)
WORK = (
    """BEGIN;
SELECT id FROM queue WHERE run_at <= now() ORDER BY priority DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED \\gset
DELETE FROM queue WHERE id = :id;
COMMIT;
""",
    """SELECT job_id, token FROM lockstep.job_claim('bench', 'worker') \\gset
SELECT lockstep.job_complete(:job_id, :token);
""",
)
# Completing the last job and claiming the next in one transaction.
WORK_IN_ONE = (
    WORK[0],
    """BEGIN;
SELECT lockstep.job_complete(:job_id, :token);
SELECT job_id, token FROM lockstep.job_claim('bench', 'worker') \\gset
COMMIT;
""",
)
NEXT = "\\set n :n + 1\n"


def fill(backlog):
    """A database with so many jobs ready; its name."""
    name = f"{DATABASE}_jobs_{backlog}"
    if name not in FILLED:
        create_database(name)
        psql("-d", name, "-c", FILL.format(backlog=backlog))
        FILLED.add(name)
    psql("-d", name, "-c", "VACUUM ANALYZE", "-c", "CHECKPOINT")
    return name


FILLED = set()


def rate(bench, script, clients, backlog):
    return bench.rate(script, clients=clients, database=fill(backlog), extra=("-D", "job_id=0", "-D", "token=0"))


def node(bench, engine, verb, number):
    """Jobs a second of a queue in Node, in a database of its own."""
    place = HERE / "node"
    if not (place / "node_modules").exists():
        command = ["npm", "ci", "--prefix", place, "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
        subprocess.run(list(map(str, command)), check=True)
    name = f"{DATABASE}_{engine}"
    environment = {**os.environ, "PGDATABASE": name}

    def run(*arguments):
        command = ["node", place / "queue.js", engine, *arguments]
        return subprocess.run(list(map(str, command)), check=True, env=environment, text=True, stdout=subprocess.PIPE).stdout

    if name not in FILLED:
        create_database(name)
        if engine == "lockstep":
            psql("-d", name, "-c", "CREATE EXTENSION lockstep")
        FILLED.add(name)
        run("fill", 100_000)
    psql("-d", name, "-c", "VACUUM ANALYZE", "-c", "CHECKPOINT")
    return float(run(verb, number, bench.seconds))


def decay(bench, script, seconds):
    """Tells how many jobs a second are done at the end of that time, of those at its beginning, beside a transaction that stays open."""
    name = fill(100_000)
    command = ["psql", "-X", "-q", "-d", name, "-c", f"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1; SELECT pg_sleep({seconds + 5})"]
    holder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved, bench.seconds = bench.seconds, seconds
    try:
        time.sleep(1)
        output = finish(bench.start(script, 8, database=name, extra=("-D", "job_id=0", "-D", "token=0")))
    finally:
        bench.seconds = saved
        holder.kill()
        holder.wait()
    rates = [float(rate) for rate in re.findall(r"^progress: .*?, ([\d.]+) tps", output, re.MULTILINE)][1:]
    tenth = max(len(rates) // 10, 1)
    return 100 * sum(rates[-tenth:]) / max(sum(rates[:tenth]), 1)


def node_decay(bench, engine, seconds):
    """The same of a queue in Node, from the first measurement to one after that time."""
    first = node(bench, engine, "work", 8)
    name = f"{DATABASE}_{engine}"
    command = ["psql", "-X", "-q", "-d", name, "-c", f"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1; SELECT pg_sleep({10 * seconds})"]
    holder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            beside = threading.Thread(target=node, args=(bench, engine, "enqueue", 4))
            beside.start()
            node(bench, engine, "work", 4)
            beside.join()
        return 100 * node(bench, engine, "work", 8) / max(first, 1)
    finally:
        holder.kill()
        holder.wait()


def cells(bench, hold):
    for clients in 1, 8, 32:

        def enqueue(queue, clients=clients):
            return rate(bench, ENQUEUE[queue] + NEXT, clients, BACKLOGS[0])

        yield f"job_enqueue, {clients} clients", "jobs/s", (">=", 0.7), enqueue
    for backlog in BACKLOGS:
        for clients in 1, 8, 32:
            for name, work in ("claim and complete", WORK), ("complete and claim in one transaction", WORK_IN_ONE):

                def cycle(queue, clients=clients, backlog=backlog, work=work):
                    return rate(bench, ENQUEUE[queue] + work[queue] + NEXT, clients, backlog)

                yield f"enqueue, {name}, {clients} workers, {backlog:,} ready", "jobs/s", (">=", 0.7), cycle

    def large(is_large):
        return 1e6 / rate(bench, ENQUEUE[1] + WORK[1] + NEXT, 8, BACKLOGS[-1] if is_large else BACKLOGS[0])

    yield f"enqueue, claim and complete, {BACKLOGS[-1]:,} ready against {BACKLOGS[0]:,}", "µs", ("<=", 1.3), large
    if shutil.which("npm") is None:
        print("    no npm: not measured against other queues", file=sys.stderr)
        return
    for other in "graphile", "pgboss":
        for verb in "enqueue", "work":
            for number in 1, 8, 32:

                def peer(queue, other=other, verb=verb, number=number):
                    return node(bench, "lockstep" if queue else other, verb, number)

                yield f"{verb} in Node against {other}, {number}", "jobs/s", (">", 1), peer
    if hold:

        def open_transaction(queue):
            return decay(bench, ENQUEUE[queue] + WORK[queue] + NEXT, hold)

        yield f"speed left after {hold} s beside an open transaction", "%", (">=", 1), open_transaction
        for other in "graphile", "pgboss":

            def peer_decay(queue, other=other):
                return node_decay(bench, "lockstep" if queue else other, hold)

            yield f"speed left in Node after {hold} s beside an open transaction, against {other}", "%", (">=", 1), peer_decay
