"""`bzstream pull`: fetch units from one validator or several, verified, resumable, as fast as the link."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

if TYPE_CHECKING:
    from bzstream.client import Progress, PullReport

__all__ = ["pull"]

PLAIN_EVERY_S = 5.0
"""Seconds between two lines where there is no terminal."""


def pull(
    url: Annotated[list[str], typer.Argument(help="Validator, such as http://10.0.0.7:8000; several share the work.")],
    out: Annotated[Path, typer.Option(help="Folder for the files; an interrupted pull goes on there.")],
    group: Annotated[
        list[int] | None, typer.Option(min=0, help="Expert group (may repeat): group-K.safetensors.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="The tensors of no expert: shared.safetensors.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole model: model.safetensors. For validators.")] = False,
    hotkey: Annotated[str | None, typer.Option(help="SS58 address to ask in the name of.")] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Key file or wallet (<wallet>/<hotkey>) that proves it, afresh for every request."),
    ] = None,
    mirror: Annotated[
        list[str] | None, typer.Option(help="Another validator with the same version (may repeat).")
    ] = None,
    connections: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: as many as help.")] = None,
    verify: Annotated[
        str, typer.Option(help="sha256: each chunk's BLAKE3 and the file's SHA-256; blake3: the chunks; none: sizes.")
    ] = "sha256",
    validator_hotkey: Annotated[
        str | None, typer.Option(help="SS58 address that must have signed the hashes; without it see above.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Stay with this model version instead of the current one.")
    ] = None,
    ca_file: Annotated[Path | None, typer.Option(help="PEM certificates to trust instead of the system's.")] = None,
    stall: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte after which a connection is given up.")
    ] = 15.0,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte from anybody that end the pull.")
    ] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and progress as JSON lines on stderr.")
    ] = False,
) -> None:
    """Fetch a group's slice, the shared tensors or the full model.

    What the hashes protect against: every chunk is compared with the validator's manifest, so that nothing damaged on
    a disk or on the way gets a final name. But the manifest comes over the same connection. Over plain http, somebody
    on the way can change both, unless --validator-hotkey names who must have signed the manifest; over https the
    server's certificate vouches for it. Neither says that the version is the newest one.

    The token comes from BZ_AUTH_TOKEN. Ctrl-C stops at once; the same command goes on where it stopped.
    """
    if verify not in ("sha256", "blake3", "none"):
        raise typer.BadParameter("--verify is sha256, blake3 or none")
    from bzstream import client

    show: _Show = _Json() if as_json else _Bar() if sys.stderr.isatty() else _Lines()
    began = time.monotonic()
    try:
        with show.running() as progress:
            report = client.pull(
                [*url, *(mirror or ())],
                out=out,
                groups=group or (),
                shared=shared,
                full=full,
                hotkey=hotkey,
                key=key,
                connections=connections,
                verify=cast(Literal["sha256", "blake3", "none"], verify),
                validator_hotkey=validator_hotkey,
                version=version,
                ca_file=str(ca_file) if ca_file is not None else None,
                progress=progress,
                notify=show.line,
                tuning=client.Tuning(stall_s=stall, patience_s=patience),
            )
    except (client.UsageError, client.BadUrl) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        raise client.Stopped("stopped; the same command goes on from here") from None
    show.result(report, time.monotonic() - began)


class _Show:
    """How a pull is shown; `line` may be called from any thread."""

    @contextmanager
    def running(self) -> Iterator[Callable[[Progress], None]]:
        yield self.progress

    def progress(self, moment: Progress) -> None:
        raise NotImplementedError

    def line(self, text: str) -> None:
        print(f"bzstream: {text}", file=sys.stderr)

    def result(self, report: PullReport, seconds: float) -> None:
        for unit in report.units:
            kept = f", {_size(unit.reused)} were there already" if unit.reused else ""
            again = f", {unit.chunks_fetched_again} chunks fetched again" if unit.chunks_fetched_again else ""
            signed = f", signed by {unit.signed_by}" if unit.signed_by else ""
            speed = f" at {_size(unit.fetched / unit.seconds)}/s" if unit.fetched and unit.seconds else ""
            print(
                f"{unit.path}: {_size(unit.size)} of version {unit.version}, fetched {_size(unit.fetched)}{speed}"
                f"{kept}{again}{signed}"
            )
            print(f"  {unit.content_hash}")


class _Lines(_Show):
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def progress(self, moment: Progress) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_EVERY_S:
            return
        self._last = now
        left = f", {moment.seconds_left:.0f} s left" if moment.seconds_left is not None else ""
        print(
            f"{moment.label} {moment.version}: {moment.stage}, {100 * moment.present / moment.size:.0f}% of "
            f"{_size(moment.size)} ({100 * moment.verified / moment.size:.0f}% verified), {_size(moment.rate)}/s"
            f"{left}, {moment.connections} connections",
            file=sys.stderr,
        )


class _Json(_Show):
    """For scripts: progress as JSON lines on stderr, the result as one document on stdout."""

    def __init__(self) -> None:
        self._last = 0.0

    def progress(self, moment: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= 1.0:
            self._last = now
            print(json.dumps({"progress": dataclasses.asdict(moment)}), file=sys.stderr)

    def line(self, text: str) -> None:
        print(json.dumps({"notice": text}), file=sys.stderr)

    def result(self, report: PullReport, seconds: float) -> None:
        document: dict[str, Any] = {"version": report.version, "seconds": seconds, "units": []}
        for unit in report.units:
            document["units"].append({**dataclasses.asdict(unit), "path": str(unit.path)})
        print(json.dumps(document, indent=2))


class _Bar(_Show):
    """A bar on a terminal: bytes, speed, time left, verified share, connections."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def running(self) -> Iterator[Callable[[Progress], None]]:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(None, complete_style="green", finished_style="green"),
            TextColumn("{task.fields[bytes]} [cyan]{task.fields[speed]}[/] {task.fields[left]}"),
            TextColumn("[dim]{task.fields[more]}[/]"),
        )
        with RichProgress(*columns, console=self._console, transient=True, expand=True) as bar:
            tasks: dict[str, Any] = {}

            def update(moment: Progress) -> None:
                task = tasks.get(moment.label)
                fields = _fields(moment)
                if task is None:
                    task = tasks[moment.label] = bar.add_task(moment.label, total=moment.size, **fields)
                bar.update(task, completed=moment.present, total=moment.size, **fields)

            yield update

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, style="yellow")


def _fields(moment: Progress) -> dict[str, Any]:
    """What stands beside the bar."""
    left = ""
    if moment.stage == "fetching" and moment.seconds_left is not None:
        minutes, seconds = divmod(round(moment.seconds_left), 60)
        left = f"{minutes}:{seconds:02d} left"
    more = f"{100 * moment.verified / moment.size:.0f}% verified · {moment.connections} connections"
    if moment.stage != "fetching":
        more = {"hashing": f"SHA-256 {100 * moment.hashed / moment.size:.0f}%"}.get(moment.stage, moment.stage)
    return {
        "bytes": f"{_size(moment.present)} / {_size(moment.size)}",
        "speed": f"{_size(moment.rate)}/s" if moment.rate else "",
        "left": left,
        "more": more,
    }


def _size(count: float) -> str:
    """Bytes for a person, in decimal units as links are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
