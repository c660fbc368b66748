"""A logical dump of an older major version of PostgreSQL, restored into this one, in the middle of what was going on."""

import subprocess
from pathlib import Path

import pytest
from server import BINDIR, Cluster
from sessions import log, push
from workers import SETTINGS

TOOL = Path(__file__).parents[2] / "tools" / "older-server"


def major(bindir):
    shown = subprocess.run([bindir / "pg_config", "--version"], capture_output=True, text=True, check=True).stdout
    return int(shown.split()[1].split(".")[0])


@pytest.fixture
def older():
    """A started cluster of an older major version, with the library preloaded."""
    built = subprocess.run([TOOL], capture_output=True, text=True)
    if built.returncode != 0:
        pytest.fail(f"there is no older server:\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
    bindir = Path(built.stdout.splitlines()[-1])
    if major(bindir) >= major(BINDIR):
        pytest.skip(f"PostgreSQL {major(BINDIR)} is the oldest at hand")
    print(f"from PostgreSQL {major(bindir)} to {major(BINDIR)}")
    made = Cluster(bindir, **SETTINGS)
    try:
        yield made.start()
    finally:
        made.destroy()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_was_acknowledged_goes_on_in_another_major_version(older, load, loaded, tmp_path):
    running = load.Load(older)
    running.set_up()
    with running.started():
        running.progress()
    session = older.connect("load")
    claims = load.Claims(session, "held")
    behind = [push(session) for _ in range(50)]
    older.dump(tmp_path / "dump", "load")
    before = log(session)
    older.stop()

    new = loaded()
    load.Load.make_owner(new)
    new.restore(tmp_path / "dump", "load")
    session = new.connect("load")
    assert log(session) == before
    assert set(behind) <= set(before)
    claims.are_held(session)
    new.conf(**{"lockstep.databases": "load"})
    running.move(new)
    with running.started():
        running.progress()
    running.check()
    tokens = session.execute("SELECT max(token) FROM oracle.written").fetchone()[0]
    assert tokens > max(claims.tokens())
