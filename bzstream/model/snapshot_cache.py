"""What a worker serves from: the store's snapshots, opened, mapped, and followed as they come and go.

A `Unit` is one downloadable thing with everything that is sent about it made in advance. A `Snapshot` owns one
reference to each of its files; a download holds its own (`Payload.retain`), so a snapshot that the store has dropped
is closed at once and its files as soon as the last download from them ends.

A file that is missing, has another size than when it was published, or changes while it is open, takes its units (and
the full model) out of service; it is never served with wrong bytes, and `SnapshotCache.damaged` names it. A file whose
modification time is another than when it was published was changed while nobody looked, or the whole store was copied:
a thread reads it, and it is served if every chunk has its published hash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bzstream.model.codings import UnitCoding, UnitCodings, manifest_with_codings, read_codings
from bzstream.model.digest import digest_chunks
from bzstream.model.errors import StoreDamaged
from bzstream.model.record import (
    SnapshotRecord,
    UnitRecord,
    enveloped_etag,
    read_record,
    unit_envelope,
)
from bzstream.model.store import Store
from bzstream.payload import Extent, Payload, UnitFile
from bzstream.util.files import file_stamp

__all__ = ["CodedUnit", "ScanResult", "Snapshot", "SnapshotCache", "Unit", "open_snapshot"]

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class CodedUnit:
    """A coded form of a unit, to be sent as the unit is. `etag` is quoted and strong."""

    payload: Payload
    etag: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Something downloadable. `label` is "partial/<group>", "shared" or "full".

    `payload` is the bare safetensors file and `enveloped` the same behind its `envelope` (empty for the full model).
    ETags are quoted; `manifest` is the JSON body of the manifest endpoint.
    """

    kind: str
    group: int | None
    label: str
    payload: Payload
    envelope: bytes
    enveloped: Payload
    size: int
    content_hash: str
    etag: str
    etag_enveloped: str
    chunks: tuple[str, ...]
    manifest: bytes
    experts: Mapping[int, tuple[int, ...]]
    whole: bool
    """False when a file was already missing or cut when the snapshot was opened."""
    codings: Mapping[tuple[str, str | None], CodedUnit] = field(default_factory=dict)
    """By name and base (a content hash, or None): what the manifest's `codings` lists."""

    def intact(self) -> bool:
        """Whether the unit may be served: every file behind it is still the one that was published (µs)."""
        return self.whole and self.payload.intact()


class Snapshot:
    """One published version, open. Counted: `release` by the last holder closes what nothing else holds."""

    def __init__(
        self,
        record: SnapshotRecord,
        units: Mapping[str, Unit],
        files: tuple[UnitFile, ...],
        unverified: tuple[tuple[UnitFile, tuple[str, ...]], ...] = (),
    ) -> None:
        self.version = record.version
        self.block = record.block
        self.sequence = record.sequence
        self.published_at = record.published_at
        self.signed = all(unit.signature is not None for unit in record.units if unit.kind != "rest")
        """Whether every manifest carries the signature of the validator's hotkey."""
        self.config = record.config
        """config.json of the checkpoint, or None if it had none."""
        self.orientation = record.orientation
        """"native" or "transposed" (as on the hub) for fused Qwen3-VL-MoE experts; None for everything else."""
        self.layers: Mapping[int, int] = record.layers
        """Layer -> number of experts."""
        self.units = units
        """By label."""
        self.groups = tuple(sorted(unit.group for unit in units.values() if unit.group is not None))
        self.unverified = unverified
        """Files marked `broken` until someone has found them to have these chunk hashes (`recheck`)."""
        self._files = files
        self._references = 1

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
        return any(own.intact() and file_stamp(own.fd) == stamp for own in self._files)

    def retain(self) -> None:
        """Hold the snapshot open; pair each call with one `release`."""
        assert self._references > 0, "a closed snapshot was retained"
        self._references += 1

    def release(self) -> None:
        assert self._references > 0, "a snapshot was released more often than retained"
        self._references -= 1
        if self._references == 0:
            self.close()

    def close(self) -> None:
        """Give back the snapshot's references to its files."""
        files, self._files = self._files, ()
        for file in files:
            file.release()


