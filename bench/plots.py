"""Plots for the README, PNG and SVG, from the JSON of a run. Axes start at zero, or are logarithmic and say so.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; bzstream's is always the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import in_words
from bench.rows import Row, margin, read_row
from bzstream.util.statistics import quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

OURS, LIMIT = "#0072B2", "#999999"
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#F0E442")
RIGHT, WRONG = "#009E73", "#D55E00"
DPI = 150

Painter = Callable[[Mapping[str, Any], "Axes"], bool]


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the run has figures for; the files. Raises ModuleNotFoundError without matplotlib, OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    style = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.3, "axes.axisbelow": True, "svg.hashsalt": "bzstream",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        for name, (size, painter) in PLOTS.items():
            figure, axes = pyplot.subplots(figsize=size, layout="constrained")
            try:
                if painter(document, axes):
                    figure.supxlabel(footer(document), fontsize=6.5, color="#666666")
                    for kind in ("png", "svg"):
                        path = folder / f"{name}.{kind}"
                        # No date inside: the same figures give the same file.
                        figure.savefig(path, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
                        files.append(path)
            finally:
                pyplot.close(figure)
    return files


def footer(document: Mapping[str, Any]) -> str:
    """When and on what it was measured, in lines that fit the narrowest plot."""
    text = f"{document['date']}: {in_words(document['machine'])}"
    warning = "\nQUICK RUN: shows that everything works; its figures mean little" if document["quick"] else ""
    return textwrap.fill(text, 100) + warning


def rows_of(document: Mapping[str, Any], bench: str) -> list[Row]:
    """The rows of one bench of the run."""
    return [read_row(bench, raw) for found in document["benches"] if found["bench"] == bench for raw in found["rows"]]


def throughput(document: Mapping[str, Any], axes: Axes) -> bool:
    """Speed over connections, a line a server, with the spread of the rounds."""
    return _by_connections(document, axes, "GB/s", "GB/s to a discarding client, one worker each")


def cost(document: Mapping[str, Any], axes: Axes) -> bool:
    """Server CPU seconds per GB over connections."""
    return _by_connections(document, axes, "s/GB", "server CPU seconds per GB (less is better)")


def _by_connections(document: Mapping[str, Any], axes: Axes, unit: str, title: str) -> bool:
    lines: dict[str, list[Row]] = {}
    for row in rows_of(document, "serve"):
        if row.unit == unit and row.more.get("client") == "discard" and row.median is not None:
            lines.setdefault(row.subject, []).append(row)
    if not lines:
        return False
    counts = sorted({row.more["connections"] for rows in lines.values() for row in rows})
    colours = iter(OTHERS * 2)
    for server, rows in lines.items():
        rows.sort(key=lambda row: row.more["connections"])
        places = [counts.index(row.more["connections"]) for row in rows]
        middle = [row.median or 0.0 for row in rows]
        below = [(row.median or 0.0) - (row.low if row.low is not None else row.median or 0.0) for row in rows]
        above = [(row.high if row.high is not None else row.median or 0.0) - (row.median or 0.0) for row in rows]
        ours, limit = server == "bzstream", server == "C sendfile"
        axes.errorbar(
            places, middle, yerr=[below, above], label=server, marker="o", markersize=4, capsize=2,
            linewidth=2.5 if ours else 1.2, linestyle="--" if limit else "-", zorder=3 if ours else 2,
            color=OURS if ours else LIMIT if limit else next(colours),
        )  # fmt: skip
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set(xlabel="connections", ylabel=unit, title=title, ylim=(0, None))
    axes.legend(fontsize=7.5, ncols=2)
    return True


def fleet(document: Mapping[str, Any], axes: Axes) -> bool:
    """When each miner had its slice: share of the miners over time."""
    found: dict[str, Any] = next((bench["series"] for bench in document["benches"] if bench["bench"] == "fleet"), {})
    if not found:
        return False
    kinds = (("clean_s", "all honest", OURS), ("misbehaving_s", "the others, while 5% stall and 5% drop", OTHERS[0]))
    for name, label, colour in kinds:
        times = sorted(found[name])
        share = [100 * (number + 1) / len(times) for number in range(len(times))]
        spread = max(times) / quantile(times, 0.5)
        axes.step(times, share, where="post", color=colour, label=f"{label}: slowest {spread:.2f}x the median")
    axes.set(
        xlabel="seconds after the start",
        ylabel="% of the miners have their slice",
        title=f"256 miners, 16 groups, {found['slice_mb']:.0f} MB each, one worker",
        xlim=(0, None),
        ylim=(0, 101),
    )
    axes.legend(fontsize=7.5, loc="upper left")
    return True


def targets(document: Mapping[str, Any], axes: Axes) -> bool:
    """Every figure that has a target, as a multiple of it: to the right of the line it is met."""
    judged = [
        (share, row)
        for bench in document["benches"]
        for row in rows_of(document, bench["bench"])
        if (share := margin(row)) is not None
    ]
    if not judged:
        return False
    judged.reverse()
    axes.figure.set_size_inches(8.5, 1.2 + 0.22 * len(judged))  # type: ignore[union-attr]
    axes.barh(
        range(len(judged)),
        [share - 1 for share, _ in judged],
        left=1,
        color=[RIGHT if row.met else WRONG for _, row in judged],
    )
    names = [f"{row.name}{f' / {row.peer}' if row.peer else ''}  ({row.target})" for _, row in judged]
    axes.set_yticks(range(len(judged)), names, fontsize=6.5)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _inside(tick, [one for one, _ in judged])]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="times as good as the goal (logarithmic)", title="Goals", ylim=(-0.7, len(judged) - 0.3))
    return True


def _inside(tick: float, shares: list[float]) -> bool:
    return min(*shares, 0.5) / 1.5 <= tick <= max(*shares, 2) * 1.5


PLOTS: dict[str, tuple[tuple[float, float], Painter]] = {
    "throughput": ((6.5, 4.0), throughput),
    "cost": ((6.5, 4.0), cost),
    "fleet": ((6.5, 3.6), fleet),
    "targets": ((8.5, 5.0), targets),
}
"""File name -> size in inches and what paints it; a painter says whether there was anything to paint."""
