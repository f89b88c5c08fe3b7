"""What a snapshot says of itself: snapshot.json, and everything that is served beside the tensors' own bytes.

`snapshot.json` is `{"checksum": "<SHA-256 of the snapshot's JSON>", "snapshot": {…}}`, so that a damaged record is
noticed like a damaged unit file. Envelopes, ETags and manifests follow from the record; their byte layouts are the
contract's and therefore exact.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import Struct, structs

from bzstream.model.digest import CHUNK
from bzstream.model.errors import StoreDamaged

__all__ = [
    "ACTIVATION",
    "FILES",
    "FORMAT",
    "Activation",
    "FileRecord",
    "ManifestSigner",
    "SnapshotRecord",
    "UnitRecord",
    "decode_record",
    "encode_record",
    "enveloped_etag",
    "make_envelope",
    "manifest_fields",
    "read_activation",
    "read_record",
    "sign_record",
    "unit_envelope",
]

FILES = "files"
"""The folder of the small files in a snapshot's folder."""

ACTIVATION = "activation.json"
"""Beside snapshot.json once a version was made current a second time."""

FORMAT = 1
"""Of snapshot.json. A release that cannot read a record's format says so instead of guessing."""


class ManifestSigner(Protocol):
    """Signs manifests with a validator's hotkey: `chain.keys.Key` does."""

    @property
    def ss58_address(self) -> str:
        """SS58 address of the signing hotkey."""

    def sign_fields(self, fields: Mapping[str, object]) -> str:
        """The URL-safe base64 signature over the canonical JSON of `fields`."""


class UnitRecord(Struct, frozen=True, kw_only=True):
    """One unit. `kind` is "shared", "partial", "ungrouped" or "full"; sizes are in bytes, hashes lower-case hex.

    `file` is None for the full view, and `mtime_ns` (of the file when it was published) 0.
    """

    kind: str
    group: int | None
    file: str | None
    size: int
    mtime_ns: int
    sha256: str
    chunks: tuple[str, ...]
    experts: dict[int, tuple[int, ...]]
    signature: str | None

    @property
    def label(self) -> str:
        return f"partial/{self.group}" if self.kind == "partial" else self.kind

    @property
    def content_hash(self) -> str:
        return f"sha256:{self.sha256}"


class FileRecord(Struct, frozen=True):
    """One small file in the snapshot's folder `files`; `size` in bytes, `sha256` lower-case hex."""

    name: str
    size: int
    sha256: str


class Activation(Struct, frozen=True):
    """When a version was made current: `sequence` rises with every activation, `at` is in seconds since 1970.

    `at` is later than that of the activation before, and so lies in the future for as long as the clock was ahead then.
    """

    sequence: int
    at: int


class SnapshotRecord(Struct, frozen=True, kw_only=True):
    """One version. `sequence` and `published_at` are its first activation's.

    The full view is `view_head` (base64) followed by `view`, (index into `units`, offset in its file, length).
    `layers` is layer -> number of experts, `orientation` what `naming.fused_orientation` found. `config` is what
    config.json said in stores that do not keep the file itself.
    """

    format: int
    version: str
    block: int
    sequence: int
    published_at: int
    hotkey: str | None
    orientation: str | None
    layers: dict[int, int]
    config: dict[str, Any] | None = None
    files: tuple[FileRecord, ...] = ()
    units: tuple[UnitRecord, ...]
    view_head: str
    view: tuple[tuple[int, int, int], ...]

    @property
    def head(self) -> bytes:
        """The bytes before the full view's data."""
        return base64.b64decode(self.view_head)


class _Checked(Struct, frozen=True):
    checksum: str
    snapshot: msgspec.Raw


def encode_record(record: SnapshotRecord) -> bytes:
    """The content of snapshot.json."""
    body = msgspec.json.encode(record)
    return msgspec.json.encode(_Checked(hashlib.sha256(body).hexdigest(), msgspec.Raw(body)))


