"""Progress of work on bytes: a bar with speed and time left on a terminal, a line now and then elsewhere.

It goes to standard error, so that what a command prints can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]

PLAIN_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal: a 62 GB publish leaves a handful in a log."""


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told (bytes done, bytes in all), for as long as the context lasts."""
    if not sys.stderr.isatty():
        yield _plain(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(what: str) -> Callable[[int, int], None]:
    begun = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S:
            return
        last = now
        speed = done / (now - begun)
        left = (total - done) / speed if speed else 0.0
        print(
            f"{what}: {100 * done / total:.0f}% of {total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left",
            file=sys.stderr,
        )

    return report
