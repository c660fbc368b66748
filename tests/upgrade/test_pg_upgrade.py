"""pg_upgrade to a new major version of PostgreSQL, with data, in the middle of what was going on."""

import os
import subprocess

import pytest
from catalog import describe, differences
from server import BINDIR, SERVER_USER, Cluster
from sessions import call, claim_and_advance, push, push_many, raises
from workers import SETTINGS, Application

PUBLIC = """
    SELECT proname FROM pg_proc, aclexplode(COALESCE(proacl, acldefault('f', proowner))) AS a
    WHERE pronamespace = 'lockstep'::regnamespace AND a.grantee = 0
    UNION ALL SELECT relname FROM pg_class, aclexplode(relacl) AS a WHERE relnamespace = 'lockstep'::regnamespace AND a.grantee = 0
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def old(older_bindir):
    """A started cluster of the oldest major version that can be had, with the library preloaded."""
    made = Cluster(older_bindir, **SETTINGS)
    try:
        # Checksums are the default from 18 on, and both clusters must be alike.
        yield made.create("--data-checksums").start()
    finally:
        made.destroy()


def pg_upgrade(old, new, *options):
    """Runs pg_upgrade between two clusters that are stopped; returns its output."""
    command = [
        BINDIR / "pg_upgrade", "--old-bindir", old.bindir, "--new-bindir", new.bindir, "--old-datadir", old.data, "--new-datadir", new.data,
        "--username", "postgres", "--socketdir", new.host, "--old-port", str(old.port), "--new-port", str(new.port), *options,
    ]  # fmt: skip
    if os.geteuid() == 0:
        command = ["runuser", "-u", SERVER_USER, "--", *command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "RUST_"))}
    result = subprocess.run(command, cwd=new.directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = "".join(path.read_text(errors="replace")[-2000:] for path in sorted(new.data.rglob("pg_upgrade_output.d/**/*.log")))
    assert result.returncode == 0, result.stdout + result.stderr + said
    return result.stdout


def forget_marks(cluster):
    """Debian's 15.20 marks every column that it creates with an option, pg_attver, which servers that were released before it refuse.

    Any table stops pg_upgrade to one of these, so the marks are taken away, as none of these servers would have made them.
    """
    for dbname in ("app", "postgres", "template1"):
        with cluster.connect(dbname) as session:
            session.execute("UPDATE pg_attribute SET attoptions = NULL WHERE attoptions::text LIKE '{pg_attver=%}'")


def test_everything_goes_on_after_pg_upgrade(old, cluster, new_database):
    app = Application(new_database(old, "app"))
    app.project()
    app.turn_on()
    admin = app.admin
    applied = [app.push(), *push_many(admin, 5)]
    app.wait_for(applied)
    call(admin, "projection_create", name="client")
    assert claim_and_advance(admin, "client", max_events=2) == applied[:2]
    push(admin, "one", expected_sequence=0)
    app.turn_off()
    behind = push(admin, "one", expected_sequence=1)
    lease = call(admin, "lease_acquire", name="l", holder="h", ttl="1 day")[0]
    resource = call(admin, "resource_create", resource="r", replicas=["a", "b"])[0][0]
    generation = call(admin, "generation_increment", resource="r", replicas=["a"])[0][0]
    sync = call(admin, "replica_sync_begin", resource="r", target="b", holder="w", source="a", ttl="1 day")[0]
    for n in range(3):
        call(admin, "job_enqueue", queue="q", key=str(n), kind="a")
    job = call(admin, "job_claim", queue="q", holder="w", ttl="1 day")[0]
    token = admin.execute("SELECT last_value FROM lockstep.token").fetchone()[0]
    owner = app.owner
    old.conf(**{"lockstep.databases": "app"})  # its processes are to stay away from pg_upgrade
    admin.close()
    forget_marks(old)
    old.stop()

    new = cluster(start=False, **SETTINGS)
    new.create("--data-checksums")
    assert "Clusters are compatible" in pg_upgrade(old, new, "--check")
    pg_upgrade(old, new)
    new.conf_later(**{"lockstep.databases": ""})
    new.start()
    session = new.connect("app")
    fresh = new_database(new, "fresh").connect()
    # pg_dump leaves out what the owner may do anyway, and takes along what was granted.
    assert differences(describe(session, privileges=False), describe(fresh, privileges=False)) == []
    assert session.execute(PUBLIC).fetchall() == []

    log = [position for (position,) in session.execute("SELECT position FROM lockstep.events ORDER BY position").fetchall()]
    assert log[: len(applied)] == applied and log[-1] == behind
    with raises("LS001"):
        push(session, "one", expected_sequence=1)
    after = push(session, "one", expected_sequence=2)
    assert after > behind
    assert claim_and_advance(session, "client") == [*log[2:], after]

    new.conf(**{"lockstep.databases": "app"})
    app.admin, app.cluster = session, new
    app.wait_for([*log, after], timeout=60)
    new.conf(**{"lockstep.databases": ""})
    assert session.execute("SELECT DISTINCT who, session FROM public.applied").fetchall() == [(owner, owner)]

    assert lease[0] and call(session, "lease_renew", name="l", token=lease[1], ttl="1 day")
    assert not call(session, "lease_acquire", name="l", holder="other")[0][0]
    assert call(session, "replica_sync_finish", resource="r", target="b", token=sync[1]) == [("current",)]
    assert call(session, "generation_current", resource="r") == [("a",), ("b",)]
    assert call(session, "generation_increment", resource="r") == [(generation + 1,)]
    assert call(session, "job_complete", job_id=job[0], token=job[9]) == [("completed",)]
    assert call(session, "job_claim", queue="q", holder="w")[0][9] > token
    assert call(session, "job_enqueue", queue="q", key="new", kind="a") == [(4, True)]
    assert call(session, "resource_create", resource="s")[0][0] > max(token, resource)