def decode_record(content: bytes) -> SnapshotRecord:
    """The record in snapshot.json. Raises StoreDamaged when it is not exactly as it was written."""
    try:
        checked = msgspec.json.decode(content, type=_Checked)
        body = bytes(checked.snapshot)
        if hashlib.sha256(body).hexdigest() != checked.checksum:
            raise StoreDamaged("it was changed after it was written")
        version = msgspec.json.decode(body, type=_Format).format
        if version != FORMAT:
            raise StoreDamaged(f"it has the format {version}, and this release of bzstream reads format {FORMAT}")
        record = msgspec.json.decode(body, type=SnapshotRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreDamaged(f"it is no snapshot record: {error}") from None
    # Older releases called the unit of ungrouped experts "rest"; its file keeps the name that it has.
    units = (structs.replace(unit, kind="ungrouped") if unit.kind == "rest" else unit for unit in record.units)
    return structs.replace(record, units=tuple(units))


class _Format(Struct, frozen=True):
    format: int


def read_record(folder: Path) -> SnapshotRecord:
    """The record of the snapshot in `folder`. Raises StoreDamaged, with the file's name."""
    path = folder / "snapshot.json"
    try:
        return decode_record(path.read_bytes())
    except OSError as error:
        raise StoreDamaged(f"{path} cannot be read: {error.strerror}") from None
    except StoreDamaged as error:
        raise StoreDamaged(f"{path} cannot be used: {error}") from None


def read_activation(folder: Path, record: SnapshotRecord) -> Activation:
    """The latest activation of the version in `folder`: the first one, unless it was activated again."""
    try:
        return msgspec.json.decode((folder / ACTIVATION).read_bytes(), type=Activation)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return Activation(record.sequence, record.published_at)


def sign_record(record: SnapshotRecord, signer: ManifestSigner) -> SnapshotRecord:
    """The record with the signer's address, and its signature over the manifest of every unit."""
    record = structs.replace(record, hotkey=signer.ss58_address)

    def signed(unit: UnitRecord) -> UnitRecord:
        fields = manifest_fields(record, unit, len(unit_envelope(record, unit)))
        return structs.replace(unit, signature=signer.sign_fields(fields))

    return structs.replace(record, units=tuple(map(signed, record.units)))


def make_envelope(*, group: int | None, block: int, version: str, content_hash: str) -> bytes:
    """The head before a slice: 8 bytes of length, JSON padded with spaces to a multiple of 4096 in all."""
    text = json.dumps(
        {"expert_group": group, "block_number": block, "model_version": version, "content_hash": content_hash},
        separators=(",", ":"),
    ).encode("ascii")
    text += b" " * (-(8 + len(text)) % 4096)
    return struct.pack("<Q", len(text)) + text


def enveloped_etag(envelope: bytes, sha256: str) -> str:
    """The strong ETag of envelope and payload together: it changes with either."""
    return f'"{hashlib.sha256(envelope + sha256.encode("ascii")).hexdigest()}"'


def unit_envelope(record: SnapshotRecord, unit: UnitRecord) -> bytes:
    """The envelope of a unit: empty for the full model, which is served bare."""
    if unit.kind == "full":
        return b""
    return make_envelope(group=unit.group, block=record.block, version=record.version, content_hash=unit.content_hash)


def manifest_fields(record: SnapshotRecord, unit: UnitRecord, payload_offset: int) -> dict[str, object]:
    """The manifest without its signature: what is signed."""
    return {
        "unit": unit.kind,
        "expert_group": unit.group,
        "block_number": record.block,
        "model_version": record.version,
        "content_hash": unit.content_hash,
        "payload_offset": payload_offset,
        "size": unit.size,
        "chunk_size": CHUNK,
        "chunk_hash": "blake3",
        "chunks": list(unit.chunks),
        "validator_hotkey": record.hotkey,
    }
