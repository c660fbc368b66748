"""Older versions of the extension, to upgrade from.

As long as nothing is released, there is one that never was: the current SQL without some of every kind of object, and the upgrade
script that adds these. Releases are in sql/released.

    python tests/upgrade/previous.py EXTENSION_DIRECTORY VERSION

leaves an installation in which CREATE EXTENSION makes that version and upgrades it: PostgreSQL does so by itself where there is no
install script of the version that it is to make.
"""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
RELEASED = PROJECT / "sql" / "released"
NEVER_RELEASED = "0.0.0"


def current_version(directory):
    return re.search(r"^default_version = '(.+)'", (directory / "lockstep.control").read_text(), re.M)[1]


def fresh_script(directory):
    """The install script of the current version, also where `upgrade_always` has put it aside."""
    script = directory / f"lockstep--{current_version(directory)}.sql"
    aside = script.with_suffix(".aside")
    return (script if script.exists() else aside).read_text()


def releases():
    """The versions that are released, by name."""
    return {path.stem.removeprefix("lockstep--"): path for path in sorted(RELEASED.glob("lockstep--*.sql"))}


class Older:
    """Takes away from the current script, and keeps what brings it back."""

    def __init__(self, script):
        self.script = script
        self.upgrade = []

    def replace(self, old, new):
        assert self.script.count(old) == 1, f"{self.script.count(old)} times in the current script: {old}"
        self.script = self.script.replace(old, new)

    def without(self, pattern):
        """Takes the one statement away that begins so, and gives it back in the upgrade."""
        found = re.findall(rf"^{pattern}.*?;$", self.script, re.M | re.S)
        assert len(found) == 1, f"{len(found)} statements begin with {pattern}"
        self.replace(found[0], "")
        self.upgrade.append(found[0])
        return found[0]

    def changed(self, old, new, statement):
        """Puts `new` in the place of `old`; the upgrade's statement changes it back."""
        self.replace(old, new)
        self.upgrade.append(statement)


def never_released(script):
    """The install script of the version that never was, and the statements of the upgrade to the current one."""
    older = Older(script)
    found = re.search(r"CREATE FUNCTION lockstep\.schema_version\(\).*?AS '(SELECT \d+)';", older.script, re.S)
    older.changed(found[0], found[0].replace(found[1], "SELECT 0"), found[0].replace("CREATE ", "CREATE OR REPLACE "))
    # A column with what depends on it, at its table's end: elsewhere a column cannot be added.
    older.without(r"CREATE VIEW lockstep\.lease_status")
    older.changed(
        "    stolen_from text,\n    steal_reason text,\n", "    stolen_from text,\n",
        "ALTER TABLE lockstep.leases ADD COLUMN steal_reason text;",
    )  # fmt: skip
    older.upgrade[-2:] = reversed(older.upgrade[-2:])
    older.without(r"COMMENT ON VIEW lockstep\.lease_status")
    older.upgrade.append("REVOKE ALL ON lockstep.lease_status FROM PUBLIC;")
    # A table, with its index, comments and place in dumps.
    for pattern in (
        r"CREATE TABLE lockstep\.unique_keys",
        r"CREATE UNIQUE INDEX unique_keys_scope_value_key",
        r"SELECT pg_catalog\.pg_extension_config_dump\('lockstep\.unique_keys'",
        r"COMMENT ON TABLE lockstep\.unique_keys",
    ):
        older.without(pattern)
    for column in re.findall(r"^COMMENT ON COLUMN (lockstep\.unique_keys\.\w+)", older.script, re.M):
        older.without(rf"COMMENT ON COLUMN {column}\b")
    older.upgrade.append("REVOKE ALL ON lockstep.unique_keys FROM PUBLIC;")
    # A sequence.
    older.without(r"CREATE SEQUENCE lockstep\.job_id")
    older.without(r"SELECT pg_catalog\.pg_extension_config_dump\('lockstep\.job_id'")
    older.without(r"COMMENT ON SEQUENCE lockstep\.job_id")
    older.upgrade.append("REVOKE ALL ON SEQUENCE lockstep.job_id FROM PUBLIC;")
    # A function, a procedure, and a function that was another.
    older.without(r'CREATE  FUNCTION "job_purge"')
    older.without(r"COMMENT ON FUNCTION lockstep\.job_purge")
    older.upgrade.append("REVOKE ALL ON FUNCTION lockstep.job_purge FROM PUBLIC;")
    older.without(r"CREATE PROCEDURE lockstep\.lease_take")
    older.without(r"COMMENT ON PROCEDURE lockstep\.lease_take")
    older.upgrade.append("REVOKE ALL ON PROCEDURE lockstep.lease_take FROM PUBLIC;")
    older.without(r"ALTER FUNCTION lockstep\.lease_locks\(\)")
    # An index, a constraint, a default, a comment, a setting of a table.
    older.without(r"CREATE INDEX dead_jobs_queue_idx")
    check = "CONSTRAINT queues_tenant_check CHECK (NOT every_tenant OR tenant = '')"
    older.changed(f",\n    {check}", "", f"ALTER TABLE lockstep.queues ADD {check};")
    column = "missing_at_source boolean NOT NULL"
    older.changed(f"{column} DEFAULT false", column, "ALTER TABLE lockstep.replicas ALTER missing_at_source SET DEFAULT false;")
    older.without(r"COMMENT ON COLUMN lockstep\.jobs\.lane")
    older.changed(
        "PRIMARY KEY (queue, tenant, part)\n) WITH (fillfactor = 50)", "PRIMARY KEY (queue, tenant, part)\n)",
        "ALTER TABLE lockstep.queue_statistics SET (fillfactor = 50);",
    )  # fmt: skip
    # What is new is not for whom the default privileges would have it.
    revocations = re.search(r"^DO \$\$\nDECLARE\n    revocation text;.*?^\$\$;$", older.script, re.M | re.S)
    older.upgrade.append(revocations[0])
    return older.script, older.upgrade


def add_never_released(directory, target=None):
    """Puts the version that never was beside the current one, with its way to the target."""
    script, upgrade = never_released(fresh_script(directory))
    (directory / f"lockstep--{NEVER_RELEASED}.sql").write_text(script)
    target = target or current_version(directory)
    (directory / f"lockstep--{NEVER_RELEASED}--{target}.sql").write_text("\n\n".join(upgrade) + "\n")


def upgrade_always(directory, version):
    if version == NEVER_RELEASED:
        add_never_released(directory)
    else:
        (directory / f"lockstep--{version}.sql").write_text(releases()[version].read_text())
    script = directory / f"lockstep--{current_version(directory)}.sql"
    script.rename(script.with_suffix(".aside"))


if __name__ == "__main__":
    upgrade_always(Path(sys.argv[1]), sys.argv[2])
