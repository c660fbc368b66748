"""PostgreSQL clusters for tests: started, crashed, copied and thrown away.

Servers run as LOCKSTEP_SERVER_USER, which differs from the caller when that is root; clients run as the caller.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

try:
    BINDIR = Path(os.environ["LOCKSTEP_BINDIR"])
    SERVER_USER = os.environ["LOCKSTEP_SERVER_USER"]
    STATE = Path(os.environ["LOCKSTEP_STATE"])
except KeyError as missing:
    raise RuntimeError(f"{missing} is not set: run the tests by tools/test pytest [-- ARGUMENTS]") from None

SETTINGS = {
    "fsync": "off",
    "max_connections": 200,
    "max_prepared_transactions": 20,
    "shared_buffers": "64MB",
}


def wait_until(condition, timeout=30.0):
    """Polls `condition` until it returns something true, and returns that."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{condition} did not come true within {timeout} s: {value!r}")
        time.sleep(0.005)


def wait_for_lock_wait(connection, pid, timeout=30.0):
    """Waits until the backend `pid` waits for a heavyweight lock; returns pg_stat_activity's name of it."""

    def waiting():
        row = connection.execute(
            "SELECT wait_event FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'", (pid,)
        ).fetchone()
        return row and row[0]

    return wait_until(waiting, timeout)


