"""The disk is full in the middle of everything: what is refused is refused, and all goes on once there is room.

On a file system of its own where this user may mount one; else the server's processes may not make a file longer than it is.
"""

import os
import pwd
import shutil
import subprocess

import psycopg
import pytest
from psycopg.types.json import Jsonb
from server import SERVER_USER, wait_until
from workers import Log

PREFIX = {"log_line_prefix": "%e "}


class Mounted:
    """The data directory on a file system in memory, filled by a file that is deleted to make room."""

    name = "tmpfs"
    message, codes = "No space left on device", {"53100"}

    def __init__(self, cluster):
        self.cluster = cluster
        self.directory = self.mount(cluster.data, 192)
        cluster.create()
        cluster.conf(min_wal_size="32MB", max_wal_size="64MB", **PREFIX)

    def mount(self, directory, megabytes):
        user = pwd.getpwnam(SERVER_USER)
        options = f"size={megabytes}m,mode=0700,uid={user.pw_uid},gid={user.pw_gid}"
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "lockstep", directory], check=True, capture_output=True)
        return directory

    def fill(self, load):
        with open(self.directory / "ballast", "wb", buffering=0) as ballast:
            size = 1 << 20
            while size >= 4096:
                try:
                    ballast.write(bytes(size))
                except OSError:
                    size //= 2

    def make_room(self):
        (self.directory / "ballast").unlink()

    def remove(self):
        self.cluster.stop("immediate")
        subprocess.run(["umount", "--lazy", self.directory], check=True)


class MountedWal(Mounted):
    """The same with the WAL alone. The server cannot go on without: it ends, and perhaps tries again."""

    name = "tmpfs for pg_wal"

    def __init__(self, cluster):
        self.cluster = cluster
        self.directory = self.mount(cluster.directory / "wal", 64)
        cluster.create("--wal-segsize=1", f"--waldir={self.directory}")
        cluster.conf(min_wal_size="2MB", max_wal_size="16MB", **PREFIX)


class Limited:
    """`ulimit -f`, put on the processes of a running server and taken off again."""

    name = "ulimit -f"
    # PostgreSQL has no SQLSTATE for it.
    message, codes = "File too large", {"53100", "XX000"}

    def __init__(self, cluster):
        self.cluster = cluster
        cluster.create("--wal-segsize=1")
        cluster.conf(min_wal_size="2MB", max_wal_size="16MB", **PREFIX)

    def fill(self, load):
        with self.cluster.connect(load.where.dbname) as connection:
            # The log's file becomes longer than any other, so that it is pushes that meet the limit.
            events = [
                {"aggregate_type": "bulk", "aggregate_id": "1", "event_type": "added", "payload": os.urandom(700).hex()}
                for _ in range(800)
            ]
            connection.execute("SELECT FROM lockstep.push_events(%s)", (Jsonb(events),))
            (size,) = connection.execute("SELECT pg_relation_size('lockstep.events')").fetchone()
        assert size > 1 << 20
        self.cluster.limit_file_size(size + (64 << 10))

    def make_room(self):
        self.cluster.limit_file_size("unlimited")

    def remove(self):
        self.cluster.stop("immediate")


def may_mount(directory):
    if shutil.which("mount") is None:
        return False
    directory.mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "lockstep", directory], capture_output=True)
    if tried.returncode == 0:
        subprocess.run(["umount", "--lazy", directory], check=True)
    return tried.returncode == 0


@pytest.fixture
def make_disk(loaded, tmp_path):
    """Makes a disk that can be filled, with a server on it: of the wanted kind, or as `ulimit` where nothing may be mounted."""
    made = []

    def make(kind):
        if not may_mount(tmp_path / "mount"):
            kind = Limited
        print(f"the disk is full by: {kind.name}")
        made.append(kind(loaded(start=False)))
        made[0].cluster.start()
        return made[0]

    try:
        yield make
    finally:
        for disk in made:
            disk.remove()


def refused_pushes(log, disk):
    return [line for code in disk.codes for line in log.lines("STATEMENT", code, "lockstep.push_event")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [Mounted, pytest.param(Limited, marks=pytest.mark.slow)])
def test_a_full_disk_refuses_pushes_and_loses_nothing(kind, make_disk, load):
    disk = make_disk(kind)
    log = Log(disk.cluster)
    running = load.Load(disk.cluster)
    running.where.passing |= disk.codes
    running.set_up()
    with running.started():
        running.progress()
        disk.fill(running)
        wait_until(lambda: len(log.lines("ERROR", disk.message)) >= 20 and refused_pushes(log, disk), 120)
        disk.make_room()
        wait_until(lambda: is_up(disk.cluster), 120)  # there may have been no room for WAL either
        running.progress()
    running.check()
    assert all(disk.message in line for line in log.lines("XX000", "ERROR"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_ended_for_want_of_room_for_wal_goes_on_with_what_was_acknowledged(make_disk, load):
    disk = make_disk(MountedWal)
    if not isinstance(disk, MountedWal):
        pytest.skip("no file system may be mounted here")
    log = Log(disk.cluster)
    running = load.Load(disk.cluster)
    running.where.passing |= disk.codes
    running.set_up()
    with running.started():
        for n in range(3):
            running.progress()
            disk.fill(running)
            wait_until(lambda n=n: len(log.lines("PANIC", disk.message)) > n, 120)
            disk.make_room()
            wait_until(lambda: is_up(disk.cluster), 120)
    running.check()


def is_up(cluster):
    """Whether the server is back. One that has given up for want of room is started again."""
    try:
        cluster.connect().close()
    except psycopg.OperationalError:
        if not cluster.running():
            cluster.start()
        return False
    return True
