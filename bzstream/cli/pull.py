"""`bzstream pull`: fetch units from one validator or several, verified, resumable, as fast as the link."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bzstream.cli._options import CaFile, Hotkey, Netuid, Network, ProofKey, Receiver, caller, client_command, locate
from bzstream.cli._output import flush_results
from bzstream.cli._progress import Moment, Throttle, byte_count, show_progress

if TYPE_CHECKING:
    from rich.console import Console

    from bzstream.client import Progress, PullReport

__all__ = ["pull"]


def pull(
    url: Annotated[
        list[str] | None,
        typer.Argument(
            envvar="BZSTREAM_URL",
            help="Validator, such as http://10.0.0.7:8000; several share the work; or see --network.",
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the files; an interrupted pull goes on there.")],
    group: Annotated[
        list[int] | None, typer.Option(min=0, help="Expert group (may repeat): group-K.safetensors.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="The tensors of no expert: shared.safetensors.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole model: model.safetensors. For validators.")] = False,
    hotkey: Hotkey = None,
    key: ProofKey = None,
    mirror: Annotated[
        list[str] | None, typer.Option(help="Another validator with the same version (may repeat).")
    ] = None,
    connections: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: as many as help.")] = None,
    verify: Annotated[
        Literal["sha256", "blake3", "none"],
        typer.Option(help="sha256: each chunk's BLAKE3 and the file's SHA-256; blake3: the chunks; none: sizes."),
    ] = "sha256",
    coding: Annotated[
        Literal["auto", "off"],
        typer.Option(help="auto: coded forms (fewer bytes) where the link is slower than decoding; off: never."),
    ] = "auto",
    validator_hotkey: Annotated[
        str | None, typer.Option(help="SS58 address that must have signed the hashes; without it see above.")
    ] = None,
    network: Network = None,
    netuid: Netuid = None,
    receiver: Receiver = None,
    version: Annotated[
        str | None, typer.Option(help="Stay with this model version instead of the current one.")
    ] = None,
    ca_file: CaFile = None,
    stall: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte after which a connection is given up.")
    ] = 15.0,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte from anybody that end the pull.")
    ] = 60.0,
    max_speed: Annotated[
        str | None, typer.Option(help="Most bytes a second, such as 800k or 50M (millions). Default: no limit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be fetched; nothing is written.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no result: only errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and progress as JSON lines on stderr.")
    ] = False,
) -> None:
    """Fetch a group's slice, the shared tensors or the full model.

    What the hashes protect against: every chunk is compared with the validator's manifest, so that nothing damaged on
    a disk or on the way gets a final name. But the manifest comes over the same connection. Over plain http, somebody
    on the way can change both, unless --validator-hotkey names who must have signed the manifest; over https the
    server's certificate vouches for it. Neither says that the version is the newest one.

    The token comes from BZ_AUTH_TOKEN; URL, hotkey or key from BZSTREAM_URL, BZSTREAM_HOTKEY or BZSTREAM_KEY when
    none is given. Ctrl-C stops at once; the same command goes on where it stopped.
    """
    from bzstream import client

    show = _Quiet() if quiet else _Json() if as_json else _Show()
    rate = _bytes_per_second(max_speed)
    hotkey, key = caller(hotkey, key)
    began = time.monotonic()
    with client_command("stopped; the same command goes on from here"), show.running() as progress:
        report = client.pull(
            locate([*(url or ()), *(mirror or ())], network, netuid, validator_hotkey),
            out=out,
            groups=group or (),
            shared=shared,
            full=full,
            hotkey=hotkey,
            key=key,
            connections=connections,
            verify=verify,
            coding=coding,
            validator_hotkey=validator_hotkey,
            receiver=receiver,
            version=version,
            ca_file=ca_file,
            progress=progress,
            notify=show.line,
            tuning=client.Tuning(stall_s=stall, patience_s=patience, max_rate=rate),
            dry_run=dry_run,
        )
    if dry_run:
        show.would_fetch(report)
    else:
        show.result(report, time.monotonic() - began)
    # The files are complete and durable, whatever becomes of these lines.
    flush_results("done, but the result cannot be printed" if not dry_run else "the result cannot be printed")


def _bytes_per_second(text: str | None) -> float | None:
    """The number in `--max-speed`. Raises BadParameter."""
    if text is None:
        return None
    form = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,3})?)([kMG]?)", text, re.ASCII)
    rate = float(form[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[form[2]] if form else 0.0
    if rate < 1:
        raise typer.BadParameter("--max-speed is a number of bytes a second such as 800k, 50M or 1.5G")
    return rate


class _Show:
    """How a pull is shown to a person; `line` may be called from any thread."""

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


class _Quiet(_Show):
    """For scripts that only look at the exit status."""

    @contextmanager
    def running(self) -> Iterator[Callable[[Progress], None]]:
        yield lambda progress: None

    def line(self, text: str) -> None:
        pass

    def would_fetch(self, report: PullReport) -> None:
        pass

    def result(self, report: PullReport, seconds: float) -> None:
        pass


class _Json(_Show):
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
