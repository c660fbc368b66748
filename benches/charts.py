"""The results as SVG, a chart for each topic: the ratio to the control, its range, and what was lost. The same results give the same bytes."""

from itertools import groupby
from textwrap import fill

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

import report  # noqa: E402

# lockstep first; as many as a run has systems.
COLOURS = [
    "#0b6e4f", "#c8553d", "#3d5a80", "#e0a030", "#7a5195", "#8d99ae", "#5bc0be", "#9c6644", "#ef476f", "#a7c957", "#222222", "#f4a6c0",
]  # fmt: skip
STYLE = {
    "svg.hashsalt": "lockstep", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip
WIDEST = 100  # a ratio above this, or below its inverse, is drawn at the edge


def draw(document, directory):
    """A topic that two of the documents have is drawn from the first."""
    directory.mkdir(parents=True, exist_ok=True)
    topics = {}
    for one in report.with_beside(document):
        caption = report.provenance(one).replace("**", "")
        for topic, group in groupby(report.rows(one), key=lambda row: row[0]["topic"]):
            topics.setdefault(topic, (list(group), caption))
    systems = sorted({cell["system"] for group, _ in topics.values() for cell, *_ in group}, key=lambda name: (name != "lockstep", name))
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(systems)}
    for topic, (group, caption) in topics.items():
        with matplotlib.rc_context(STYLE):
            figure = chart(topic, group, colour, caption)
            figure.savefig(directory / report.file_name(topic), metadata={"Date": None, "Creator": None})
            pyplot.close(figure)


def chart(topic, rows, colour, caption):
    """A row for each variant, a dot for each system, a bar for its range; the control is at 1."""
    variants = list(dict.fromkeys((cell["variant"], cell["control"]) for cell, *_ in rows))
    height = 1.7 + 0.22 * len(rows) + 0.15 * len(variants)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    y, ticks, names = 0.0, [], []
    for variant, control in variants:
        of_variant = [(cell, summary) for cell, summary, _ in rows if (cell["variant"], cell["control"]) == (variant, control)]
        ticks.append(y + (len(of_variant) - 1) / 2)
        names.append(f"{variant}\n(control: {control})" if len(of_variant) > 1 else f"{variant} (control: {control})")
        for cell, summary in of_variant:
            mark(axes, y, cell, summary, colour[cell["system"]])
            y += 1
        y += 0.6
    axes.axvline(1, color="#888888", linewidth=1, zorder=0)
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y, -1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    least, greatest = axes.get_xlim()
    axes.set_xlim(min(least, 0.4), max(greatest, 2.5))
    better = "less" if rows[0][0]["less_is_better"] else "more"
    axes.set_xlabel(f"ratio to the control, median and range\n({better} is better)")
    axes.set_title(topic, loc="left", fontweight="bold")
    shown = list(dict.fromkeys(cell["system"] for cell, *_ in rows))
    handles = [pyplot.Line2D([], [], color=colour[name], marker="o", linestyle="", label=name) for name in sorted(shown, key=list(colour).index)]
    if any(cell["goal"] and cell["goal"]["of"] == "ratio" for cell, *_ in rows):
        handles.append(pyplot.Line2D([], [], color="black", marker="|", markersize=11, linestyle="", label="lockstep's goal"))
    figure.legend(handles=handles, loc="outside upper right", ncols=min(3, len(handles)), frameon=False)
    figure.supxlabel(fill(caption, 150), fontsize=6, color="#555555")
    return figure


def mark(axes, y, cell, summary, colour):
    if summary.state != "measured":
        axes.text(1.03, y, str(summary), color="#b00020" if summary.state == "lost" else "#888888", va="center", fontweight="bold")
        axes.plot([1], [y], marker="x", color=colour)
        return
    ratio, least, greatest = (min(max(number, 1 / WIDEST), WIDEST) for number in (summary.ratio, summary.least, summary.greatest))
    axes.plot([least, greatest], [y, y], color=colour, linewidth=2, alpha=0.5, solid_capstyle="butt")
    axes.plot([ratio], [y], marker="o", color=colour)
    if cell["goal"] and cell["goal"]["of"] == "ratio":
        bound = cell["goal"]["least"] if cell["goal"]["least"] is not None else cell["goal"]["most"]
        axes.plot([bound], [y], marker="|", markersize=11, color="black")
