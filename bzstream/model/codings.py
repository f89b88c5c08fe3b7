"""The codings of a snapshot: `codings.json` beside `snapshot.json`, and the coded files in the folder `coded`.

    snapshots/<version>/codings.json              written anew, atomically, when more coded files are there
                        coded/<file>.<base>.planes-1        the coded chunks of one unit, one after the other
                        coded/<file>.<base>.planes-1.json   its entry, written after it: it is complete

`encode_units` writes them after a version was published, and `snapshot_cache` reads them: a version gains codings
while it is served. Its units stay what they are; only their manifests get longer, and are signed again.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from bzstream.model.errors import StoreDamaged
from bzstream.model.record import ManifestSigner, SnapshotRecord, UnitRecord, manifest_fields, unit_envelope
from bzstream.util.durable import write_file

__all__ = [
    "CODED_KINDS",
    "Codings",
    "UnitCoding",
    "UnitCodings",
    "manifest_with_codings",
    "read_codings",
    "sign_codings",
    "write_codings",
]

CODED_KINDS = ("partial", "shared", "ungrouped")
"""Kinds of units that are coded: those that miners fetch."""

RECORD = "codings.json"


class UnitCoding(Struct, frozen=True, kw_only=True):
    """One coded form of one unit. Chunk i of the payload lies coded at `chunks[i]`: (offset, length, BLAKE3).

    `base` is the content hash of the version of the unit that it is a difference to, None when it stands alone.
    `size` is that of `file` (a name in the folder `coded`), 0 when the unit does not shrink: then there is no file.
    """

    name: str
    base: str | None
    file: str
    size: int
    chunks: tuple[tuple[int, int, str], ...]

    def as_manifest(self) -> dict[str, object]:
        """Its entry in the manifest's `codings`."""
        return {
            "name": self.name,
            "base": self.base,
            "size": self.size,
            "chunks": [list(chunk) for chunk in self.chunks],
        }


class UnitCodings(Struct, frozen=True):
    """All codings of one unit, and the signature over its manifest with them in it."""

    codings: tuple[UnitCoding, ...]
    signature: str | None


class Codings(Struct, frozen=True):
    """What codings.json holds: by label of the unit. `hotkey` is whose signatures they are."""

    hotkey: str | None
    units: dict[str, UnitCodings]


def read_codings(folder: Path) -> Codings | None:
    """The codings of the snapshot in `folder`, None when there are none yet. Raises StoreDamaged."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Codings)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreDamaged(f"{folder / RECORD} cannot be used: {error}") from None


def write_codings(folder: Path, codings: Codings) -> None:
    """Put them in force: servers take them in within a second. Raises OSError."""
    write_file(folder / RECORD, msgspec.json.encode(codings))


def sign_codings(
    record: SnapshotRecord, units: dict[str, tuple[UnitCoding, ...]], signer: ManifestSigner | None
) -> Codings:
    """What codings.json is to hold. `signer` has the hotkey that signed the record, None if nobody did."""
    assert record.hotkey == (signer.ss58_address if signer else None)
    found = {}
    for unit in record.units:
        if codings := units.get(unit.label):
            fields = manifest_with_codings(record, unit, codings)
            found[unit.label] = UnitCodings(codings, signer.sign_fields(fields) if signer else None)
    return Codings(record.hotkey, found)


def manifest_with_codings(
    record: SnapshotRecord, unit: UnitRecord, codings: tuple[UnitCoding, ...]
) -> dict[str, object]:
    """The manifest without its signature: what is signed."""
    fields = manifest_fields(record, unit, len(unit_envelope(record, unit)))
    return {**fields, "codings": [coding.as_manifest() for coding in codings]} if codings else fields
