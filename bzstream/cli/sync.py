"""`bzstream sync`: a peer validator's snapshot into this store, verified, only what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bzstream.cli._options import CaFile, Config, Hotkey, ProofKey, Receiver, Store, caller, client_command, settings_of
from bzstream.cli._output import flush_results
from bzstream.cli._transfers import Display, JsonDisplay, QuietDisplay, bytes_per_second

__all__ = ["sync"]


def sync(
    url: Annotated[
        list[str],
        typer.Argument(envvar="BZSTREAM_URL", help="Peer, such as http://10.0.0.7:8000; further ones share the work."),
    ],
    store: Store = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Stay with the peer: take each version that it makes current.")
    ] = False,
    version: Annotated[str | None, typer.Option(help="This version instead of the peer's current one.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Versions that stay in the store.")] = None,
    hotkey: Hotkey = None,
    key: ProofKey = None,
    validator_hotkey: Annotated[
        str | None, typer.Option(help="SS58 address that must have signed the snapshot and its hashes.")
    ] = None,
    receiver: Receiver = None,
    connections: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: as many as help.")] = None,
    ca_file: CaFile = None,
    stall: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte after which a connection is given up.")
    ] = 15.0,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte from anybody that end the transfer.")
    ] = 60.0,
    max_speed: Annotated[
        str | None, typer.Option(help="Most bytes a second, such as 800k or 50M (millions). Default: no limit.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no result: only errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each result, and progress as JSON lines on stderr.")
    ] = False,
    config: Config = None,
) -> None:
    """Bring a peer validator's snapshot into this store and make it current: units, config files, expert map.

    Only what changed crosses the network. Every hash is checked, and every signature that is there; with
    --validator-hotkey it must be there. A peer that shows an older snapshot than before is refused. Whatever goes
    wrong, what is served stays as it was.

    The peer must know the caller as a validator: by a token in BZ_AUTH_TOKEN that is bound to --hotkey, or by --key,
    which also signs the new snapshot. Ctrl-C stops at once; the same command goes on where it stopped.
    """
    if follow and version is not None:
        raise typer.BadParameter("--follow takes each new version; give either --follow or --version")
    settings = settings_of(config, {"store.path": store, "store.keep": keep})
    if settings.store.path is None:
        raise typer.BadParameter("give --store STORE (or the setting store.path)")
    from bzstream import client
    from bzstream.client.sync import SyncOptions, follow_peer
    from bzstream.client.sync import sync as sync_once

    display = QuietDisplay() if quiet else JsonDisplay() if as_json else Display()
    hotkey, key = caller(hotkey, key)
    rate = bytes_per_second(max_speed)
    with client_command("stopped; the same command goes on from here"), display.running() as progress:
        options: SyncOptions = {
            "store": Path(settings.store.path),
            "keep": settings.store.keep,
            "hotkey": hotkey,
            "key": key,
            "validator_hotkey": validator_hotkey,
            "receiver": receiver,
            "connections": connections,
            "ca_file": ca_file,
            "progress": progress,
            "notify": display.line,
            "tuning": client.Tuning(stall_s=stall, patience_s=patience, max_rate=rate),
        }
        if follow:
            follow_peer(url, display.synced, **options)
        else:
            report = sync_once(url, version=version, **options)
    display.synced(report)
    flush_results("done, but the result cannot be printed")
