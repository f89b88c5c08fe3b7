"""Progress of work on bytes: a bar on a terminal, a line now and then elsewhere.

It goes to standard error, so that what a command prints can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Moment", "Throttle", "byte_count", "progress_bar", "show_progress"]

LINES_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal: a 62 GB publish leaves a handful in a log."""


class Moment(NamedTuple):
    """How far the work on one thing is. `done` of `total` bytes at `rate` bytes a second."""

    label: str
    done: int
    total: int
    rate: float
    seconds_left: float | None
    more: str = ""


class Throttle:
    """Lets one call in so many seconds through. The first that long after it was made."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


@contextmanager
def show_progress(console: Console | None = None) -> Iterator[Callable[[Moment], None]]:
    """A function that shows where the work is: on `console`, a terminal, as one bar a label; without one as lines."""
    if console is None:
        throttle = Throttle(LINES_EVERY_S)
        yield lambda moment: print(_line(moment), file=sys.stderr) if throttle.due() else None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(None, complete_style="green", finished_style="green"),
        TextColumn("{task.fields[bytes]} [cyan]{task.fields[speed]}[/] {task.fields[left]}"),
        TextColumn("[dim]{task.fields[more]}[/]"),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bars:
        tasks: dict[str, Any] = {}

        def update(moment: Moment) -> None:
            fields = _fields(moment)
            if moment.label not in tasks:
                tasks[moment.label] = bars.add_task(moment.label, total=moment.total, **fields)
            bars.update(tasks[moment.label], completed=moment.done, total=moment.total, **fields)

        yield update


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told (bytes done, bytes in all), for as long as the context lasts."""
    console = None
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
    begun = time.monotonic()
    with show_progress(console) as show:

        def update(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - begun, 1e-9)
            show(Moment(label, done, total, rate, (total - done) / rate if rate else None))

        yield update


def byte_count(count: float) -> str:
    """Bytes for a person, in decimal units as links are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _line(moment: Moment) -> str:
    share = f"{100 * moment.done / moment.total:.0f}% of {byte_count(moment.total)}"
    left = f", {moment.seconds_left:.0f} s left" if moment.seconds_left is not None else ""
    return f"{moment.label}: {share}, {byte_count(moment.rate)}/s{left}{', ' * bool(moment.more)}{moment.more}"


def _fields(moment: Moment) -> dict[str, Any]:
    """What stands beside the bar."""
    left = ""
    if moment.seconds_left is not None:
        minutes, seconds = divmod(round(moment.seconds_left), 60)
        left = f"{minutes}:{seconds:02d} left"
    return {
        "bytes": f"{byte_count(moment.done)} / {byte_count(moment.total)}",
        "speed": f"{byte_count(moment.rate)}/s" if moment.rate else "",
        "left": left,
        "more": moment.more,
    }
