"""Results for people: a table on the terminal, and one in Markdown for the README.

python -m bench.report results.json > table.md
python -m bench.report results.json --targets     only the figures that have a goal
python -m bench.report one.json two.json --json all.json --plots FOLDER     several runs joined, the later one counts
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import in_words
from bench.rows import Outcome, Row, read_row

__all__ = ["figure", "join", "markdown", "show", "verdict"]

HEADINGS = ("figure", "of", "median", "spread", "against", "goal", "")


def figure(value: float | None) -> str:
    """A number in three digits or so, without an exponent."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    return f"{value:,.{digits}f}"


def verdict(row: Row) -> str:
    """Whether a target is met, in a word; nothing without one."""
    return "" if row.met is None else "met" if row.met else "not met"


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table shows it."""
    spread = "" if row.low is None or row.high is None else f"{figure(row.low)} – {figure(row.high)}"
    against = f"{figure(row.ratio)}x {row.peer}".strip() if row.ratio is not None else row.peer
    return (
        row.name,
        row.subject,
        f"{figure(row.median)} {row.unit}".strip(),
        spread,
        against,
        row.target,
        verdict(row),
    )


def show(outcomes: Sequence[Outcome], titles: Mapping[str, str], console: Console) -> None:
    """One table a bench, and a sentence for each that is not there."""
    colours = {"met": "[green]met[/]", "not met": "[red]not met[/]"}
    for outcome in outcomes:
        console.print(f"\n[bold]{titles.get(outcome.bench, outcome.bench)}[/] [dim]{outcome.seconds:.0f} s[/]")
        if outcome.status != "done":
            console.print(f"  {outcome.status}: {outcome.reason}", markup=False)
        for sentence in outcome.missing:
            console.print(f"  not here: {sentence}", markup=False)
        if outcome.rows:
            table = Table(*HEADINGS, box=None, padding=(0, 2, 0, 0), header_style="dim")
            for index in (2, 3, 4):
                table.columns[index].justify = "right"
            for row in outcome.rows:
                *plain, word = cells(row)
                table.add_row(*plain, colours.get(word, word))
            console.print(table)
        if outcome.notes:
            console.print(outcome.notes, markup=False, soft_wrap=True)


def markdown(document: Mapping[str, Any], *, only_targets: bool = False) -> str:
    """The README's tables from the JSON that `python -m bench` writes. Raises KeyError for another JSON."""
    lines = [f"Measured {document['date']} on {in_words(document['machine'])}; {_versions(document['machine'])}."]
    if document["quick"]:
        lines += ["", "**A quick run: it shows that everything works; its figures mean little.**"]
    for bench in document["benches"]:
        rows = [read_row(bench["bench"], raw) for raw in bench["rows"]]
        if only_targets:
            rows = [row for row in rows if row.target]
        if not rows and only_targets:
            continue
        lines += ["", f"### {bench['title']}", ""]
        if bench["status"] != "done":
            lines.append(f"Not measured: {bench['reason']}")
        if rows:
            lines += [_line(HEADINGS), "|---|---|--:|--:|--:|---|---|", *(_line(cells(row)) for row in rows)]
        lines += [f"\nNot measured: {sentence}" for sentence in bench["missing"]]
        if bench["notes"] and not only_targets:
            lines += ["", *(f"{line}  " for line in bench["notes"].splitlines())]
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def join(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs on one machine as one: of a bench that is in several, the last that was done counts.

    Raises ValueError for runs on different machines.
    """
    first, *others = documents
    if any(_hardware(other) != _hardware(first) for other in others):
        raise ValueError("these runs were made on different machines; they cannot be joined")
    benches: dict[str, Any] = {}
    for document in documents:
        for bench in document["benches"]:
            if bench["status"] == "done" or benches.get(bench["bench"], bench)["status"] != "done":
                benches[bench["bench"]] = bench
    dates = sorted({document["date"] for document in documents})
    commits = dict.fromkeys(str(document["commit"]) for document in documents)
    return {
        **documents[-1],
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        "quick": any(document["quick"] for document in documents),
        "seconds": sum(document["seconds"] for document in documents),
        "commit": ", ".join(commits),
        "benches": list(benches.values()),
    }


def _hardware(document: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(document["machine"].get(part) for part in ("cpu", "cores", "kernel"))


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _versions(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what `python -m bench --json FILE` wrote")
    parser.add_argument("--targets", action="store_true", help="only rows with a target")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the joined runs there")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG and SVG of them there")
    arguments = parser.parse_args()
    document = join([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results])
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.plots:
        from bench import plots

        plots.draw(document, arguments.plots)
    print(markdown(document, only_targets=arguments.targets), end="")


if __name__ == "__main__":
    main()