class Cluster:
    """One PostgreSQL cluster in a directory of its own, reached by a socket or by 127.0.0.1."""

    def __init__(self, bindir=BINDIR, **settings):
        self.bindir = bindir
        self.settings = SETTINGS | settings
        self.port = _free_port()
        self.directory = _temporary_directory(STATE / "tests")
        self.data = self.directory / "data"
        self.log = self.directory / "server.log"
        self.host = _temporary_directory(Path("/tmp"))  # a socket's path may have 107 bytes

    def create(self, *options):
        """initdb. `start` does it where it has not been done."""
        command = ("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        self._run(*command, *options)
        self.conf(**self.settings)
        return self

    def start(self, env=None):
        """Starts the server; `env` holds further environment variables for it."""
        if not self.data.exists():
            self.create()
        self.conf(port=self.port, listen_addresses="127.0.0.1", unix_socket_directories=self.host)
        try:
            self._run("pg_ctl", "start", "-D", self.data, "-l", self.log, "-w", "-s", env=env)
        except subprocess.CalledProcessError as error:
            log = self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
            raise RuntimeError(f"the server does not start:\n{error.stdout}{log}") from None
        return self

    def stop(self, mode="fast"):
        if self.running():
            self._run("pg_ctl", "stop", "-D", self.data, "-m", mode, "-w", "-s")

    def restart(self):
        self.stop()
        return self.start()

    def destroy(self):
        """Stops the server, whatever its state, and deletes its files."""
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)
            shutil.rmtree(self.host, ignore_errors=True)

    def running(self):
        return self._postmaster() is not None

    def crash(self):
        """SIGKILL to all processes of the server at once, as in a power cut."""
        postmaster = self._postmaster()
        os.kill(postmaster, signal.SIGSTOP)  # it starts nothing new while its children are listed
        processes = [*_children(postmaster), postmaster]
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(_alive(pid) for pid in processes))
        self._forget()

    def kill_postmaster(self):
        """SIGKILL to the postmaster alone; returns when each of its children has noticed and is gone."""
        postmaster = self._postmaster()
        children = _children(postmaster)
        os.kill(postmaster, signal.SIGKILL)
        wait_until(lambda: not any(_alive(pid) for pid in [*children, postmaster]), 60)
        self._forget()

    def stop_wal_writer(self):
        """SIGSTOP to the WAL writer: what no commit waits for is not flushed any more, until `crash`.

        A long wal_writer_delay is not enough: on some versions each full page of WAL wakes it.
        """
        with self.connect() as connection:
            (pid,) = connection.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").fetchone()
        os.kill(pid, signal.SIGSTOP)

    def limit_file_size(self, size):
        """`ulimit -f` for all processes of the server: those that start later have it from the postmaster."""
        postmaster = self._postmaster()
        for pid in [postmaster, *_children(postmaster)]:
            try:
                _as_server_user(shutil.which("prlimit"), f"--fsize={size}:", "--pid", str(pid))
            except subprocess.CalledProcessError:
                if _alive(pid):
                    raise

    def kill_backend(self, pid):
        """SIGKILL to one backend. The server has noticed on return; `wait_for_connections` waits for its recovery."""
        if pid not in _children(self._postmaster()):
            raise ValueError(f"{pid} is not a process of this server")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"))

    def conf(self, **settings):
        """Writes settings, and reloads a running server. Those that need a restart wait for `restart`."""
        self.conf_later(**settings)
        if self.running():
            self._run("pg_ctl", "reload", "-D", self.data, "-s")

    def conf_later(self, **settings):
        """Writes settings, which take effect at the next reload or start."""
        lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(lines)

    def connect(self, dbname="postgres", autocommit=True, **options):
        """A psycopg connection through the socket as the superuser, unless `options` say otherwise."""
        options = {"host": str(self.host), "port": self.port, "user": "postgres"} | options
        return psycopg.connect(dbname=dbname, autocommit=autocommit, **options)

    def wait_for_connections(self, timeout=60.0):
        """Waits until a server that recovers from a crash accepts connections again."""

        def accepts():
            try:
                self.connect().close()
                return True
            except psycopg.OperationalError:
                return False

        wait_until(accepts, timeout)

    def psql(self, sql, dbname="postgres"):
        """Runs a script with psql, stopping at the first error; returns its unaligned output."""
        return self._client("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", dbname, input=sql)

    def dump(self, path, dbname="postgres"):
        self._client("pg_dump", "-Fc", "-f", path, "-d", dbname)

    def restore(self, path, dbname):
        """Restores a dump into a new database."""
        self._client("createdb", "-T", "template0", dbname)
        self._client("pg_restore", "--exit-on-error", "-d", dbname, path)

    def backup(self, *options, **settings):
        """A base backup of this cluster as a cluster of its own, not started."""
        copy = Cluster(self.bindir, **(self.settings | settings))
        try:
            self._run(
                "pg_basebackup", "-D", copy.data, *options, "-X", "stream", "-c", "fast",
                "-h", self.host, "-p", str(self.port), "-U", "postgres",
            )  # fmt: skip
            copy.conf(**settings)
            return copy
        except BaseException:
            copy.destroy()
            raise

    def standby(self, **settings):
        """A started standby that streams from this cluster."""
        standby = self.backup("-R", **settings)
        try:
            return standby.start()
        except BaseException:
            standby.destroy()
            raise

    def archive(self):
        """From its start on, this cluster archives its WAL; returns what restores it: settings for a copy."""
        archive = _temporary_directory(self.directory)
        self.conf(archive_mode="on", archive_command=f'cp "%p" "{archive}/%f"')
        return {"archive_mode": "off", "restore_command": f'cp "{archive}/%f" "%p"'}

    def wait_for_archive(self):
        """Waits until what this cluster has written so far is archived."""
        with self.connect() as connection:
            (segment,) = connection.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()
            archived = "SELECT COALESCE(last_archived_wal >= %s, false) FROM pg_stat_archiver"
            wait_until(lambda: connection.execute(archived, (segment,)).fetchone()[0], 120)

    def recover(self, **target):
        """Starts a backup, not yet started, and recovers it up to the target, where it is promoted."""
        self.conf(recovery_target_action="promote", **target)
        signal_file = self.data / "recovery.signal"
        signal_file.touch()
        if os.geteuid() == 0:
            shutil.chown(signal_file, SERVER_USER)
        self.start()
        with self.connect() as connection:
            wait_until(lambda: connection.execute("SELECT NOT pg_is_in_recovery()").fetchone()[0], 120)
        return self

    def wait_for_replay(self, standby, timeout=30.0):
        """Waits until `standby` has replayed what this cluster has written so far."""
        with self.connect() as primary, standby.connect() as replica:
            # A record of our own, flushed by its commit. What pg_current_wal_insert_lsn() gives may lie behind the header of a page
            # on which there is no record yet: a standby of an idle server would not come to it.
            (position,) = primary.execute("SELECT pg_logical_emit_message(true, 'lockstep', 'replayed')").fetchone()
            wait_until(
                lambda: replica.execute("SELECT pg_last_wal_replay_lsn() >= %s", (position,)).fetchone()[0], timeout
            )

    def promote(self):
        self._run("pg_ctl", "promote", "-D", self.data, "-w", "-s")

    def _run(self, program, *arguments, env=None):
        _as_server_user(self.bindir / program, *arguments, env=env)

    def _client(self, program, *arguments, input=None):
        environment = os.environ | {"PGHOST": str(self.host), "PGPORT": str(self.port), "PGUSER": "postgres"}
        result = subprocess.run(
            [self.bindir / program, *arguments], env=environment, input=input, capture_output=True, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(f"{program}: {result.stderr}")
        return result.stdout

    def _forget(self):
        """Removes the lock files of a server that was killed. Where nothing reaps orphans, its pid stays taken."""
        for lock_file in [self.data / "postmaster.pid", *self.host.glob(".s.PGSQL.*")]:
            lock_file.unlink(missing_ok=True)

    def _postmaster(self):
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        return pid if _alive(pid) else None


def _as_server_user(program, *arguments, env=None):
    command = [program, *arguments]
    if os.geteuid() == 0:
        command = ["runuser", "-u", SERVER_USER, "--", *command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "RUST_"))}
    # A file, not a pipe: a server keeps it open.
    with tempfile.TemporaryFile("w+") as output:
        status = subprocess.run(
            command, cwd="/", env=environment | (env or {}), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ).returncode
        output.seek(0)
        if status != 0:
            raise subprocess.CalledProcessError(status, command, output.read())


def _temporary_directory(parent):
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="lockstep.", dir=parent))
    if os.geteuid() == 0:
        shutil.chown(directory, SERVER_USER)
    return directory


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stat(pid):
    """The state and the parent of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1])


def _alive(pid):
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(parent):
    children = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and _stat(entry)[1] == parent:
                children.append(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return children
