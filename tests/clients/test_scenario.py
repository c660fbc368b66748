"""One scenario in each language, directly and through PgBouncer in transaction mode, and one oracle for all of them.

A program of `scenario/` (and `rust/`), run with a number, works as so many clients at once, each with a connection of its own, and
then as two sessions in each other's way. What it catches by SQLSTATE and what it is answered it writes to `outcomes`; what it
makes of events, a lease and jobs, to the other tables. Run with `floats`, it prints what becomes of a position that was made a float.
"""

import importlib
import re
import subprocess
from decimal import Decimal
from pathlib import Path

import programs
import pytest
from psycopg import sql
from sessions import push_many

CLIENTS = 6
SERVER_CONNECTIONS = 2
HERE = Path(__file__).parent
PROGRAMS = {
    "psycopg": ("python", HERE / "scenario" / "with_psycopg.py"),
    "asyncpg": ("python", HERE / "scenario" / "with_asyncpg.py"),
    "pg": ("js", HERE / "scenario" / "with_pg.js"),
    "PgJDBC": ("java", HERE / "scenario" / "WithJdbc.java"),
    "tokio-postgres": ("rust", programs.RUST_PROJECT / "src" / "main.rs"),
    "pgx": ("go", HERE / "scenario" / "with_pgx.go"),
    "psql": ("bash", HERE / "scenario" / "with_psql.sh"),
}

TABLES = """
    CREATE TABLE outcomes (client int, what text, outcome text, pid int DEFAULT pg_backend_pid());
    CREATE TABLE applied (position numeric, number bigint GENERATED ALWAYS AS IDENTITY);
    CREATE TABLE balances (account text PRIMARY KEY, total numeric);
    CREATE TABLE led (client int, token bigint);
    CREATE TABLE greeted (name text);
    SELECT lockstep.projection_create('balances', event_types => '{deposited}');
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The command that runs a driver's program, which is built once."""
    commands = {}

    def command(driver):
        if driver not in commands:
            commands[driver] = programs.command(*PROGRAMS[driver], tmp_path_factory.mktemp(driver))
        return commands[driver]

    return command


