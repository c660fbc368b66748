"""An application whose projections are run by workers in the server, and what tests ask of it."""

import itertools
import random
import threading
from pathlib import Path

import psycopg
from psycopg import sql
from server import wait_until
from sessions import push

SETTINGS = {"shared_preload_libraries": "lockstep", "max_worker_processes": 32}

# What a projection's handler does unless a test says otherwise. No unique constraint hides an event applied twice.
NOTE = "INSERT INTO public.applied (projection, tenant, position) VALUES (TG, e.tenant, e.position);"

KINDS = ("lockstep supervisor", "lockstep launcher", "lockstep worker")

PUSHERS = """
    GRANT USAGE ON SCHEMA lockstep TO {role};
    GRANT EXECUTE ON FUNCTION lockstep.projection_create, lockstep.projection_alter, lockstep.projection_drop,
        lockstep.projection_reset, lockstep.projection_pause, lockstep.projection_resume TO {role};
"""


class Application:
    """A database with projections and the role that owns them, on a server with the library preloaded.

    Handlers write to the table `applied`. `turn_on` puts the database into lockstep.databases.
    """

    def __init__(self, database):
        self.db = database
        self.cluster = database.cluster
        self.roles = []
        self.admin = database.connect()
        self._numbers = itertools.count(1)
        self.make_table()
        self.owner = self.role("owner")

    def make_table(self):
        self.admin.execute(
            """
            CREATE TABLE public.applied (
                nth bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, projection text, tenant text, position numeric,
                who text DEFAULT current_user, session text DEFAULT session_user, pid int DEFAULT pg_backend_pid(),
                at timestamptz DEFAULT clock_timestamp()
            );
            GRANT INSERT, SELECT ON public.applied TO PUBLIC;
            """
        )

    def turn_on(self, workers=2, poll_interval="100ms"):
        settings = {"lockstep.workers": workers, "lockstep.poll_interval": poll_interval}
        self.cluster.conf(**settings, **{"lockstep.databases": self.db.name})
        return self

    def turn_off(self):
        """Takes the database out of lockstep.databases, and waits until all of its processes are gone."""
        self.cluster.conf(**{"lockstep.databases": ""})
        wait_until(lambda: not self.workers() and not pids(self.admin, "lockstep launcher"))

    def role(self, name, options="LOGIN"):
        """A role that may do everything with projections, with a schema of its own; returns its name."""
        role = f"{self.db.name}_{name}"
        self.admin.execute(f"CREATE ROLE {role} {options}")
        self.roles.append(role)
        self.allow(role)
        self.admin.execute(f"CREATE SCHEMA {role} AUTHORIZATION {role}")
        return role

    def allow(self, role):
        self.admin.execute(PUSHERS.format(role=role))

    def handler(self, name, body=NOTE, role=None, argument="lockstep.events"):
        """Makes a handler, in which TG stands for its name, and returns its signature."""
        role = role or self.owner
        body = body.replace("TG", f"'{name}'")
        self.admin.execute(
            f"""
            CREATE OR REPLACE FUNCTION {role}.{name}(e {argument}) RETURNS void LANGUAGE plpgsql AS
                $body$ BEGIN {body} END $body$;
            ALTER FUNCTION {role}.{name}({argument}) OWNER TO {role};
            """
        )
        return f"{role}.{name}({argument})"

    def project(self, name="p", body=NOTE, role=None, argument="lockstep.events", **arguments):
        """Makes a projection with a handler of the same name, both the role's; returns its name."""
        handler = self.handler(name, body, role, argument)
        self.as_role("projection_create", role, name=name, handler=handler, **arguments)
        return name

    def as_role(self, function, role=None, **arguments):
        named = "".join(f", {name} => %({name})s" for name in arguments)[2:]
        with self.admin.transaction():
            self.admin.execute(f"SET LOCAL ROLE {role or self.owner}")
            self.admin.execute(f"SELECT lockstep.{function}({named})", arguments)

    def push(self, tenant="", **arguments):
        return push(self.admin, tenant=tenant, **arguments)

    def applied(self, projection="p", tenant=None, session=None):
        """The positions in the order applied; of all tenants unless one is named."""
        rows = (session or self.admin).execute(
            """SELECT position FROM public.applied
               WHERE projection = %s AND (%s::text IS NULL OR tenant = %s) ORDER BY nth""",
            (projection, tenant, tenant),
        )
        return [position for (position,) in rows]

    def wait_for(self, positions, projection="p", tenant=None, timeout=30.0):
        """Waits until as many events are applied, and checks that they are these, in this order."""
        positions = list(positions) if isinstance(positions, (list, tuple)) else [positions]
        wait_until(lambda: len(self.applied(projection, tenant)) >= len(positions), timeout)
        assert self.applied(projection, tenant) == positions

    def failures(self, columns="position, failures, sqlstate"):
        return self.admin.execute(f"SELECT {columns} FROM lockstep.failed_events ORDER BY position").fetchall()

    def status(self, *columns):
        """Those columns of lockstep.worker_status, a tuple a worker."""
        query = f"SELECT {', '.join(columns)} FROM lockstep.worker_status ORDER BY worker"
        return self.admin.execute(query).fetchall()

    def state(self, projection="p", tenant=""):
        row = self.admin.execute(
            "SELECT state FROM lockstep.projection_status WHERE projection = %s AND tenant = %s", (projection, tenant)
        ).fetchone()
        return row and row[0]

    def workers(self):
        return pids(self.admin, "lockstep worker")

    def worker(self):
        """The pid of the only worker, as soon as there is one."""
        (pid,) = wait_until(self.workers)
        return pid

    def launcher(self):
        (pid,) = wait_until(lambda: pids(self.admin, "lockstep launcher"))
        return pid

    def supervisor(self):
        (pid,) = wait_until(lambda: pids(self.admin, "lockstep supervisor"))
        return pid

    def wait_for_handler(self, where="Lock"):
        """Waits until a worker's handler waits for a lock or sleeps; returns the worker's pid."""
        query = "SELECT pid FROM lockstep.worker_status WHERE wait_event_type = %s"
        return wait_until(lambda: self.admin.execute(query, (where,)).fetchone())[0]

    def check(self, projections=("p",)):
        """Every event of the log was applied by every projection, once, in order in each tenant."""
        log = self.admin.execute("SELECT tenant, position FROM lockstep.events ORDER BY tenant, position").fetchall()
        for projection in projections:
            rows = self.admin.execute(
                "SELECT tenant, position FROM public.applied WHERE projection = %s ORDER BY tenant, nth", (projection,)
            ).fetchall()
            assert rows == log, difference(rows, log)
        return log

    def wait_and_check(self, projections=("p",), timeout=60.0):
        """Waits until nobody is behind, then checks."""
        behind = """SELECT count(*) FROM lockstep.projections AS p CROSS JOIN lockstep.tenants AS t
                    LEFT JOIN lockstep.projection_cursors AS c ON c.projection = p.name AND c.tenant = t.tenant
                    WHERE COALESCE(c.position, 0) < t.head"""
        wait_until(lambda: self.admin.execute(behind).fetchone()[0] == 0, timeout)
        return self.check(projections)

    def reconnect(self):
        self.admin.close()
        self.admin = self.db.connect()

    def drop(self):
        if self.cluster.running():
            self.cluster.conf(**{"lockstep.databases": ""})
            with self.cluster.connect() as admin:
                admin.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(self.db.name)))
                self.db.drop()
                for role in self.roles:
                    admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


