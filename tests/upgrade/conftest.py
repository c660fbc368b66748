"""Older versions of the extension, installed beside the current one in the tests' own copy of the server."""

import subprocess
import sys
from pathlib import Path

import pytest
from server import BINDIR

sys.path.insert(0, str(Path(__file__).parent))
import previous  # noqa: E402

FRESH = "fresh"


class Scripts:
    """The directory of the extension's scripts, and those that the test adds."""

    def __init__(self):
        sharedir = subprocess.run([BINDIR / "pg_config", "--sharedir"], capture_output=True, text=True, check=True).stdout
        self.directory = Path(sharedir.strip()) / "extension"
        self.current = previous.current_version(self.directory)
        self.fresh = previous.fresh_script(self.directory)
        self.added = []

    def add(self, versions, script):
        """Writes `lockstep--VERSIONS.sql`. What was there before, where CREATE EXTENSION always upgrades, stays after the tests."""
        path = self.directory / f"lockstep--{versions}.sql"
        if not path.exists():
            self.added.append(path)
        path.write_text(script)

    def remove(self):
        for path in self.added:
            path.unlink()


@pytest.fixture(scope="session")
def scripts():
    """The current script under the version `fresh` too: where CREATE EXTENSION always upgrades, that of its own name is not there."""
    installed = Scripts()
    installed.add(FRESH, installed.fresh)
    script, upgrade = previous.never_released(installed.fresh)
    installed.add(previous.NEVER_RELEASED, script)
    installed.add(f"{previous.NEVER_RELEASED}--{installed.current}", "\n\n".join(upgrade))
    for version, path in previous.releases().items():
        if version != installed.current:
            installed.add(version, path.read_text())
    try:
        yield installed
    finally:
        installed.remove()


OLDER = [previous.NEVER_RELEASED, *previous.releases()]


@pytest.fixture(params=OLDER)
def older(request, scripts):
    """Each older version by name: the releases, and one that never was."""
    if request.param == scripts.current:
        pytest.skip("the release is the current version")
    return request.param
