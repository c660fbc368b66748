"""The servers, their databases, and a connection to ask them something.

LOCKSTEP_BENCH_SERVERS says where they are, as NAME=DIRECTORY of the socket, separated by spaces. `plain` is PostgreSQL 18, `workers`
preloads lockstep, `latency` keeps the times of commits besides, `old` is PostgreSQL 15 with PgQ's files.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psycopg

BINDIR = Path(os.environ.get("LOCKSTEP_BINDIR", "/usr/bin"))


TABLES = """SELECT string_agg(oid::regclass::text, ', ') FROM pg_class
WHERE relkind IN ('r', 'p') AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) AND NOT relispartition"""


@dataclass(frozen=True)
class Server:
    name: str
    host: str
    port: int = 5432

    def connect(self, database="postgres", **options):
        return psycopg.connect(
            host=self.host, port=self.port, user="postgres", dbname=database, autocommit=True,
            options="-c client_min_messages=warning", **options,
        )  # fmt: skip

    def execute(self, database, *statements):
        """Runs statements, each in a transaction of its own; returns the rows of the last."""
        with self.connect(database) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def value(self, database, query):
        return self.execute(database, query)[0][0]

    def environment(self, database, options=""):
        """What tells a client where the database is."""
        return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGDATABASE": database,
            "PGOPTIONS": f"-c client_min_messages=warning {options}",
        }

    def create_database(self, name):
        self.execute("postgres", f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)', f'CREATE DATABASE "{name}"')

    def settle(self, database):
        """VACUUM and CHECKPOINT, so that neither falls into what is measured next."""
        tables = self.value(database, TABLES)
        self.execute(database, *([f"VACUUM (ANALYZE) {tables}"] if tables else []), "CHECKPOINT")


def available():
    return {
        name: Server(name, host)
        for name, _, host in (entry.partition("=") for entry in os.environ.get("LOCKSTEP_BENCH_SERVERS", "").split())
    }


@cache
def server(name):
    return available()[name]