def difference(rows, log):
    lost, surplus = sorted(set(log) - set(rows)), sorted(set(rows) - set(log))
    return f"{len(rows)} of {len(log)}: lost {lost[:5]}, surplus {surplus[:5]}, else doubled or out of order"


def pids(observer, kind):
    """The processes of the observer's database; the supervisor is of none."""
    rows = observer.execute(
        """SELECT pid FROM pg_stat_activity
           WHERE backend_type = %s AND COALESCE(datname, current_database()) = current_database() ORDER BY pid""",
        (kind,),
    )
    return [pid for (pid,) in rows]


def all_pids(observer):
    return [pid for kind in KINDS for pid in pids(observer, kind)]


def sleeps(pid):
    """How often the process has gone to sleep."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise AssertionError(f"no voluntary_ctxt_switches of {pid}")


class Log:
    """What the server writes to its log from now on."""

    def __init__(self, cluster):
        self.file = cluster.log
        self.start = self.file.stat().st_size

    def lines(self, *words):
        """The lines that contain all the words."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            lines = file.read().decode(errors="replace").splitlines()
        return [line for line in lines if all(word in line for word in words)]

    def wait_for(self, *words, timeout=30.0):
        return wait_until(lambda: self.lines(*words), timeout)


class Load:
    """Writers that push all the time and connect again when the server is back. Use it in a `with`.

    `confirmed` holds the positions whose COMMIT was answered.
    """

    TENANTS = ("", "blue", "green", "red")

    def __init__(self, database, writers=4, pause=0.002):
        self.database, self.pause = database, pause
        self.confirmed, self.errors = set(), []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._write_all, args=(n,), daemon=True) for n in range(writers)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)
        assert not self.errors, self.errors

    def _write_all(self, number):
        dice, connection = random.Random(number), None
        while not self.stopping.is_set():
            try:
                connection = connection or self.database.cluster.connect(self.database.name)
                self._write(connection, dice)
            except psycopg.OperationalError:
                if connection is not None:
                    connection.close()
                connection = None
                self.stopping.wait(0.02)
            except Exception as error:
                self.errors.append(error)
                return
        if connection is not None:
            connection.close()

    def _write(self, connection, dice):
        connection.execute("BEGIN")
        pushed = []
        tenant = dice.choice(self.TENANTS)
        for _ in range(dice.choice((1, 1, 2))):
            pushed.append((tenant, push(connection, tenant=tenant)))
            self.stopping.wait(self.pause)
        if dice.random() < 0.1:
            connection.execute("ROLLBACK")
            return
        connection.execute("COMMIT")
        self.confirmed.update(pushed)
