"""The documentation is run: what a page shows is what the server prints, and nothing public is missing from it.

How a page is read:
- The blocks in the languages of RUN run in the order of the page, in one psql session and one fresh database.
- A block marked `text` directly after one is its output. Times, runs of spaces and the rules of tables are not compared.
- An error is only accepted where it is shown. It is printed as by psql with VERBOSITY verbose, without the LOCATION line.
- Programs find the database by libpq's environment variables. All other blocks (`text` elsewhere, `sh` but for one) are not looked at.
- Pages run on a server without the library preloaded, all but that of the workers.
"""

import os
import re
import shlex
import signal
import subprocess

import programs
import pytest
from pages import FENCE, PAGES, README, blocks_of
from programs import ROOT
from psycopg import sql
from server import BINDIR, wait_until
from sessions import push

WORKER_PAGE = ROOT / "docs" / "worker.md"
RUN = ("sql", "python", "js", "java", "rust", "go", "bash")
NOISE = [
    (re.compile(r"^LOCATION: .*\n", re.MULTILINE), ""),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?[+-]\d\d(:\d\d)?"), "TIME"),
    (re.compile(r"-{2,}"), "-"),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"^ | $", re.MULTILINE), ""),
    (re.compile(r"\n{2,}"), "\n"),
]


def script(block, directory):
    """What psql is to do for a block."""
    if block.language == "sql":
        return block.body
    file = directory / f"line_{block.line}.{block.language}"
    file.write_text(block.body)
    command = programs.command(block.language, file, directory)
    return f"\\! {shlex.join(map(str, command))} || echo 'ERROR: {block.language} ended with a failure'\n"


def blocks_to_run(path):
    return blocks_of(path, *RUN)


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
    whole = "\\set VERBOSITY verbose\n\\pset pager off\n"
    for block in blocks:
        whole += f"\\echo <<<{block.line}\n{script(block, directory)}\n\\echo >>>\n"
    result = subprocess.run(
        [BINDIR / "psql", "-X", "-q"], env=programs.environment(db), input=whole, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    outputs = dict(re.findall(r"^<<<(\d+)\n(.*?)^>>>$", result.stdout, re.MULTILINE | re.DOTALL))
    assert len(outputs) == len(blocks), f"psql did not come to the end of the page:\n{result.stdout}"
    return [outputs[str(block.line)] for block in blocks]


@pytest.mark.parametrize("path", [path for path in PAGES if blocks_to_run(path) and path != WORKER_PAGE], ids=lambda path: path.name)
def test_a_page_shows_what_the_server_prints(path, db, roles, tmp_path):
    check(path, db, tmp_path)


def test_the_workers_page_shows_what_a_server_with_workers_prints(cluster, new_database, tmp_path):
    preloaded = cluster(shared_preload_libraries="lockstep")
    check(WORKER_PAGE, new_database(preloaded, "app"), tmp_path)


def check(path, db, tmp_path):
    blocks = blocks_to_run(path)
    wrong = []
    for block, output in zip(blocks, run(db, blocks, tmp_path), strict=True):
        where = f"{path.name}, line {block.line}"
        if block.output is None:
            if re.search(r"^(ERROR|FATAL|PANIC):|Traceback", output, re.MULTILINE):
                wrong.append(f"{where} fails:\n{output}")
        elif comparable(output) != comparable(block.output):
            wrong.append(f"{where} prints:\n{output}\nand the page shows:\n{block.output}")
    assert not wrong, "\n".join(wrong)


def test_the_shell_loop_applies_what_is_pushed(db):
    (loop,) = re.findall(r"^```sh\n(#!/bin/sh\n.*?)^```$", WORKER_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    session = db.connect()
    session.execute(
        """CREATE TABLE public.seen (position numeric);
        CREATE FUNCTION public.see(event lockstep.events) RETURNS void LANGUAGE sql
            BEGIN ATOMIC INSERT INTO public.seen VALUES (event.position); END;
        SELECT lockstep.projection_create('seen', handler => 'public.see(lockstep.events)')"""
    )
    pushed = [push(session), push(session, tenant="another")]
    environment = programs.environment(db)
    process = subprocess.Popen(["sh", "-c", loop], env=environment, start_new_session=True)

    def seen():
        return [position for (position,) in session.execute("SELECT position FROM public.seen ORDER BY 1").fetchall()]

    try:
        wait_until(lambda: seen() == pushed)
        pushed.append(push(session))
        wait_until(lambda: seen() == pushed)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_pages_have_blocks_to_run():
    pages = {"README.md": set(), "docs/event_log.md": set(), "docs/projection.md": set(), "docs/lease.md": {"js"}}
    pages["docs/clients.md"] = set(RUN) - {"sql", "python"}
    for name, more in pages.items():
        path = ROOT / name
        languages = {block.language for block in blocks_to_run(path)}
        assert languages == {"sql", "python"} | more, path.name
        assert any(block.output for block in blocks_to_run(path)), path.name
    assert any(block.output for block in blocks_to_run(WORKER_PAGE))


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
    text = f"{name}({arguments})" + (f" -> {result}" if result else "")  # a procedure has none
    text = text.replace("timestamp with time zone", "timestamptz").replace("integer", "int")
    text = re.sub(r"::[a-z]+(\[\])?(?=[,)])", "", text)
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
