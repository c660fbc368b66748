"""The documentation is run: what a page shows is what the server prints, and nothing public is missing from it.

How a page is read:
- The blocks marked `sql` and `python` run in the order of the page, in one psql session and one fresh database.
- A block marked `text` directly after one is its output. Times, runs of spaces and the rules of tables are not compared.
- An error is only accepted where it is shown. It is printed as by psql with VERBOSITY verbose, without the LOCATION line.
- Python connects with libpq's environment variables. All other blocks (`sh`, `text` elsewhere) are not looked at.
"""

import os
import re
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
from psycopg import sql
from server import BINDIR

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOISE = [
    (re.compile(r"^LOCATION: .*\n", re.MULTILINE), ""),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?[+-]\d\d(:\d\d)?"), "TIME"),
    (re.compile(r"-{2,}"), "-"),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"^ | $", re.MULTILINE), ""),
    (re.compile(r"\n{2,}"), "\n"),
]


class Block:
    def __init__(self, page, match, following):
        self.page = page
        self.line = page.count("\n", 0, match.start()) + 1
        self.language, self.body = match.groups()
        directly = following and not page[match.end() : following.start()].strip()
        self.output = following[2] if directly and following[1] == "text" else None

    def script(self, directory):
        if self.language == "sql":
            return self.body
        file = directory / f"line_{self.line}.py"
        file.write_text(self.body)
        return f"\\! {shlex.join([sys.executable, str(file)])} || echo 'ERROR: python ended with a failure'\n"


def blocks_of(path):
    page = path.read_text()
    matches = list(FENCE.finditer(page))
    blocks = [Block(page, match, following) for match, following in zip_longest(matches, matches[1:])]
    return [block for block in blocks if block.language in ("sql", "python")]


def comparable(text):
    for pattern, replacement in NOISE:
        text = pattern.sub(replacement, text)
    return text.strip()


@pytest.fixture
def roles(db):
    """Drops the roles that a page creates: they belong to the whole server."""

    def names(connection):
        return {name for (name,) in connection.execute("SELECT rolname FROM pg_roles").fetchall()}

    with db.connect() as connection:
        before = names(connection)
    yield
    with db.connect() as connection:
        for role in sorted(names(connection) - before):
            connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


