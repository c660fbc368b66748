"""META.json is what PGXN takes: its own validator says so."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
VERSION = "0.7.0"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def validate():
    """PGXN's validator, built at its first use; gives what it says of a file, or nothing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / f"pgxn_meta-{VERSION}"
    # Built in a directory without this project's settings of cargo.
    command = ["cargo", "install", "pgxn_meta", "--version", VERSION, "--locked", "--root", cache, "--quiet"]
    subprocess.run(command, cwd="/", check=True)

    def run(file):
        result = subprocess.run([cache / "bin" / "pgxn_meta", file], capture_output=True, text=True)
        said = result.stdout + result.stderr
        assert (result.returncode == 0) == ("OK" in said), said
        return "" if result.returncode == 0 else said

    return run


def test_meta_json_is_valid(validate):
    assert validate(PROJECT / "META.json") == ""


@pytest.mark.parametrize(
    "key, value",
    [("version", "0.1"), ("license", "unheard of"), ("release_status", "done"), ("maintainer", None), ("meta-spec", {}), ("tags", [])],
)
def test_the_validator_refuses_what_is_wrong(validate, tmp_path, key, value):
    meta = json.loads((PROJECT / "META.json").read_text()) | {key: value}
    (tmp_path / "META.json").write_text(json.dumps(meta))
    assert validate(tmp_path / "META.json") != ""


def test_the_files_that_it_names_are_there():
    for provided in json.loads((PROJECT / "META.json").read_text())["provides"].values():
        assert (PROJECT / provided["file"]).exists()
        assert (PROJECT / provided["docfile"]).exists()
