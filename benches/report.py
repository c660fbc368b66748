"""The results as JSON, as Markdown, and as the README's paragraph."""

import hashlib
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from measure import Goal, as_json, from_json, summarize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The charts that the README shows, of those that there are, in this order.
IN_README = ("loss", "stall", "append", "catch-up", "decay", "growth")
BEGIN, END = "<!-- written by tools/bench --charts: begin -->\n", "<!-- written by tools/bench --charts: end -->\n"


def default_place():
    return Path(os.environ.get("LOCKSTEP_STATE", ROOT / ".state")) / "results" / "bench.json"


def facts(servers, bench, rounds, seed, said, arguments):
    """What somebody needs to judge the figures, or to get them again."""
    settings = "SELECT name, setting || coalesce(unit, '') FROM pg_settings WHERE source = 'configuration file' AND name NOT LIKE 'unix_socket%' ORDER BY 1"
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "source": source(),
        "plan": said,
        "seed": seed,
        "window": bench.window,
        "rounds": rounds,
        "events": bench.large,
        "catch_up": bench.catch_up,
        "hold": bench.hold,
        "arguments": {name: str(value) for name, value in sorted(vars(arguments).items()) if value not in (None, False, "")},
        "machine": machine(),
        "versions": {name: place.value("postgres", "SELECT version()") for name, place in servers.items()} | libraries(),
        "settings": {name: dict(place.execute("postgres", settings)) for name, place in servers.items()},
    }


def git(*words):
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


# What only shows figures, and what a run leaves.
NOT_MEASURED = [f":!benches/{name}" for name in ("report.py", "charts.py", "results*.json", "results.md")]


def source():
    """Changes with everything that a figure depends on."""
    files = git("ls-files", "--stage", "src", "sql", "Cargo.toml", "Cargo.lock", "benches", *NOT_MEASURED)
    return hashlib.sha256(files.encode()).hexdigest()[:16]


def cannot_continue(before, servers):
    """Why what is measured now cannot stand beside these results; None if it can."""
    versions = {name: place.value("postgres", "SELECT version()") for name, place in servers.items()}
    if before["changed"] or git("status", "--porcelain", "--untracked-files=no", "src", "sql", "benches", *NOT_MEASURED):
        return "there are, or were, local changes"
    if before["source"] != source():
        return "they are of another source"
    if any(before["machine"][what] != machine()[what] for what in ("processor", "cores")):
        return "they are of another machine"
    if any(before["versions"].get(name, version) != version for name, version in versions.items()):
        return "they are of other versions of PostgreSQL"
    return None


def attempts(document):
    """The document's attempts by cell and system."""
    return {
        (f"{cell['topic']}: {cell['variant']}", cell["system"]): [from_json(attempt) for attempt in cell["attempts"]] for cell in document["cells"]
    }


def joined(before, document):
    """What was measured before, and now; a cell that was measured in both has its attempts of before already."""
    key = lambda cell: (cell["topic"], cell["variant"], cell["system"])  # noqa: E731
    new = {key(cell): cell for cell in document["cells"]}
    old = {key(cell) for cell in before["cells"]}
    cells = [new.get(key(cell), cell) for cell in before["cells"]] + [cell for cell in document["cells"] if key(cell) not in old]
    facts = {name: value for name, value in before.items() if name not in ("cells", "earlier", "beside")}
    versions = before["versions"] | document["versions"]
    return document | {"versions": versions, "earlier": [*before.get("earlier", []), facts], "cells": cells}


def machine():
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "processor": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
    }


def libraries():
    """The peers' versions, as they are pinned."""
    node = json.loads((HERE / "peers" / "package.json").read_text())["dependencies"]
    python = dict(re.findall(r"^([\w-]+)==([\w.]+)", (HERE / "peers" / "requirements.txt").read_text(), re.MULTILINE))
    return node | python | {"psycopg": psycopg.__version__, "python": platform.python_version(), "pgq": "3.5"}


def document(known, results, rounds, minutes):
    cells = [
        {
            "topic": result.cell.topic,
            "variant": result.cell.variant,
            "unit": result.cell.unit,
            "control": result.cell.control_name,
            "system": result.subject.system,
            "less_is_better": result.cell.less_is_better,
            "ahead": result.cell.ahead,
            "goal": vars(result.cell.goal) if result.cell.goal and result.subject.system == "lockstep" else None,
            "errors": result.errors,
            "attempts": [as_json(attempt) for attempt in result.attempts],
        }
        for result in results
    ]
    return known | {"rounds": rounds, "minutes": round(minutes, 1), "cells": cells}


