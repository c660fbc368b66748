"""A PgBouncer in front of a cluster, as Debian packages it."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
from server import SERVER_USER, _free_port, wait_until

PROGRAM = shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def pgbouncer(cluster, **settings):
    """Starts one in transaction mode; gives a function that connects through it to a database."""
    assert PROGRAM, "pgbouncer is not installed: make setup"
    directory = Path(tempfile.mkdtemp(prefix="lockstep.", dir="/tmp"))
    port = _free_port()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
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

    def connect(dbname, **options):
        options = {"host": "127.0.0.1", "port": port, "user": "postgres", "prepare_threshold": None} | options
        return psycopg.connect(dbname=dbname, autocommit=True, **options)

    def accepts():
        try:
            connect("postgres").close()
            return True
        except psycopg.OperationalError:
            return False

    try:
        wait_until(accepts)
        yield connect
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory, ignore_errors=True)