def run(db, blocks, directory):
    """The output of each block, as text."""
    script = "\\set VERBOSITY verbose\n\\pset pager off\n"
    for block in blocks:
        script += f"\\echo <<<{block.line}\n{block.script(directory)}\n\\echo >>>\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {
        "PGHOST": str(db.cluster.host),
        "PGPORT": str(db.cluster.port),
        "PGUSER": "postgres",
        "PGDATABASE": db.name,
        "PGTZ": "UTC",
        "LC_ALL": "C.UTF-8",
    }
    result = subprocess.run(
        [BINDIR / "psql", "-X", "-q"], env=environment, input=script, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    outputs = dict(re.findall(r"^<<<(\d+)\n(.*?)^>>>$", result.stdout, re.MULTILINE | re.DOTALL))
    assert len(outputs) == len(blocks), f"psql did not come to the end of the page:\n{result.stdout}"
    return [outputs[str(block.line)] for block in blocks]


@pytest.mark.parametrize("path", [path for path in PAGES if blocks_of(path)], ids=lambda path: path.name)
def test_a_page_shows_what_the_server_prints(path, db, roles, tmp_path):
    blocks = blocks_of(path)
    wrong = []
    for block, output in zip(blocks, run(db, blocks, tmp_path), strict=True):
        where = f"{path.name}, line {block.line}"
        if block.output is None:
            if re.search(r"^(ERROR|FATAL|PANIC):|Traceback", output, re.MULTILINE):
                wrong.append(f"{where} fails:\n{output}")
        elif comparable(output) != comparable(block.output):
            wrong.append(f"{where} prints:\n{output}\nand the page shows:\n{block.output}")
    assert not wrong, "\n".join(wrong)


def test_the_pages_have_blocks_to_run():
    for path in (README, ROOT / "docs" / "event_log.md", ROOT / "docs" / "projection.md"):
        languages = {block.language for block in blocks_of(path)}
        assert languages == {"sql", "python"}, path.name
        assert any(block.output for block in blocks_of(path)), path.name


def test_a_wrong_output_is_noticed():
    shown = "n | at\n-+-\n1 | 2026-02-02 11:22:33.4+00"
    assert comparable(" n | at\n---+----\n 1 | 2026-01-01 00:00:00+00\n") == comparable(shown)
    assert comparable(" 1 | a") != comparable(" 2 | a")
    assert comparable("ERROR:  LS001: x") != comparable("ERROR:  LS002: x")


def table_rows(page, heading):
    """The first cells of the rows of the tables in a section, its subsections included."""
    section = re.search(rf"^(#+) {heading}\n(.*?)(?=^\1 |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, f"README.md has no section {heading}"
    return re.findall(r"^\| *(.*?) *\|", section[2], re.MULTILINE)


def reference_pages():
    return "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def listed_in(rows):
    """The names that begin a row: a function's without its arguments."""
    return {re.match(r"\[?`([\w.]+)", row)[1] for row in rows if "`" in row}


def explained_in(pages):
    """The names that are a heading, or the first cell of a row."""
    return set(re.findall(r"^#+ ([\w.]+)$", pages, re.MULTILINE)) | set(re.findall(r"^\| `([\w.]+)` \|", pages, re.MULTILINE))


def extension_names(db, query):
    with db.connect() as connection:
        connection.execute("SELECT lockstep.projection_claim_state('any')")  # loads the library, which defines the settings
        return {name for (name,) in connection.execute(query).fetchall()}


QUERIES = {
    "function": "SELECT proname FROM pg_proc WHERE pronamespace = 'lockstep'::regnamespace",
    "relation": "SELECT 'lockstep.' || relname FROM pg_class"
    " WHERE relnamespace = 'lockstep'::regnamespace AND relkind IN ('r', 'v')",
    "setting": "SELECT name FROM pg_settings WHERE name LIKE 'lockstep.%'",
}


@pytest.mark.parametrize("kind", QUERIES)
def test_everything_public_is_in_the_readme_and_in_a_page(kind, db):
    names = extension_names(db, QUERIES[kind])
    assert names
    assert names - listed_in(table_rows(README.read_text(), "Reference")) == set(), "missing in README.md"
    assert names - explained_in(reference_pages()) == set(), "missing in docs/"


def test_everything_that_the_readme_lists_exists(db):
    listed = listed_in(table_rows(README.read_text(), "Reference"))
    assert listed - set().union(*(extension_names(db, query) for query in QUERIES.values())) == set()


def signature(row):
    name, arguments, result = row
    text = f"{name}({arguments}) -> {result}"
    if result is None:  # a procedure
        text = f"CALL {name}({re.sub(r'(?<![A-Z])IN ', '', arguments)})"
    text = re.sub(r"::[a-z]+(\[\])?(?=[,)])", "", text)
    text = text.replace("timestamp with time zone", "timestamptz").replace("integer", "int")
    return re.sub(r"\s+", " ", text.replace('"position"', "position"))


def test_the_pages_give_the_signatures_as_they_are(db):
    with db.connect() as connection:
        rows = connection.execute(
            "SELECT proname, pg_get_function_arguments(oid), pg_get_function_result(oid)"
            " FROM pg_proc WHERE pronamespace = 'lockstep'::regnamespace"
        ).fetchall()
    pages = re.sub(r"\s+", " ", reference_pages())
    wanted = {signature(row) for row in rows}
    assert {text for text in wanted if text not in pages} == set()


def test_every_sqlstate_is_in_the_error_table():
    raised = set(re.findall(r'=> "([0-9A-Z]{5})"', (ROOT / "src" / "error.rs").read_text()))
    assert "LS001" in raised
    listed = set(re.findall(r"`([0-9A-Z]{5})`", "\n".join(table_rows(README.read_text(), "Errors"))))
    assert raised - listed == set()
    assert {code for code in listed if code.startswith("LS")} <= raised


def test_links_between_pages_lead_somewhere():
    broken = []
    for path in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            page = (path.parent / target).resolve() if target else path
            if not page.exists():
                broken.append(f"{path.name}: {target}")
            elif anchor and anchor not in anchors(page.read_text()):
                broken.append(f"{path.name}: {target}#{anchor}")
    assert not broken


def anchors(page):
    without_code = FENCE.sub("", page)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
