"""The command line of a bench that runs alone: `--quick`, `--json FILE`, its own options, and its rows as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.report import show
from bench.rows import read_outcome

__all__ = ["command"]


def command(
    name: str,
    description: str | None,
    measure: Callable[..., dict[str, Any]],
    options: Callable[[argparse.ArgumentParser], object] | None = None,
) -> None:
    """Run `measure(quick=..., **own)`, which returns `rows`, perhaps `missing`, `notes` and `series`; show them.

    `options` adds the bench's own options to the parser; each becomes a parameter of `measure`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    if options is not None:
        options(parser)
    arguments = vars(parser.parse_args())
    file: Path | None = arguments.pop("json")
    report = measure(**arguments)
    if file is not None:
        file.write_text(json.dumps(report, indent=2), encoding="utf-8")
    show([read_outcome(name, report, 0.0)], {}, Console())
