"""A published version, opened: its units with everything that is sent about them made in advance.

A `Snapshot` owns one reference to each of its files, each opened once; a download holds its own (`Payload.retain`), so
a snapshot that the store has dropped is closed at once, and its files as soon as the last download from them ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bzstream.model.codings import UnitCoding, UnitCodings, manifest_with_codings, read_codings
from bzstream.model.errors import BadCheckpoint, StoreDamaged
from bzstream.model.record import (
    FILES,
    SnapshotRecord,
    UnitRecord,
    enveloped_etag,
    read_activation,
    read_record,
    unit_envelope,
)
from bzstream.model.small_files import CONFIG, MAX_FILES, parse_config
from bzstream.payload import Extent, Payload, UnitFile
from bzstream.util.counted import Counted
from bzstream.util.files import file_stamp, read_small_file

__all__ = ["CodedUnit", "Snapshot", "Unit", "open_snapshot"]

_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The process may open no more for now: to be tried again."""


class CodedUnit(NamedTuple):
    """A coded form of a unit, to be sent as the unit is. `etag` is quoted and strong."""

    payload: Payload
    etag: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Something downloadable. `label` is "partial/<group>", "shared", "ungrouped" or "full".

    `payload` is the bare safetensors file and `enveloped` the same behind its `envelope` (empty for the full model).
    ETags are quoted; `manifest` is the JSON body of the manifest endpoint.
    """

    label: str
    kind: str
    group: int | None
    payload: Payload
    envelope: bytes
    enveloped: Payload
    etag: str
    etag_enveloped: str
    size: int
    chunks: tuple[str, ...]
    content_hash: str
    manifest: bytes
    experts: Mapping[int, tuple[int, ...]]
    whole: bool
    """False when a file was already missing or cut when the snapshot was opened."""
    codings: Mapping[tuple[str, str | None], CodedUnit] = field(default_factory=dict)
    """By name and base (a content hash, or None): what the manifest's `codings` lists."""

    def intact(self) -> bool:
        """Whether the unit may be served: every file behind it is still the one that was published (µs)."""
        return self.whole and self.payload.intact()


class OpenFiles:
    """Opens files and holds a reference to each; `close` gives the references back."""

    def __init__(self) -> None:
        self.opened: list[UnitFile] = []

    def open(self, path: Path, size: int) -> UnitFile | None:
        """The file, or None when it cannot be served. Raises OSError when the process may open no more."""
        try:
            file = UnitFile(path)
        except OSError as error:
            if error.errno in _TOO_MANY_FILES:
                raise
            return None
        self.opened.append(file)
        return file if file.size == size else None

    def close(self) -> None:
        for file in self.opened:
            file.release()


class Snapshot(Counted):
    """One published version, open; its last user gives back its references to its files.

    References are counted on one thread, the event loop's where there is one.
    """

    def __init__(
        self,
        record: SnapshotRecord,
        folder: Path,
        units: Mapping[str, Unit],
        files: OpenFiles,
        unverified: tuple[tuple[UnitFile, tuple[str, ...]], ...] = (),
    ) -> None:
        """Raises StoreDamaged when the snapshot's config.json is not the one that was published."""
        super().__init__()
        activation = read_activation(folder, record)
        self.version = record.version
        self.folder = folder
        self.block = record.block
        self.sequence = activation.sequence
        """Rises with every activation of any version in this store."""
        self.published_at = record.published_at
        """Seconds since 1970."""
        self.activated_at = activation.at
        """When it was made current the last time, in seconds since 1970; later than the activation before it.

        Last-Modified is this, or now where the clock says less (it was ahead once); whether a client's copy is older
        is asked of this value itself, so that no change is missed.
        """
        self.config = record.config if CONFIG not in {file.name for file in record.files} else _config(folder, record)
        """config.json of the checkpoint, or None if it had none."""
        self.orientation = record.orientation
        """"native" or "transposed" (as on the hub) for fused Qwen3-VL-MoE experts; None for everything else."""
        self.layers: Mapping[int, int] = record.layers
        """Layer -> number of experts."""
        self.files = record.files
        """The checkpoint's small files, which lie in the snapshot's folder `files`."""
        self.signed = all(unit.signature is not None for unit in record.units)
        """Whether every manifest carries the signature of the validator's hotkey."""
        self.units = units
        """By label."""
        self.groups = tuple(sorted(unit.group for unit in units.values() if unit.group is not None))
        self.unverified = unverified
        """Files marked `broken` until a `Verifier` has found them to have these chunk hashes."""
        self._files = files

    def partial(self, group: int) -> Unit | None:
        return self.units.get(f"partial/{group}")

    @property
    def shared(self) -> Unit:
        return self.units["shared"]

    @property
    def full(self) -> Unit:
        return self.units["full"]

    def serves(self, file: UnitFile) -> bool:
        """Whether the same file, unchanged, is open and in service here."""
        stamp = file_stamp(file.fd)
        return any(own.intact() and file_stamp(own.fd) == stamp for own in self._files.opened)

    def on_last_release(self) -> None:
        self._files.close()


