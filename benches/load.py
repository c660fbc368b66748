"""What loads a server: pgbench for statements of SQL, and driver.py and driver.js where a client's library is part of what is measured.

All of them leave out a warm-up of one second, in which sessions start and plans are made.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from measure import tail
from servers import BINDIR

HERE = Path(__file__).resolve().parent
NODE = Path(sys.executable).with_name("node")
WARM_UP = 1
_runs = iter(range(1, 1_000_000))


@dataclass
class Loaded:
    """What a load says of itself."""

    rate: float  # transactions a second in the window
    count: int  # transactions that were acknowledged, the warm-up's too
    failed: int = 0
    seconds: float = 0  # from the first transaction's start to the last one's end
    took: list = field(default_factory=list)  # milliseconds of each transaction in the window, in the order of their ends
    due: list = field(default_factory=list)  # the second at which each was to begin

    @property
    def p99(self):
        return tail(list(zip(self.due, self.took, strict=True)))


class Load:
    """A program that is running. `finish` waits for its end."""

    def __init__(self, command, environment, **options):
        self.command = [str(part) for part in command]
        # A file, not a pipe, which a chatty program would fill.
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command, env=environment, text=True, stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT, **options
        )

    def finish(self):
        self.process.wait()
        return self.read()

    def read(self):
        self.output.seek(0)
        text = self.output.read()
        self.output.close()
        if self.process.returncode != 0:
            raise RuntimeError(f"{' '.join(self.command[:4])} …: {text[-2000:]}")
        return text

    def stop(self):
        """Ends what would go on: its standard input is closed, and if that is nothing to it, it is killed."""
        self.process.stdin.close()
        try:
            self.process.wait(0 if isinstance(self, Pgbench) else 5)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class Pgbench(Load):
    """pgbench with a script, whose clients use aggregates that no other client and no other run has (`:first` and up)."""

    def __init__(self, server, database, script, clients, window=None, turns=None, rate=None, protocol="prepared", options="", variables=()):
        self.directory = tempfile.TemporaryDirectory(prefix="lockstep-bench.")
        run = next(_runs)
        path = Path(self.directory.name) / "script.sql"
        path.write_text(f"\\set first ({run} * 1000 + :client_id) * 1000000\n{script}")
        long = ["-t", turns] if turns else ["-T", int(window + WARM_UP)]
        command = [BINDIR / "pgbench", "-n", "-f", path, "-c", clients, *long, "-M", protocol, "-l"]
        command += ["--log-prefix", Path(self.directory.name) / "log", "-D", "n=0"]
        command += [part for name, value in dict(variables).items() for part in ("-D", f"{name}={value}")]
        command += ["-R", rate] if rate else []
        self.warm_up = 0 if turns else WARM_UP
        super().__init__(command, server.environment(database, options))

    def finish(self):
        self.process.wait()
        self.read()
        ends, took = [], []
        for log in Path(self.directory.name).glob("log.*"):
            for line in log.read_text().splitlines():
                parts = line.split()
                ends.append(int(parts[4]) + int(parts[5]) / 1e6)
                took.append(int(parts[2]) / 1000)
        self.directory.cleanup()
        if not ends:
            raise RuntimeError("pgbench: no transaction came to its end")
        begun = min(end - milliseconds / 1000 for end, milliseconds in zip(ends, took, strict=True))
        counted = sorted((end, milliseconds) for end, milliseconds in zip(ends, took, strict=True) if end >= begun + self.warm_up)
        seconds = max(ends) - begun
        took, due = [milliseconds for _, milliseconds in counted], [end - milliseconds / 1000 for end, milliseconds in counted]
        return Loaded(len(counted) / max(seconds - self.warm_up, 1e-6), len(ends), 0, seconds, took, due)


class Driver(Load):
    """driver.py or driver.js with a peer: prints what it says of itself as JSON in its last line."""

    def __init__(self, language, server, database, *arguments, path=None):
        program = [NODE, HERE / "driver.js"] if language == "node" else [sys.executable, HERE / "driver.py"]
        environment = server.environment(database)
        if path:
            environment["PYTHONPATH"] = os.fspath(path)
        super().__init__([*program, *arguments], environment)

    def finish(self):
        return Loaded(**json.loads(super().finish().strip().splitlines()[-1]))
