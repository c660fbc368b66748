"""A logical dump of an older major version of PostgreSQL, restored into this one, in the middle of what was going on."""

import pytest
from server import Cluster
from sessions import log, push
from workers import SETTINGS


@pytest.fixture
def older(older_bindir):
    """A started cluster of an older major version, with the library preloaded."""
    made = Cluster(older_bindir, **SETTINGS)
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
