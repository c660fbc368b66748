"""tools/release: released scripts are kept, and their edits refused."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
RELEASE = PROJECT / "tools" / "release"
VERSION = re.search(r'^version = "(.+)"', (PROJECT / "Cargo.toml").read_text(), re.M)[1]


class Tree:
    """A directory as sql/, after a release of 0.0.1 and with the upgrade from it to the current version."""

    def __init__(self, sql):
        self.sql = sql
        (sql / "released").mkdir()
        shutil.copy(PROJECT / "sql" / "released" / "SHA256SUMS", sql / "released")
        self.write("released/lockstep--0.0.1.sql", "CREATE TABLE a ();")
        self.write("lockstep--0.0.0--0.0.1.sql", "CREATE TABLE a ();")
        self.list("released/lockstep--0.0.1.sql", "lockstep--0.0.0--0.0.1.sql")
        self.write(f"lockstep--0.0.1--{VERSION}.sql", "CREATE TABLE b ();")

    def write(self, name, text):
        (self.sql / name).write_text(text)

    def list(self, *names):
        sums = subprocess.run(["sha256sum", *names], cwd=self.sql, capture_output=True, text=True, check=True).stdout
        with open(self.sql / "released" / "SHA256SUMS", "a") as file:
            file.write(sums)

    def verify(self):
        environment = os.environ | {"LOCKSTEP_SQL": str(self.sql)}
        result = subprocess.run([RELEASE, "verify"], env=environment, capture_output=True, text=True)
        assert (result.returncode == 0) == (result.stderr == "")
        return result.stderr


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_the_released_scripts_of_this_repository_are_as_they_were():
    assert subprocess.run([RELEASE, "verify"], capture_output=True, text=True).stderr == ""


def test_scripts_that_are_as_they_were_pass(tree):
    assert tree.verify() == ""


@pytest.mark.parametrize("name", ["released/lockstep--0.0.1.sql", "lockstep--0.0.0--0.0.1.sql"])
def test_an_edited_script_is_refused(tree, name):
    tree.write(name, "CREATE TABLE a (); ")
    assert name in tree.verify()


@pytest.mark.parametrize("name", ["released/lockstep--0.0.1.sql", "lockstep--0.0.0--0.0.1.sql"])
def test_a_script_that_is_gone_is_refused(tree, name):
    (tree.sql / name).unlink()
    assert name in tree.verify()


@pytest.mark.parametrize("name", ["released/lockstep--0.0.2.sql", "lockstep--0.0.0.1--0.0.1.sql"])
def test_a_script_that_was_added_to_a_release_is_refused(tree, name):
    tree.write(name, "CREATE TABLE a ();")
    assert f"{name} is not in" in tree.verify()


def test_a_release_without_a_way_to_the_current_version_is_refused(tree):
    (tree.sql / f"lockstep--0.0.1--{VERSION}.sql").unlink()
    assert "nobody could upgrade from 0.0.1" in tree.verify()


def test_the_upgrade_to_the_current_version_may_change(tree):
    tree.write(f"lockstep--0.0.1--{VERSION}.sql", "CREATE TABLE c ();")
    assert tree.verify() == ""


def test_freezing_keeps_the_script_and_the_upgrades_to_it(tmp_path):
    """In a copy of what it looks at, with a CHANGELOG that says that the version is released."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/release", "tools/env", "Cargo.toml"):
        shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / "sql").mkdir()
    tree = Tree(tmp_path / "sql")
    generated = tmp_path / "generated.sql"
    generated.write_text("-- src/a.rs:1\nCREATE TABLE a ();\n")
    freeze = [tmp_path / "tools" / "release", "freeze", generated]

    def run():
        return subprocess.run(freeze, capture_output=True, text=True)

    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(f"## {VERSION} (unreleased)\n")
    assert "does not say when" in run().stderr
    changelog.write_text(f"## {VERSION} (2026-12-01)\n")
    assert run().returncode == 0
    assert (tree.sql / "released" / f"lockstep--{VERSION}.sql").read_text() == "CREATE TABLE a ();\n"
    assert tree.verify() == ""
    tree.write(f"lockstep--0.0.1--{VERSION}.sql", "CREATE TABLE c ();")
    assert f"lockstep--0.0.1--{VERSION}.sql" in tree.verify()
    assert "is released already" in run().stderr


def test_everything_that_names_the_version_names_the_same():
    meta = (PROJECT / "META.json").read_text()
    assert re.findall(r'"version": "(\d+\.\d+\.\d+)"', meta) == [VERSION, VERSION, "1.0.0"]  # the last is the specification's
    assert re.match(rf"## {re.escape(VERSION)} \(", (PROJECT / "CHANGELOG.md").read_text())
    assert re.match(rf"lockstep \({re.escape(VERSION)}-\d+\) ", (PROJECT / "debian" / "changelog").read_text())
