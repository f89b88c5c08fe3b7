"""`bzstream pull`: fetch units from one validator or several, verified, resumable, as fast as the link."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from bzstream.cli._options import CaFile, Hotkey, Netuid, Network, ProofKey, Receiver, caller, client_command, locate
from bzstream.cli._output import flush_results
from bzstream.cli._transfers import Display, JsonDisplay, QuietDisplay, bytes_per_second

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

    show = QuietDisplay() if quiet else JsonDisplay() if as_json else Display()
    rate = bytes_per_second(max_speed)
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