def open_snapshot(folder: Path, known: Snapshot | None = None) -> Snapshot:
    """Open the snapshot in `folder`. Raises StoreDamaged when its record cannot be read.

    `known` is the same snapshot, opened before: a file that is in service there need not be verified again.

    A unit file that is missing or cut is no error here: its units open, and are not `intact`. Neither are those of a
    file with another modification time than when it was published; such files are the snapshot's `unverified`.
    """
    record = read_record(folder)
    codings = _read_codings(folder, record)
    with ExitStack() as cleanup:
        coded_files: list[UnitFile] = []
        files: list[UnitFile | None] = []
        for unit in record.units:
            file = _open_file(folder, unit)
            files.append(file)
            if file is not None:
                cleanup.callback(file.release)
        units: dict[str, Unit] = {}
        for unit, file in zip(record.units, files, strict=True):
            if unit.kind == "full":
                parts: list[bytes | Extent] = [record.head]
                extents = [(files[index], offset, length) for index, offset, length in record.view]
                parts += [Extent(part, offset, length) for part, offset, length in extents if part is not None]
                whole = all(part is not None for part, _, _ in extents)
            else:
                parts = [] if file is None else [Extent(file, 0, unit.size)]
                whole = file is not None
            if unit.kind != "rest":
                opened = _open_coded(folder, codings.get(unit.label))
                for file in opened:
                    cleanup.callback(file.release)
                coded_files += opened
                units[unit.label] = _unit(
                    record, unit, Payload(tuple(parts)), whole, codings[unit.label] if opened else None, opened
                )
        cleanup.pop_all()
    unverified = []
    for unit, file in zip(record.units, files, strict=True):
        if file is None or (known is not None and known.serves(file)):
            continue
        if os.fstat(file.fd).st_mtime_ns != unit.mtime_ns:
            file.broken = True
            unverified.append((file, unit.chunks))
    opened_files = (*(file for file in files if file is not None), *coded_files)
    return Snapshot(record, units, opened_files, tuple(unverified))


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What `SnapshotCache.scan` found: the version that is current, every version's stamp, and what was opened."""

    wanted: str | None
    stamps: Mapping[str, tuple[int, ...]]
    opened: Mapping[str, Snapshot | None]
    """None: unusable for good."""


class SnapshotCache:
    """The snapshots of a store, as one worker sees them. Not thread-safe: for the worker's event loop."""

    def __init__(self, path: Path, *, warn: Callable[[str], None] | None = None) -> None:
        self._store = Store(path)
        self._warn = warn or logging.getLogger(__name__).warning
        self._snapshots: dict[str, Snapshot] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._reported: set[str] = set()
        self.checks: list[Verifier] = []
        """Threads that read unverified files again, ended or not."""
        self.current: Snapshot | None = None

    def refresh(self) -> bool:
        """Take in what was published and dropped since the last call; whether anything changed.

        Cheap when nothing did (a few system calls). A new snapshot that cannot be read is reported once, and the
        current one stays.
        """
        return self.apply(self.scan())

    def scan(self) -> ScanResult:
        """The first half of `refresh`, on any thread: see what the store has, and open what is new.

        Opening a snapshot as finely cut as the mission's (12,290 parts) took 20 ms, as long as the event loop may
        stall at all. Changes nothing that `get` and `current` answer from. One call at a time, and each result goes
        to `take`.
        """
        wanted = self._store.current()
        stamps = {version: stamp for version in self._store.versions() if (stamp := self._stamp(version))}
        opened: dict[str, Snapshot | None] = {}
        for version, stamp in stamps.items():
            if self._stamps.get(version) != stamp:
                try:
                    opened[version] = self._open(version)
                except OSError as error:  # may be tried again: no stamp is kept
                    self._report(version, str(error))
        return ScanResult(wanted, stamps, opened)

    def apply(self, found: ScanResult) -> bool:
        """The second half of `refresh`, for whoever owns the library: put in place what `look` found."""
        changed = False
        for version, snapshot in found.opened.items():
            self._stamps[version] = found.stamps[version]
            if snapshot is not None:
                self._put(version, snapshot)
                changed = True
        wanted = found.wanted
        if wanted is not None and wanted in self._snapshots and self._snapshots[wanted] is not self.current:
            self.current = self._snapshots[wanted]
            changed = True
        for version in self._snapshots.keys() - found.stamps.keys():
            # The last good snapshot outlives its folder for as long as nothing readable has taken its place.
            if self._snapshots[version] is not self.current:
                self._snapshots.pop(version).release()
                changed = True
        self._stamps = {version: stamp for version, stamp in self._stamps.items() if version in found.stamps}
        return changed

    def get(self, version: str) -> Snapshot | None:
        """A retained version, or None."""
        return self._snapshots.get(version)

    def versions(self) -> list[Snapshot]:
        """Every retained version, newest first."""
        return sorted(self._snapshots.values(), key=lambda snapshot: snapshot.sequence, reverse=True)

    @property
    def damaged(self) -> list[str]:
        """Labels of the current snapshot's units that are not served because a file was cut or changed."""
        if self.current is None:
            return []
        return [label for label, unit in self.current.units.items() if not unit.intact()]

    def close(self) -> None:
        """Release every snapshot, and end the checks under way."""
        for check in self.checks:
            check.stop()
        self.checks.clear()
        for snapshot in self._snapshots.values():
            snapshot.release()
        self._snapshots.clear()
        self._stamps.clear()
        self.current = None

    def _stamp(self, version: str) -> tuple[int, ...] | None:
        """What changes when a version's folder is replaced by another of the same name, or gains codings."""
        folder = self._store.folder(version)
        record = file_stamp(folder / "snapshot.json")
        return None if record is None else (*record, *(file_stamp(folder / "codings.json") or ()))

    def _open(self, version: str) -> Snapshot | None:
        """Open a version; None if it is unusable. Raises OSError if it may be tried again."""
        try:
            return open_snapshot(self._store.folder(version), self._snapshots.get(version))
        except StoreDamaged as error:
            self._report(version, str(error))
            return None

    def _report(self, version: str, problem: str) -> None:
        if self._stamp(version) is not None and problem not in self._reported:  # else it was deleted meanwhile
            self._reported.add(problem)
            self._warn(problem)

    def _put(self, version: str, snapshot: Snapshot) -> None:
        if snapshot.unverified:
            self._warn(
                f"{len(snapshot.unverified)} files of version {version} have another modification time than when they "
                "were published; each is read again before it is served"
            )
            self.checks = [check for check in self.checks if check.running] + [Verifier(snapshot)]
        old = self._snapshots.pop(version, None)
        self._snapshots[version] = snapshot
        if old is not None:
            if old is self.current:
                self.current = snapshot
            old.release()


