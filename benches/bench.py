"""What the cells share: a database of their own, psql, and pgbench with what it says of its speed."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATABASE = "lockstep_bench"
PAYLOAD = '{"amount": 1250, "currency": "EUR", "customer": "c-7391", "items": [{"sku": "A-100", "count": 2}]}'


class Bench:
    def __init__(self, seconds, large, directory):
        self.seconds = seconds
        self.large = large
        self.directory = Path(directory)
        self.runs = 0
        create_database(DATABASE)
        os.environ["PGDATABASE"] = DATABASE
        psql("-f", HERE / "setup.sql")

    def start(self, script, clients, protocol="prepared", synchronous_commit="on", database=DATABASE, extra=()):
        """pgbench with the script as so many clients, which use aggregates that no other client and no other run has."""
        self.runs += 1
        path = self.directory / f"{self.runs}.sql"
        path.write_text(f"\\set first ({self.runs} * 1000 + :client_id) * 10000000\n{script}")
        command = ["pgbench", "-n", "-f", path, "-c", clients, "-T", self.seconds + 1, "-P", 1, "-M", protocol]
        command += ["-D", "n=0", "-D", f"payload={PAYLOAD}", *extra]
        options = f"-c synchronous_commit={synchronous_commit}"
        return subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "PGDATABASE": database, "PGOPTIONS": options},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def rate(self, script, **how):
        """Transactions a second, from the second second on: in the first the sessions start."""
        psql("-c", "CHECKPOINT")
        output = finish(self.start(script, **how))
        rates = [float(rate) for rate in re.findall(r"^progress: .*?, ([\d.]+) tps", output, re.MULTILINE)]
        return statistics.mean(rates[1 : self.seconds + 1])


def create_database(name):
    psql("-d", "postgres", "-c", f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", "-c", f"CREATE DATABASE {name}")


def psql(*arguments):
    command = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-o", os.devnull, *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PGOPTIONS": "-c client_min_messages=warning"})


def finish(process):
    output, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(output)
    return output
