"""Options that several commands have, and what every command does with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bzstream.config import Settings

__all__ = [
    "INTERRUPTED", "AsJson", "CaFile", "Config", "Hotkey", "LedgerFile", "Netuid", "Network", "ProofKey", "Receiver",
    "SigningKey", "Store", "StoreFolder", "Url", "UrlIfKnown", "VersionName", "caller", "client_command",
    "existing_ledger", "locate", "settings_of",
]  # fmt: skip

INTERRUPTED = 130
"""What shells expect after Ctrl-C: 128 and the number of SIGINT."""

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
CaFile = Annotated[str | None, typer.Option(help="PEM certificates to trust instead of the system's.")]
Config = Annotated[Path | None, typer.Option(help="Settings file (TOML).")]
Hotkey = Annotated[str | None, typer.Option(help="SS58 address to ask in the name of.")]
LedgerFile = Annotated[Path | None, typer.Option(help="SQLite file. Default: ledger.sqlite in the store.")]
Network = Annotated[
    str | None,
    typer.Option(help="WebSocket URL of a node of the chain: the validator is where it lists --validator-hotkey."),
]
Netuid = Annotated[int | None, typer.Option(min=0, max=65535, help="The subnet, with --network.")]
ProofKey = Annotated[
    str | None, typer.Option(help="Key file or wallet (<wallet>/<hotkey>) that proves it, afresh for every request.")
]
SigningKey = Annotated[
    str | None, typer.Option(help="Key file or wallet (<wallet>/<hotkey>) that signs the manifests.")
]
StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="The store: the folder of the snapshots.")]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="One of `bzstream versions STORE`.")]
Store = Annotated[Path | None, typer.Option(help="The store: the folder that `bzstream publish` writes.")]
Receiver = Annotated[
    str | None,
    typer.Option(help="SS58 address of the node, which proofs of --key name. Default: --validator-hotkey, else asked."),
]
Url = Annotated[str, typer.Argument(envvar="BZSTREAM_URL", help="Validator, such as http://10.0.0.7:8000.")]
UrlIfKnown = Annotated[
    str | None,
    typer.Argument(envvar="BZSTREAM_URL", help="Validator, such as http://10.0.0.7:8000; or see --network."),
]


def settings_of(config: Path | None, flags: Mapping[str, object]) -> Settings:
    """The settings from the file, the environment and the command's flags. Raises ConfigError."""
    from bzstream.config import load

    given = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return load(file=config, environment=os.environ, flags=given)


def existing_ledger(settings: Settings) -> str:
    """Where the ledger is. Raises ConfigError for a file that does not exist: opening it would make an empty one."""
    from bzstream.config import ConfigError

    location = settings.ledger_location()
    if "://" not in location and not Path(location).exists():
        raise ConfigError(f"there is no ledger {location}; give --store or --ledger")
    return location


@contextmanager
def client_command(stopped: str) -> Iterator[None]:
    """Turn a wrong use of the client into a usage error, and Ctrl-C into the sentence `stopped`."""
    from bzstream import client

    try:
        yield
    except (client.UsageError, client.BadUrl) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        print(f"bzstream: {stopped}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def locate(urls: Sequence[str], network: str | None, netuid: int | None, validator_hotkey: str | None) -> list[str]:
    """The URLs that were given, or the one that the chain lists for a validator. Raises BadParameter and ClientError.

    Only one: the token of a validator never goes to another one, and who looks for a hotkey may not know who it is.
    """
    if network is None:
        if netuid is not None:
            raise typer.BadParameter("--netuid goes with --network")
        if not urls:
            raise typer.BadParameter("give the URL of a validator, or --network, --netuid and --validator-hotkey")
        return list(urls)
    if netuid is None or validator_hotkey is None:
        raise typer.BadParameter("--network needs --netuid and --validator-hotkey, which say whom to find")
    if urls and list(urls) != os.environ.get("BZSTREAM_URL", "").split():
        raise typer.BadParameter("give a URL or --network, not both: the token is for one validator")
    from bzstream.client import find_axon

    return [find_axon(network, netuid, validator_hotkey)]


def caller(hotkey: str | None, key: str | None) -> tuple[str | None, str | None]:
    """The hotkey or the key of a command, from BZSTREAM_KEY or BZSTREAM_HOTKEY when neither is given."""
    if hotkey is None and key is None:
        key = os.environ.get("BZSTREAM_KEY") or None
        hotkey = None if key else os.environ.get("BZSTREAM_HOTKEY") or None
    return hotkey, key
