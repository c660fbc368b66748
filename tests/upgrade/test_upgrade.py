"""ALTER EXTENSION lockstep UPDATE: what it makes is what CREATE EXTENSION makes."""

import re

import previous
import psycopg
import pytest
from catalog import describe, differences
from server import BINDIR
from sessions import call, claim_and_advance, push

FRESH = "CREATE EXTENSION lockstep VERSION 'fresh'"


@pytest.fixture
def empty(db):
    """A session in a database without the extension."""
    session = db.connect()
    session.execute("DROP EXTENSION lockstep")
    return session


def installed(session, *statements):
    """The catalogs after these statements, which are rolled back."""
    with session.transaction(force_rollback=True):
        for statement in statements:
            session.execute(statement)
        return describe(session)


def test_upgraded_is_the_same_as_fresh(empty, older):
    fresh = installed(empty, FRESH)
    assert len(fresh) > 400
    upgraded = installed(empty, f"CREATE EXTENSION lockstep VERSION '{older}'", "ALTER EXTENSION lockstep UPDATE")
    assert differences(upgraded, fresh) == []


def test_each_statement_of_an_upgrade_makes_a_difference_that_the_comparison_sees(empty, scripts):
    script, upgrade = previous.never_released(scripts.fresh)
    surroundings = ["SELECT", "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO pg_monitor"]
    fresh = {surrounding: installed(empty, surrounding, FRESH) for surrounding in surroundings}
    unseen = []
    for left_out, statement in enumerate(upgrade):
        mutant = f"mutant{left_out}"
        rest = "\n".join(upgrade[:left_out] + upgrade[left_out + 1 :])
        scripts.add(f"{previous.NEVER_RELEASED}--{mutant}", rest)
        steps = f"CREATE EXTENSION lockstep VERSION '{previous.NEVER_RELEASED}'", f"ALTER EXTENSION lockstep UPDATE TO '{mutant}'"
        try:
            if not any(differences(installed(empty, surrounding, *steps), fresh[surrounding]) for surrounding in surroundings):
                unseen.append(statement)
        except psycopg.Error:
            pass  # what comes after it in the script needs it
    assert unseen == []


def test_a_library_symbol_means_the_same_in_every_version(empty, older):
    """The library reads as many arguments as its function has, whatever the SQL says: one that changes needs a new name in Rust."""
    query = """
        SELECT p.prosrc, p.prokind, p.pronargs, oidvectortypes(p.proargtypes), p.proallargtypes::regtype[], p.proargmodes, p.proretset,
               p.prorettype::regtype
        FROM pg_proc AS p WHERE p.pronamespace = 'lockstep'::regnamespace AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'c')
    """
    seen = []
    for version in ("fresh", older):
        with empty.transaction(force_rollback=True):
            empty.execute(f"CREATE EXTENSION lockstep VERSION '{version}'")
            seen.append({row[0]: row[1:] for row in empty.execute(query).fetchall()})
    current, before = seen
    assert len(before) > 50
    assert {name: declared for name, declared in before.items() if current.get(name, declared) != declared} == {}


def test_data_is_kept_and_goes_on_through_an_upgrade_and_a_dump(db, empty, tmp_path):
    version = previous.NEVER_RELEASED
    empty.execute(f"CREATE EXTENSION lockstep VERSION '{version}'")
    empty.execute(
        """
        INSERT INTO lockstep.events (tenant, position, aggregate_type, aggregate_id, sequence, event_type, created_at)
        VALUES ('', 1, 'order', 'one', 1, 'added', now()), ('', 2, 'order', 'one', 2, 'added', now());
        SELECT setval('lockstep.ticket', 2);
        INSERT INTO lockstep.projections (name, owner, batch_size, max_failures, retry_after, start_after, created_at)
        VALUES ('p', current_user, 10, 5, '1 second', 0, now());
        INSERT INTO lockstep.leases (name, holder, token, acquired_at, renewed_at, expires_at, ttl, transitions, lock_delay)
        VALUES ('l', 'h', 7, now(), now(), now() + interval '1 hour', '1 hour', 1, '0');
        SELECT setval('lockstep.token', 7);
        """
    )
    with pytest.raises(psycopg.Error, match="version 0") as refused:
        push(empty)
    assert refused.value.diag.sqlstate == "55000"
    empty.execute("ALTER EXTENSION lockstep UPDATE")
    assert push(empty, "one", expected_sequence=2) == 3
    assert claim_and_advance(empty) == [1, 2, 3]
    assert call(empty, "lease_renew", name="l", token=7)
    assert call(empty, "job_enqueue", queue="q", key="k", kind="a")[0] == (1, True)
    dump, restored = tmp_path / "dump", f"{db.name}_restored"
    db.cluster.dump(dump, db.name)
    db.cluster.restore(dump, restored)
    with db.cluster.connect(restored) as session:
        assert push(session, "one", expected_sequence=3) == 4
        assert claim_and_advance(session) == [4]
        assert call(session, "job_enqueue", queue="q", key="other", kind="a")[0] == (2, True)
        session.execute("SELECT lockstep.job_purge('0')")
        assert differences(describe(session), describe(empty)) == []
    with db.cluster.connect() as admin:
        admin.execute(f"DROP DATABASE {restored} WITH (FORCE)")


def test_a_failed_upgrade_leaves_the_older_version(empty, scripts):
    version = previous.NEVER_RELEASED
    empty.execute(f"CREATE EXTENSION lockstep VERSION '{version}'")
    before = describe(empty)
    scripts.add(f"{version}--broken", "\n".join([*previous.never_released(scripts.fresh)[1], "SELECT 1 / 0;"]))
    with pytest.raises(psycopg.errors.DivisionByZero):
        empty.execute("ALTER EXTENSION lockstep UPDATE TO 'broken'")
    assert differences(describe(empty), before) == []
    empty.execute("BEGIN; ALTER EXTENSION lockstep UPDATE; SELECT lockstep.push_event('order', 'one', 'added'); ROLLBACK")
    assert differences(describe(empty), before) == []
    with pytest.raises(psycopg.Error, match="version 0"):
        push(empty)


def test_the_current_version_is_not_another_than_the_release_of_that_name(scripts):
    """What is released does not change: after a release the next change begins a new version."""
    frozen = previous.releases().get(scripts.current)
    if frozen is None:
        pytest.skip(f"{scripts.current} is not released")
    assert statements(scripts.fresh) == statements(frozen.read_text())


def statements(script):
    """Without comments, in which the generated scripts say where in the sources a statement is from."""
    return re.sub(r"/\*.*?\*/|^\s*--.*?$|\s+", " ", script, flags=re.S | re.M).split()


def test_an_installation_can_be_made_that_always_upgrades(tmp_path, scripts):
    """What tools/test --upgraded does to the server's directory."""
    assert (BINDIR / "pg_config").exists()
    (tmp_path / "lockstep.control").write_text((scripts.directory / "lockstep.control").read_text())
    (tmp_path / f"lockstep--{scripts.current}.sql").write_text(scripts.fresh)
    previous.upgrade_always(tmp_path, previous.NEVER_RELEASED)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"lockstep--{previous.NEVER_RELEASED}--{scripts.current}.sql",
        f"lockstep--{previous.NEVER_RELEASED}.sql",
        f"lockstep--{scripts.current}.aside",
        "lockstep.control",
    ]
    assert previous.fresh_script(tmp_path) == scripts.fresh
