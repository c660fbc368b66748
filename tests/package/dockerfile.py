"""Runs the Dockerfile's steps without Docker, in fresh Debians: `make test-dockerfile`. Needs root.

FROM postgres:15-bookworm is a Debian 12 with Debian's own postgresql-15, whose files lie where the official image has its own
(/usr/lib/postgresql/15, /usr/share/postgresql/15), and with PG_MAJOR set, as in the image. RUN, COPY, WORKDIR, ENV and ARG are done as
they are written. In what comes out, a server is started and the extension used. What this does not check: that the image exists
under its name, and its entrypoint.
"""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CHROOT = PROJECT / "tools" / "chroot"
MAJOR = "15"

USE = f"""
set -eu
bin=/usr/lib/postgresql/{MAJOR}/bin
as() {{ runuser -u postgres -- "$@"; }}
as $bin/initdb -D /tmp/data -A trust -E UTF8 --locale=C.UTF-8 >/dev/null
as $bin/pg_ctl -D /tmp/data -w -s -l /tmp/log -o "-k /tmp -c shared_preload_libraries=lockstep" start
sql() {{ as psql -X -A -t -q -v ON_ERROR_STOP=1 -h /tmp -c "$1"; }}
sql "CREATE EXTENSION lockstep"
[ "$(sql "SELECT position FROM lockstep.push_event('order', '42', 'order_placed')")" = 1 ]
[ "$(sql "SELECT position, event_type FROM lockstep.read_events()")" = "1|order_placed" ]
[ "$(sql "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'lockstep supervisor'")" = 1 ]
as $bin/pg_ctl -D /tmp/data -w -s stop
! command -v cargo rustc clang
"""


def instructions(text):
    """(instruction, arguments) in order, with continued lines joined and comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


class Build:
    def __init__(self, directory, arguments):
        self.directory = directory
        self.arguments = arguments
        self.given = dict(arguments)  # of ARGs before the first FROM
        self.stages = {}
        self.root = self.workdir = None
        self.env = {}

    def expand(self, text):
        return re.sub(r"\$\{?(\w+)\}?", lambda match: self.env.get(match[1], self.given.get(match[1], match[0])), text)

    def run(self, text):
        for name, rest in instructions(text):
            print(f"==> {name} {rest}", flush=True)
            getattr(self, name)(rest)
        return self.root

    def ARG(self, rest):
        name, _, default = rest.partition("=")
        self.given.setdefault(name, default)

    def FROM(self, rest):
        image, name = re.fullmatch(r"(\S+)(?: AS (\w+))?", self.expand(rest)).groups()
        assert image == f"postgres:{MAJOR}-bookworm", image
        self.root = self.directory / f"stage{len(self.stages)}"
        self.stages[name or len(self.stages)] = self.root
        subprocess.run([CHROOT, "make", self.root, f"postgresql-{MAJOR}"], check=True)
        self.workdir, self.env = "/", {"PG_MAJOR": MAJOR}

    def ENV(self, rest):
        name, _, value = rest.partition("=")
        self.env[name] = value.replace("$PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")

    def WORKDIR(self, rest):
        self.workdir = rest
        (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def RUN(self, rest):
        env = [f"{name}={value}" for name, value in self.env.items()]
        script = f"cd {self.workdir} && {rest}"
        subprocess.run([CHROOT, "run", self.root, "env", *env, "sh", "-c", script], check=True)

    def COPY(self, rest):
        stage, source, target = re.fullmatch(r"(?:--from=(\w+) )?(\S+) (\S+)", rest).groups()
        to = self.root / target.lstrip("/") if target.startswith("/") else self.root / self.workdir.lstrip("/") / target
        if stage:
            subprocess.run(["cp", "-RT", self.stages[stage] / source.strip("/"), to], check=True)
            return
        assert (source, target) == (".", "."), rest
        left_out = (PROJECT / ".dockerignore").read_text().split()
        shutil.copytree(
            PROJECT, to, dirs_exist_ok=True, symlinks=True,
            ignore=lambda directory, names: [
                name for name in names if Path(directory) == PROJECT and any(fnmatch.fnmatch(name, line) for line in left_out)
            ],
        )  # fmt: skip


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    try:
        root = Build(directory, {"PG_MAJOR": MAJOR}).run((PROJECT / "Dockerfile").read_text())
        (root / "tmp" / "use").write_text(USE)
        subprocess.run([CHROOT, "run", root, "sh", "/tmp/use"], check=True)
    except subprocess.CalledProcessError as error:
        print(f"{error}\n0 passed, 1 failed")
        sys.exit(1)
    finally:
        subprocess.run([CHROOT, "remove", directory], check=True)
    print("1 passed, 0 failed")
