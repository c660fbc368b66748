"""Gets the peers from the public registries, pinned by lock files, into places of their own: nothing of the system is touched."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
STATE = Path(os.environ.get("LOCKSTEP_STATE", HERE.parent.parent / ".state"))
NPM = Path(sys.executable).with_name("npm")


def run(command, environment=None):
    result = subprocess.run([str(part) for part in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} {command[1]}: {result.stdout[-2000:]}")


@cache
def node():
    """What package-lock.json lists, with its hashes; returns the directory."""
    modules, lock = HERE / "node_modules", HERE / "package-lock.json"
    stamp = modules / ".installed"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        environment = os.environ | {"PATH": f"{NPM.parent}:{os.environ['PATH']}"}
        run([NPM, "ci", "--prefix", HERE, "--no-audit", "--no-fund", "--ignore-scripts", "--silent"], environment)
        stamp.write_bytes(lock.read_bytes())
    return modules


@cache
def python():
    """What requirements.txt lists, with its hashes; returns the directory."""
    place, wanted = STATE / "peers" / "python", HERE / "requirements.txt"
    stamp = place / "requirements.txt"
    if not stamp.exists() or stamp.read_bytes() != wanted.read_bytes():
        run([sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", place, "-r", wanted])
        stamp.write_bytes(wanted.read_bytes())
    return place


def before(peer, server, database):
    """What a peer's own installer does in a database that was just made."""
    if peer.name == "message-db":
        with tempfile.TemporaryDirectory() as copy:
            scripts = Path(shutil.copytree(node() / "@eventide" / "message-db" / "database", Path(copy) / "database"))
            # Of pgcrypto it uses gen_random_uuid alone, which is PostgreSQL's own since 13; the embedded server is without contrib modules.
            (scripts / "extensions" / "pgcrypto.sql").write_text("")
            environment = server.environment(database) | {"DATABASE_NAME": database, "CREATE_DATABASE": "off"}
            # On Debian psql is a wrapper that would choose another server's programs.
            environment["PATH"] = f"{os.environ.get('LOCKSTEP_BINDIR', '')}:{environment['PATH']}"
            run(["bash", scripts / "install.sh"], environment)


def after(peer, server, database):
    """PgQ's ticker, pgqd, in a database with its schema, until the run is over."""
    if peer.name == "PgQ":
        directory = tempfile.TemporaryDirectory(prefix="lockstep-pgqd.")
        config = Path(directory.name) / "pgqd.ini"
        config.write_text(
            f"[pgqd]\nlogfile = {directory.name}/log\npidfile = {directory.name}/pid\nbase_connstr = host={server.host} port={server.port} user=postgres\n"
            f"initial_database = postgres\ndatabase_list = {database}\nticker_period = 0.1\ncheck_period = 1\n"
        )
        daemon = subprocess.Popen([os.environ["LOCKSTEP_BENCH_PGQD"], "-q", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(lambda: (daemon.kill(), daemon.wait(), directory.cleanup()))
