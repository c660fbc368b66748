"""Fixtures: a shared server, a database of one's own, a cluster of one's own."""

import itertools
import subprocess
from pathlib import Path

import pytest
import workers
from psycopg import sql
from psycopg.conninfo import make_conninfo
from server import BINDIR, Cluster

_numbers = itertools.count(1)


def pytest_addoption(parser):
    parser.addoption("--stress-seconds", type=float, default=10.0, help="how long the stress tests run")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; make test leaves it out, make test-all does not")


@pytest.fixture
def stress_seconds(request):
    return request.config.getoption("--stress-seconds")


@pytest.fixture(scope="session")
def server():
    """The server that most tests share. Do not stop it or change its settings."""
    shared = Cluster()
    try:
        yield shared.start()
    finally:
        shared.destroy()


class Database:
    """A database with the extension in it. Connections opened here are closed with it."""

    def __init__(self, cluster, name):
        self.cluster = cluster
        self.name = name
        self._connections = []
        with cluster.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with self.connect() as connection:
            connection.execute("CREATE EXTENSION lockstep")

    @property
    def dsn(self):
        """For programs that connect by themselves, as the superuser."""
        return make_conninfo(host=self.cluster.host, port=self.cluster.port, dbname=self.name, user="postgres")

    def connect(self, **options):
        connection = self.cluster.connect(self.name, **options)
        self._connections.append(connection)
        return connection

    def psql(self, script):
        return self.cluster.psql(script, self.name)

    def drop(self):
        for connection in self._connections:
            connection.close()
        with self.cluster.connect(self.name) as connection:
            prepared = connection.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
            for (gid,) in prepared.fetchall():
                connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        with self.cluster.connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.name)))


@pytest.fixture
def db(server):
    """A fresh database on the shared server."""
    database = Database(server, f"test_{next(_numbers)}")
    try:
        yield database
    finally:
        database.drop()


class Roles:
    """Roles that live as long as the test; roles belong to the whole server, so each name holds the database's."""

    def __init__(self, db):
        self.db = db
        self.admin = db.connect()
        self.names = []

    def create(self, name, *statements):
        """Creates a role and runs the statements, in which {role} stands for it; returns its name."""
        role = f"{self.db.name}_{name}"
        self.admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        self.names.append(role)
        for statement in statements:
            self.admin.execute(statement.format(role=role))
        return role

    def connect(self, role):
        return self.db.connect(user=role)

    def drop(self):
        for role in self.names:
            self.admin.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
        for role in self.names:
            self.admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.fixture
def roles(db):
    made = Roles(db)
    try:
        yield made
    finally:
        made.drop()


@pytest.fixture
def cluster():
    """Makes started clusters of one's own: `cluster(fsync="on")`. They are destroyed at the end of the test.

    `cluster(start=False)` gives one that is not yet created.
    """
    clusters = []

    def make(start=True, **settings):
        made = Cluster(**settings)
        clusters.append(made)
        return made.start() if start else made

    try:
        yield make
    finally:
        for made in reversed(clusters):
            made.destroy()


@pytest.fixture(scope="session")
def worker_server():
    """A server with the library preloaded, which tests share by the fixture `app`."""
    shared = Cluster(**workers.SETTINGS)
    try:
        yield shared.start()
    finally:
        shared.destroy()


@pytest.fixture
def app(worker_server):
    """An application on the shared server with workers, its database not yet in lockstep.databases."""
    application = workers.Application(Database(worker_server, f"app_{next(_numbers)}"))
    try:
        yield application
    finally:
        application.drop()


@pytest.fixture
def own_app(cluster):
    """Makes an application on a server of its own: `own_app(wal_level="minimal")`."""

    def make(**settings):
        return workers.Application(Database(cluster(**(workers.SETTINGS | settings)), "app"))

    return make


@pytest.fixture
def new_database():
    """Makes a database with the extension on any cluster: `new_database(cluster, "name")`. It goes with its cluster."""
    return Database


@pytest.fixture
def pair(cluster, new_database):
    """A database on a primary of its own, and its standby."""
    primary = cluster()
    database = new_database(primary, "replicated")
    standby = primary.standby()
    try:
        yield database, standby
    finally:
        standby.destroy()


@pytest.fixture(scope="session")
def replicated_server():
    """A primary and its standby, which tests share by the fixture `shared_pair`."""
    primary = Cluster()
    try:
        standby = primary.start().standby()
        try:
            yield primary, standby
        finally:
            standby.destroy()
    finally:
        primary.destroy()


@pytest.fixture
def shared_pair(replicated_server):
    """A fresh database on the shared primary, and the standby. Do not stop them or change the primary's settings."""
    primary, standby = replicated_server
    database = Database(primary, f"replicated_{next(_numbers)}")
    try:
        yield database, standby
    finally:
        database.drop()


@pytest.fixture(scope="session")
def older_bindir():
    """The programs of the oldest major version of PostgreSQL that can be had, with the extension installed."""
    built = subprocess.run([Path(__file__).parents[1] / "tools" / "older-server"], capture_output=True, text=True)
    if built.returncode != 0:
        pytest.fail(f"there is no older server:\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
    bindir = Path(built.stdout.splitlines()[-1])
    if _major(bindir) >= _major(BINDIR):
        pytest.skip(f"PostgreSQL {_major(BINDIR)} is the oldest at hand")
    print(f"from PostgreSQL {_major(bindir)} to {_major(BINDIR)}")
    return bindir


def _major(bindir):
    shown = subprocess.run([bindir / "pg_config", "--version"], capture_output=True, text=True, check=True).stdout
    return int(shown.split()[1].split(".")[0])
