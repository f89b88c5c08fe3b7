"""How `pull` and `sync` show what they do: to a person, to a script, or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from bzstream.cli._progress import Moment, Throttle, byte_count, show_progress

if TYPE_CHECKING:
    from rich.console import Console

    from bzstream.client import Progress, PullReport
    from bzstream.client.sync import SyncReport

__all__ = ["Display", "JsonDisplay", "QuietDisplay", "bytes_per_second"]


def bytes_per_second(text: str | None) -> float | None:
    """The number in `--max-speed`. Raises BadParameter."""
    if text is None:
        return None
    form = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,3})?)([kMG]?)", text, re.ASCII)
    rate = float(form[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[form[2]] if form else 0.0
    if rate < 1:
        raise typer.BadParameter("--max-speed is a number of bytes a second such as 800k, 50M or 1.5G")
    return rate


class Display:
    """How a pull or a sync is shown to a person; `line` may be called from any thread."""

    _console: Console | None = None

    @contextmanager
    def running(self) -> Iterator[Callable[[Progress], None]]:
        if sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
        with show_progress(self._console) as show:
            yield lambda progress: show(_moment(progress))

    def line(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, style="yellow")
        else:
            print(f"bzstream: {text}", file=sys.stderr)

    def would_fetch(self, report: PullReport) -> None:
        for unit in report.units:
            size, missing = byte_count(unit.size), byte_count(unit.fetched)
            print(f"{unit.path}: version {unit.version}, {size}, of which {missing} would be fetched")

    def synced(self, report: SyncReport) -> None:
        signed = f", signed by {report.signed_by}" if report.signed_by else ""
        if report.changed:
            print(
                f"{report.version} (block {report.block}) is current: fetched {byte_count(report.fetched)}, linked "
                f"{byte_count(report.linked)} that did not change, {report.seconds:.1f} s{signed}",
                flush=True,
            )
            if report.retired:
                print(f"deleted: {', '.join(report.retired)}", flush=True)
        else:
            print(f"{report.version} (block {report.block}) was current already{signed}", flush=True)

    def result(self, report: PullReport, seconds: float) -> None:
        for unit in report.units:
            gained = f", {byte_count(unit.gained)} saved by coding" if unit.gained else ""
            kept = f", {byte_count(unit.reused)} were there already" if unit.reused else ""
            again = f", {unit.chunks_fetched_again} chunks fetched again" if unit.chunks_fetched_again else ""
            signed = f", signed by {unit.signed_by}" if unit.signed_by else ""
            speed = f" at {byte_count(unit.fetched / unit.seconds)}/s" if unit.fetched and unit.seconds else ""
            print(
                f"{unit.path}: {byte_count(unit.size)} of version {unit.version}, fetched "
                f"{byte_count(unit.fetched)}{speed}{gained}{kept}{again}{signed}"
            )
            print(f"  {unit.content_hash}")


class QuietDisplay(Display):
    """For scripts that only look at the exit status."""

    @contextmanager
    def running(self) -> Iterator[Callable[[Progress], None]]:
        yield lambda progress: None

    def line(self, text: str) -> None:
        pass

    def would_fetch(self, report: PullReport) -> None:
        pass

    def synced(self, report: SyncReport) -> None:
        pass

    def result(self, report: PullReport, seconds: float) -> None:
        pass


class JsonDisplay(Display):
    """For scripts: progress as JSON lines on stderr, the result as one document on stdout."""

    @contextmanager
    def running(self) -> Iterator[Callable[[Progress], None]]:
        throttle = Throttle(1.0)

        def show(progress: Progress) -> None:
            if throttle.due():
                print(json.dumps({"progress": dataclasses.asdict(progress)}), file=sys.stderr)

        yield show

    def line(self, text: str) -> None:
        print(json.dumps({"notice": text}), file=sys.stderr)

    def would_fetch(self, report: PullReport) -> None:
        self.result(report, 0.0)

    def synced(self, report: SyncReport) -> None:
        print(json.dumps(dataclasses.asdict(report), default=str), flush=True)

    def result(self, report: PullReport, seconds: float) -> None:
        document: dict[str, Any] = {"version": report.version, "seconds": seconds, "units": []}
        for unit in report.units:
            document["units"].append({**dataclasses.asdict(unit), "path": str(unit.path)})
        print(json.dumps(document, indent=2))


def _moment(progress: Progress) -> Moment:
    """A pull's progress as the bar or the line shows it."""
    verified = f"{100 * progress.verified / progress.size:.0f}% verified, {progress.connections} connections"
    hashed = {"hashing": f"SHA-256 {100 * progress.hashed / progress.size:.0f}%"}.get(progress.stage, progress.stage)
    fetching = progress.stage == "fetching"
    return Moment(
        progress.label,
        progress.present,
        progress.size,
        progress.rate,
        progress.seconds_left if fetching else None,
        verified if fetching else hashed,
    )
