"""What is said of a unit in the end."""

from __future__ import annotations

from pathlib import Path

from bzstream.client.errors import WrongHash
from bzstream.client.manifest import Manifest
from bzstream.client.progress import UnitReport
from bzstream.client.transfer import Transfer

__all__ = ["unit_report", "wrong_whole"]


def unit_report(manifest: Manifest, transfer: Transfer | None, path: Path | None = None) -> UnitReport:
    """The report of a finished unit; without a transfer everything was there already."""
    fetched = transfer.fetched if transfer is not None else 0
    return UnitReport(
        label=manifest.want.label,
        version=manifest.version,
        block=manifest.block,
        content_hash=manifest.content_hash,
        size=manifest.size,
        fetched=fetched,
        reused=max(0, manifest.size - fetched),
        seconds=transfer.seconds if transfer is not None else 0.0,
        connections=transfer.most_lanes if transfer is not None else 0,
        chunks_fetched_again=transfer.again if transfer is not None else 0,
        signed_by=manifest.validator_hotkey if manifest.signed else None,
        path=path,
    )


def wrong_whole(manifest: Manifest) -> WrongHash:
    """The whole's SHA-256 differs although every chunk was right: the manifest contradicts itself."""
    return WrongHash(
        f"{manifest.want.label} has another SHA-256 than its manifest says, although every chunk is right: "
        "the manifest is wrong or was changed on the way"
    )