def run(command, arguments, environment):
    result = subprocess.run(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.fixture(params=["direct", "pgbouncer"])
def address(request, db, monkeypatch):
    """The environment of a client, and whether it is in a pool."""
    if request.param == "direct":
        yield programs.environment(db), False
        return
    monkeypatch.syspath_prepend(HERE)
    # extra_float_digits is what PgJDBC sends as it connects.
    settings = {"default_pool_size": SERVER_CONNECTIONS, "ignore_startup_parameters": "extra_float_digits"}
    with importlib.import_module("pgbouncer").pgbouncer(db.cluster, **settings) as pool:
        yield programs.environment(db, pool.port), True


@pytest.mark.parametrize("driver", PROGRAMS)
def test_the_scenario_ends_the_same_in_every_language(driver, db, address, program):
    environment, pooled = address
    session = db.connect()
    session.execute(TABLES)
    session.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '50ms'").format(sql.Identifier(db.name)))
    run(program(driver), [CLIENTS], environment)
    assert state(session) == expected()
    shared = session.execute("SELECT pid FROM outcomes GROUP BY pid HAVING count(DISTINCT client) > 1").fetchall()
    assert bool(shared) == pooled


def state(session):
    """What the oracle compares, read from the database."""

    def rows(query):
        return session.execute(query).fetchall()

    def column(query):
        return [value for (value,) in rows(query)]

    return {
        "outcomes": {
            client: dict(rows(f"SELECT what, outcome FROM outcomes WHERE client = {client}"))
            for client in column("SELECT DISTINCT client FROM outcomes ORDER BY 1")
        },
        "outcomes told": rows("SELECT count(*) FROM outcomes"),
        "sequences": rows(
            "SELECT aggregate_type, aggregate_id, array_agg(sequence::int ORDER BY position) FROM lockstep.events"
            " GROUP BY 1, 2 ORDER BY 1, 2"
        ),
        "amounts": column("SELECT payload -> 'amount' FROM lockstep.events WHERE event_type = 'deposited' ORDER BY event_id"),
        "balances": dict(rows("SELECT account, total FROM balances")),
        "applied once and in order": column("SELECT position FROM applied ORDER BY number")
        == column("SELECT position FROM lockstep.events WHERE event_type = 'deposited' ORDER BY position"),
        "left to claim": rows("SELECT * FROM lockstep.projection_claim('balances')"),
        "led": column("SELECT client FROM led ORDER BY 1"),
        "tokens of the lease": rows("SELECT count(DISTINCT token) FROM led"),
        "lease": rows("SELECT count(*) FROM lockstep.leases WHERE expires_at > clock_timestamp()"),
        "replicas": rows(
            "SELECT resource, replica, generation, sync_token FROM lockstep.replicas ORDER BY 1, 2"
        ),
        "resources": rows("SELECT resource, generation FROM lockstep.resources ORDER BY 1"),
        "greeted": column("SELECT name FROM greeted ORDER BY 1"),
        "jobs": rows("SELECT * FROM lockstep.jobs") + rows("SELECT * FROM lockstep.dead_jobs"),
    }  # fmt: skip


def expected():
    clients = range(1, CLIENTS + 1)
    return {
        "outcomes": {
            0: {"serializable": "40001", "wait for a claim": "55P03", "opposite orders": "40P01"},
        }
        | {
            client: {
                "the same push again": "23505",
                "push": "LS001",
                "advance without a claim": "LS002",
                "guard": "LS003",
                "guard at commit": "LS003",
                "sync of the first worker": "lost",
                "sync of the second worker": "current",
                "copy to a current one": "LS004",
                "write": "LS005",
                "sync from it": "LS006",
                "job guard": "LS007",
                "job of the first worker": "lost",
                "job of the second worker": "completed",
            }
            for client in clients
        },
        "outcomes told": [(3 + 13 * CLIENTS,)],
        "sequences": [
            *(("account", f"own {client}", [1, 2]) for client in clients),
            ("account", "shared", list(range(1, CLIENTS + 1))),
            *(("race", aggregate, [1, 2]) for aggregate in ("a", "b", "serializable")),
        ],
        "amounts": [10 * client + event for client in clients for event in (1, 2, 3)],
        "balances": {f"own {client}": Decimal(20 * client + 3) for client in clients}
        | {"shared": Decimal(sum(10 * client + 3 for client in clients))},
        "applied once and in order": True,
        "left to claim": [],
        "led": list(clients),
        "tokens of the lease": [(CLIENTS,)],
        "lease": [(0,)],
        "replicas": [
            (f"repository {client}", replica, 0, None) for client in clients for replica in ("copy", "primary")
        ],
        "resources": [(f"repository {client}", 1) for client in clients],
        "greeted": [f"{client}.{n}" for client in clients for n in range(3)],
        "jobs": [],
    }  # fmt: skip


# What becomes of the position of the last event of a batch of 2 or 10, of a push of 20, that a program made a float and passed as
# `up_to` of projection_advance and as `after` of read_events. Of three kinds of drivers:
REFUSED_AS_FLOAT = {(2**36, 2): ("42883", "42883"), (2**36, 10): ("42883", "42883"), (4, 2): ("42883", "42883")}
REFUSED_AS_POSITION = {(2**36, 2): ("68719476736", "19"), (2**36, 10): ("22023", "22023"), (4, 2): ("22023", "22023")}
ROUNDED = {(2**36, 2): ("68719476736", "19"), (2**36, 10): ("22023", "0"), (4, 2): ("4.000001", "18")}
FLOATS = {
    "psycopg": REFUSED_AS_FLOAT,
    "asyncpg": REFUSED_AS_POSITION,
    "pg": ROUNDED,
    "PgJDBC": REFUSED_AS_FLOAT,
    "tokio-postgres": REFUSED_AS_FLOAT,
    "pgx": ROUNDED,
    "psql": REFUSED_AS_FLOAT,
}


@pytest.mark.parametrize("driver", PROGRAMS)
def test_what_becomes_of_a_position_that_was_made_a_float(driver, db, program):
    session = db.connect()
    session.execute(TABLES)
    found = {}
    for ticket, batch in FLOATS[driver]:
        session.execute("SELECT setval('lockstep.ticket', %s, false)", (ticket,))
        push_many(session, 20, event_type="deposited")
        output = run(program(driver), ["floats", batch], programs.environment(db))
        found[ticket, batch] = tuple(re.findall(r"^(?:advance|read) (.*)$", output, re.MULTILINE))
        session.execute("TRUNCATE lockstep.events")
    assert found == FLOATS[driver]


# What a driver needs and how it says so without it: its program, with one thing in place of another, and the code that it ends with.
NEEDED = {
    "psycopg: Jsonb": ("psycopg", "Jsonb([deposit])", "[deposit]", "cannot adapt type 'dict'"),
    "asyncpg: timedelta": ("asyncpg", "timedelta(seconds=600)", '"600 seconds"', "invalid input for query argument $2: '600 seconds'"),
    "asyncpg: json.dumps": ("asyncpg", "json.dumps([deposit])", "[deposit]", "expected str, got list"),
    "pg: JSON.stringify": ("pg", "JSON.stringify([deposit])", "[deposit]", "code: '22P02'"),
    "PgJDBC: ?::jsonb": ("PgJDBC", "push_events(?::jsonb)", "push_events(?)", "push_events(character varying) does not exist"),
    "PgJDBC: ?::interval": ("PgJDBC", "'leader', ?, ttl => ?::interval", "'leader', ?, ttl => ?", "ttl => character varying) does not exist"),
    "tokio-postgres: ::jsonb": ("tokio-postgres", "push_events($1::jsonb)", "push_events($1)", 'code: SqlState(E42883)'),
    "pgx: string": ("pgx", "string(deposit)", "deposit", "SQLSTATE 22P02"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("driver, there, instead, message", NEEDED.values(), ids=NEEDED)
def test_what_a_driver_needs_to_be_told(driver, there, instead, message, db, tmp_path):
    db.connect().execute(TABLES)
    language, file = PROGRAMS[driver]
    program = tmp_path / f"without_{file.name}"
    source = file.read_text()
    assert there in source
    program.write_text(source.replace(there, instead))
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(programs.command(language, program, tmp_path), [1], programs.environment(db))