def save(document, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load(path):
    """The results, and beside them what was finished on other machines or of another commit, whose files are named after theirs."""
    others = [json.loads(other.read_text()) for other in sorted(path.parent.glob(f"{path.stem}-*.json"))]
    return json.loads(path.read_text()) | {"beside": [finished(other) for other in others]}


def finished(document):
    cells = [cell for cell, summary in summaries(document) if summary.state not in ("unfinished", "none")]
    return document | {"cells": cells}


def with_beside(document):
    return [document, *document.get("beside", [])]


def summaries(document):
    """Each cell of the document with its summary."""
    return [
        (cell, summarize([from_json(attempt) for attempt in cell["attempts"]], document["rounds"], len(cell["errors"])))
        for cell in document["cells"]
    ]


def verdict(cell, summary, others):
    """Whether lockstep has met its goals in the cell; nothing is said of others, or of what was not measured."""
    if cell["system"] != "lockstep":
        return ""
    if summary.state == "lost":
        return "missed"
    said = []
    if cell["goal"] and summary.state == "measured":
        goal = Goal(**cell["goal"])
        said.append(f"{goal}: {'met' if goal.met(summary.value if goal.of == 'value' else summary.ratio) else 'missed'}")
    if cell["topic"] == "loss" and summary.state != "error" and cell["attempts"]:
        said.append("loses nothing: met")
    if cell["topic"] == "hot aggregate" and summary.state == "measured":
        said.append(f"no attempt refused: {'missed' if summary.failed else 'met'}")
    rivals = [other for other in others if other.state == "measured"]
    if cell["ahead"] and rivals and summary.state == "measured":
        best = (min if cell["less_is_better"] else max)(rival.ratio for rival in rivals)
        ahead = summary.ratio <= best if cell["less_is_better"] else summary.ratio >= best
        said.append(f"ahead of its peers: {'met' if ahead else 'missed'}")
    return "; ".join(said)


def rows(document):
    """One for each system in each cell: the cell, its summary, and the verdict. A topic's cells follow each other, whichever run they are of."""
    topics = list(dict.fromkeys(cell["topic"] for cell in document["cells"]))
    all_summaries = sorted(summaries(document), key=lambda one: topics.index(one[0]["topic"]))
    for cell, summary in all_summaries:
        same = [other for rival, other in all_summaries if rival is not cell and (rival["topic"], rival["variant"]) == (cell["topic"], cell["variant"])]
        yield cell, summary, verdict(cell, summary, same)


def markdown(document):
    lines = [provenance(document), ""]
    topic = None
    for cell, summary, said in rows(document):
        if cell["topic"] != topic:
            topic = cell["topic"]
            lines += ["", f"### {topic}", "", "| what | control | system | ratio | range | valid rounds | goals |", "|---|---|---|---|---|---|---|"]
        span = f"{summary.least:.2f}–{summary.greatest:.2f}" if summary.state == "measured" else ""
        notes = [said] if said else []
        notes += [f"{summary.doubled:,} passed on twice"] if summary.doubled else []
        notes += [f"{summary.failed:,} attempts refused"] if summary.failed else []
        better = " (less is better)" if cell["less_is_better"] else ""
        lines.append(
            f"| {cell['variant']}{better} | {cell['control']} | {cell['system']} | {summary} | {span} | {summary.rounds} | {'; '.join(notes)} |"
        )
    return "\n".join(lines)


def provenance(document):
    """Where, when and how; from the results themselves."""
    machine, versions = document["machine"], document["versions"]
    cells = len({(cell["topic"], cell["variant"]) for cell in document["cells"]})
    postgres = ", ".join(sorted({re.match(r"PostgreSQL [\d.]+", version)[0] for name, version in versions.items() if version.startswith("PostgreSQL")}))
    runs = [*document.get("earlier", []), document]
    dates = " and ".join(sorted({run["begun"][:10] for run in runs}))
    text = (
        f"Measured on {dates} at commit {document['commit'][:10]}{' with local changes' if document['changed'] else ''}, with {postgres}, on "
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB: {cells} cells, {document['rounds']} rounds, windows of {document['window']:g} s, "
        f"{' and '.join(format(run['minutes'], 'g') for run in runs)} minutes, seed {' and '.join(str(run['seed']) for run in runs)}."
    )
    if document["rounds"] < 5:
        text += " **Fewer than 5 rounds: a trial run, of which no figure says anything.**"
    return text


def paragraph(document):
    documents = with_beside(document)
    topics = {cell["topic"] for one in documents for cell in one["cells"]}
    where = " ".join(provenance(one).replace("Measured", "Measured too", 1 if number else 0) for number, one in enumerate(documents))
    charts = "\n".join(f"![{topic}](docs/img/{file_name(topic)})" for topic in IN_README if topic in topics)
    return f"{BEGIN}{where} All figures: [benches/results.md](benches/results.md).\n\n{charts}\n{END}"


def write_table(document, path):
    tables = "\n\n## Measured too\n\n".join(markdown(one) for one in with_beside(document))
    path.write_text(f"# What was measured last\n\n[docs/benchmarks.md](../docs/benchmarks.md) says what each cell is. {tables}\n")


def write_paragraph(document, path):
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{paragraph(document)}{after}")


def file_name(topic):
    return f"{topic.lower().replace(' ', '_')}.svg"