def open_snapshot(folder: Path, known: Snapshot | None = None) -> Snapshot:
    """Open the snapshot in `folder`. Raises StoreDamaged when its record or its config.json cannot be read.

    `known` is the same snapshot, opened before: a file that is in service there need not be verified again.

    A unit file that is missing or cut is no error here: its units open, and are not `intact`. Neither are those of a
    file with another modification time than when it was published; such files are `unverified`.
    """
    record = read_record(folder)
    codings = _read_codings(folder, record)
    files = OpenFiles()
    with ExitStack() as undo:
        undo.callback(files.close)
        own = [None if unit.file is None else files.open(folder / unit.file, unit.size) for unit in record.units]
        units: dict[str, Unit] = {}
        unverified = []
        for unit, file in zip(record.units, own, strict=True):
            sources = [(file, 0, unit.size)]
            if unit.kind == "full":
                sources = [(own[index], offset, length) for index, offset, length in record.view]
            parts: list[bytes | Extent] = [record.head] if unit.kind == "full" else []
            parts += [Extent(source, offset, length) for source, offset, length in sources if source is not None]
            whole = all(source is not None for source, _, _ in sources)
            listed = codings.get(unit.label)
            coded = [files.open(folder / "coded" / Path(c.file).name, c.size) for c in listed.codings] if listed else []
            if None in coded:  # all or none: the signed manifest lists all of them
                listed, coded = None, []
            units[unit.label] = _unit(record, unit, Payload(tuple(parts)), whole, listed, coded)
            if file is None or (known is not None and known.serves(file)):
                continue
            if os.fstat(file.fd).st_mtime_ns != unit.mtime_ns:
                file.broken = True
                unverified.append((file, unit.chunks))
        snapshot = Snapshot(record, folder, units, files, tuple(unverified))
        undo.pop_all()
    return snapshot


def _config(folder: Path, record: SnapshotRecord) -> dict[str, Any]:
    path = folder / FILES / CONFIG
    (wanted,) = (file.sha256 for file in record.files if file.name == CONFIG)
    try:
        content = read_small_file(path, MAX_FILES)
    except OSError as error:
        if error.errno in _TOO_MANY_FILES:
            raise
        raise StoreDamaged(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != wanted:
        raise StoreDamaged(f"{path} was changed after it was published")
    try:
        return parse_config(content)
    except BadCheckpoint as error:
        raise StoreDamaged(f"{path} cannot be used: {error}") from None


def _read_codings(folder: Path, record: SnapshotRecord) -> Mapping[str, UnitCodings]:
    """By label. None count whose manifests are signed by another hotkey than the snapshot's (it was signed since)."""
    try:
        codings = read_codings(folder)
    except StoreDamaged as error:
        logging.getLogger(__name__).warning("%s; the snapshot is served without codings", error)
        return {}
    return codings.units if codings is not None and codings.hotkey == record.hotkey else {}


def _unit(
    record: SnapshotRecord,
    unit: UnitRecord,
    payload: Payload,
    whole: bool,
    codings: UnitCodings | None,
    coded_files: list[UnitFile | None],
) -> Unit:
    envelope = unit_envelope(record, unit)
    etag = f'"{unit.sha256}"'
    listed = codings.codings if codings else ()
    fields = manifest_with_codings(record, unit, listed)
    signature = codings.signature if codings else unit.signature
    return Unit(
        kind=unit.kind,
        group=unit.group,
        label=unit.label,
        payload=payload,
        envelope=envelope,
        enveloped=Payload((envelope,)) + payload if envelope else payload,
        size=unit.size,
        content_hash=unit.content_hash,
        etag=etag,
        etag_enveloped=enveloped_etag(envelope, unit.sha256) if envelope else etag,
        chunks=unit.chunks,
        manifest=json.dumps({**fields, "signature": signature}, separators=(",", ":")).encode("ascii"),
        experts=unit.experts,
        whole=whole,
        codings={
            (coding.name, coding.base): CodedUnit(Payload((Extent(file, 0, coding.size),)), _coded_etag(coding))
            for coding, file in zip(listed, coded_files, strict=True)
            if file is not None
        },
    )


def _coded_etag(coding: UnitCoding) -> str:
    """It changes with every byte, as the chunks' hashes are in it. Clients make it of the manifest (docs/coding.md)."""
    entry = json.dumps(coding.as_manifest(), sort_keys=True, separators=(",", ":"))  # canonical: all of it is ASCII
    return f'"{hashlib.sha256(entry.encode("ascii")).hexdigest()}"'