class Verifier:
    """A thread that reads a snapshot's unverified files and puts those into service that are undamaged."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._unverified = snapshot.unverified
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recheck", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End it at the next block."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Until every suspect was read."""
        self._thread.join()

    def _run(self) -> None:
        for file, chunks in self._unverified:
            try:
                # A descriptor of its own: the file may be released, and counting references is the loop's alone.
                # If the path leads to another file by now, that one's bytes say nothing of the open one's.
                with file.path.open("rb", buffering=0) as opened:
                    same = os.path.sameopenfile(opened.fileno(), file.fd)
                    if same and digest_chunks(opened.fileno(), stop=self._stopped.is_set) == chunks:
                        file.broken = False
            except OSError:
                pass  # unreadable: it stays out of service


def _open_file(folder: Path, unit: UnitRecord) -> UnitFile | None:
    """The unit's file, or None when it cannot be served. Raises OSError when the process has no room for one more."""
    if unit.file is None:
        return None
    try:
        file = UnitFile(folder / unit.file)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        return None
    if file.size != unit.size:
        file.release()
        return None
    return file


def _read_codings(folder: Path, record: SnapshotRecord) -> Mapping[str, UnitCodings]:
    """By label. None count whose manifests are signed by another hotkey than the snapshot's (it was signed since)."""
    try:
        codings = read_codings(folder)
    except StoreDamaged as error:
        logging.getLogger(__name__).warning("%s; the snapshot is served without codings", error)
        return {}
    return codings.units if codings is not None and codings.hotkey == record.hotkey else {}


def _open_coded(folder: Path, codings: UnitCodings | None) -> list[UnitFile]:
    """The coded files of a unit. All or none: the signed manifest lists all of them."""
    opened: list[UnitFile] = []
    for coding in codings.codings if codings else ():
        try:
            file = UnitFile(folder / "coded" / Path(coding.file).name)
        except (OSError, ValueError) as error:
            _release(opened)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            return []
        opened.append(file)
        if file.size != coding.size:
            _release(opened)
            return []
    return opened


def _release(files: list[UnitFile]) -> None:
    for file in files:
        file.release()


def _unit(
    record: SnapshotRecord,
    unit: UnitRecord,
    payload: Payload,
    whole: bool,
    codings: UnitCodings | None,
    coded_files: list[UnitFile],
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
        },
    )


def _coded_etag(coding: UnitCoding) -> str:
    """It changes with every byte, as the chunks' hashes are in it."""
    return f'"{hashlib.sha256(json.dumps(coding.as_manifest()).encode("ascii")).hexdigest()}"'
