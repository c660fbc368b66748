"""A PgBouncer in front of a cluster, as Debian packages it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psycopg
from server import SERVER_USER, _free_port, wait_until

PROGRAM = shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")


class Pool:
    """What is known of a running one, and a way through it."""

    host = "127.0.0.1"

    def __init__(self, port):
        self.port = port

    def connect(self, dbname, **options):
        options = {"host": self.host, "port": self.port, "user": "postgres", "prepare_threshold": None} | options
        return psycopg.connect(dbname=dbname, autocommit=True, **options)

    def accepts(self):
        try:
            self.connect("postgres").close()
            return True
        except psycopg.OperationalError:
            return False


@contextlib.contextmanager
def pgbouncer(cluster, **settings):
    """Starts one in transaction mode; gives the `Pool`."""
    assert PROGRAM, "pgbouncer is not installed: make setup"
    directory = Path(tempfile.mkdtemp(prefix="lockstep.", dir="/tmp"))
    pool = Pool(_free_port())
    settings = {
        "listen_addr": pool.host,
        "listen_port": pool.port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "logfile": directory / "log",
        "pidfile": directory / "pid",
    } | settings
    lines = [f"[databases]\n* = host={cluster.host} port={cluster.port} user=postgres\n[pgbouncer]"]
    (directory / "ini").write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in settings.items()), ""]))
    command = [PROGRAM, "-q", directory / "ini"]
    if os.geteuid() == 0:
        shutil.chown(directory, SERVER_USER)
        command = ["runuser", "-u", SERVER_USER, "--", *command]
    process = subprocess.Popen(command, cwd="/")

    try:
        wait_until(pool.accepts)
        yield pool
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((directory / "pid").read_text()), signal.SIGTERM)  # runuser would take its time to pass it on
        process.wait(20)
        shutil.rmtree(directory, ignore_errors=True)
