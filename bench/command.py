"""The command line of a bench that runs alone: `--quick`, `--json FILE`, and its rows as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.report import show
from bench.rows import Outcome, read_row

__all__ = ["command"]


def command(name: str, description: str | None, measure: Callable[[bool], dict[str, Any]]) -> None:
    """Run `measure(quick)`, which returns `rows`, perhaps `missing` (sentences) and `notes`; show what it found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    report = measure(arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    outcome = Outcome(
        name,
        "done",
        rows=tuple(read_row(name, row) for row in report["rows"]),
        missing=tuple(report.get("missing", ())),
        notes=report.get("notes", ""),
    )
    show([outcome], {}, Console())
