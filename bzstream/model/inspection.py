"""Looking at a store or a file from outside: what is in it, and whether every byte is still what was published.

Verifying reads everything and trusts nothing: a record against its own checksum, each small file against its SHA-256,
each unit file against its SHA-256 and chunks, each full view against its hash. A file that several versions share by
hard links is read once.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from bzstream.model.digest import CHUNK, Digest, digest_blocks, digest_file, read_blocks
from bzstream.model.errors import ModelError, StoreDamaged
from bzstream.model.hash_pool import HashPool, SerialQueue
from bzstream.model.record import FILES, FileRecord, SnapshotRecord, UnitRecord, read_record
from bzstream.model.store import Store
from bzstream.tensorfile import Head, TensorFileError, read_head
from bzstream.util.files import hash_file
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = ["FileReport", "Finding", "StoreReport", "digest_view", "inspect_file", "inspect_store", "verify_store"]

MAX_INSPECTED_HEAD = 32 * 1024 * 1024
"""Bytes of JSON in the head of a file to inspect: a full model with 200,000 tensors."""


class Finding(NamedTuple):
    """Something wrong: in which version, in which unit ("snapshot.json" for the record), and what."""

    version: str
    unit: str
    problem: str


@dataclass(frozen=True, slots=True)
class StoreReport:
    """A store at a glance: readable versions newest first, what could not be read, and unfinished work."""

    snapshots: tuple[SnapshotRecord, ...]
    current: str | None
    findings: tuple[Finding, ...]
    leftovers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileReport:
    """A safetensors file, bare or behind bzstream's envelope. `sha256` (of the payload) is None if not asked for."""

    envelope: dict[str, Any] | None
    payload_offset: int
    size: int
    head: Head
    sha256: str | None

    @property
    def damaged(self) -> bool:
        """Whether the payload is not the one that the envelope announces."""
        return (
            self.envelope is not None
            and self.sha256 is not None
            and self.envelope.get("content_hash") != f"sha256:{self.sha256}"
        )


def inspect_store(path: Path) -> StoreReport:
    """Read every record and small file; unit files are only looked up. Raises ModelError when `path` is no store."""
    store = Store(path)
    if not store.snapshots.is_dir():
        raise ModelError(f"{path} is no store: it has no folder 'snapshots'; publish a checkpoint into it first")
    records: list[SnapshotRecord] = []
    findings: list[Finding] = []
    for version in sorted(store.versions()):
        try:
            record = read_record(store.folder(version))
        except StoreDamaged as error:
            findings.append(Finding(version, "snapshot.json", str(error)))
            continue
        records.append(record)
        findings += [Finding(version, unit.label, p) for unit in record.units if (p := _missing(store, version, unit))]
        findings += [
            Finding(version, f"{FILES}/{file.name}", p) for file in record.files if (p := _wrong(store, version, file))
        ]
    current = store.current()
    if problem := store.problem() or ("nothing was published yet" if current is None else None):
        findings.append(Finding(current or "", "current", problem))
    leftovers = sorted(n for folder in (path, store.snapshots) for n in os.listdir(folder) if _is_leftover(n))
    records.sort(key=lambda record: store.activation(record).sequence, reverse=True)
    return StoreReport(tuple(records), current, tuple(findings), tuple(leftovers))


def verify_store(path: Path, progress: Callable[[int, int], None] | None = None) -> StoreReport:
    """As `inspect_store`, and every byte is read and hashed again, on all cores."""
    report = inspect_store(path)
    store = Store(path)
    unreadable = {(finding.version, finding.unit) for finding in report.findings}
    files: dict[tuple[int, int] | Path, list[tuple[str, UnitRecord]]] = {}
    for record in report.snapshots:
        for unit in record.units:
            if unit.file is not None and (record.version, unit.label) not in unreadable:
                identity = _identity(store.folder(record.version) / unit.file)
                files.setdefault(identity, []).append((record.version, unit))
    total = sum(owners[0][1].size for owners in files.values()) + sum(r.units[-1].size for r in report.snapshots)
    done = 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    findings: list[Finding] = []
    with HashPool() as pool:
        for owners in files.values():
            SerialQueue(pool).put(partial(_verify_file, store, owners, findings, seen))
        for record in report.snapshots:
            if not any(version == record.version for version, _ in unreadable):
                SerialQueue(pool).put(partial(_verify_view, store, record, findings, seen))
        pool.drain()
    findings.sort(key=lambda finding: (finding.version, finding.unit))
    return StoreReport(report.snapshots, report.current, (*report.findings, *findings), report.leftovers)


def inspect_file(path: Path, *, verify: bool = False) -> FileReport:
    """Look at a safetensors file, or at a saved body of /model/partial. Raises ModelError when it is neither."""
    try:
        with path.open("rb") as file:
            envelope, offset = _read_envelope(file.fileno())
            head = read_head(file.fileno(), at=offset, max_head=MAX_INSPECTED_HEAD)
            sha256 = None
            if verify:
                file.seek(offset)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileReport(envelope, offset, os.fstat(file.fileno()).st_size - offset, head, sha256)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except TensorFileError as error:
        raise ModelError(f"{path} is no complete safetensors file: {error}") from None


def _identity(path: Path) -> tuple[int, int] | Path:
    """What all names of one file have in common."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _is_leftover(name: str) -> bool:
    return name.startswith(".") and name != ".lock"


def _missing(store: Store, version: str, unit: UnitRecord) -> str | None:
    """What is wrong with a unit's file at first sight."""
    if unit.file is None:
        return None
    try:
        size = os.stat(store.folder(version) / unit.file, follow_symlinks=False).st_size
    except OSError as error:
        return f"{unit.file} cannot be read: {error.strerror}"
    return None if size == unit.size else f"{unit.file} has {size} bytes instead of {unit.size}"


def _wrong(store: Store, version: str, file: FileRecord) -> str | None:
    """What is wrong with a small file."""
    try:
        same = hash_file(store.folder(version) / FILES / file.name) == file.sha256
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if same else "does not have the published hash"


def _verify_file(
    store: Store, owners: list[tuple[str, UnitRecord]], findings: list[Finding], seen: Callable[[int], None]
) -> None:
    """Hash one file, and compare it with what each version that has it says."""
    version, unit = owners[0]
    assert unit.file is not None
    try:
        digest = digest_file(store.folder(version) / unit.file, seen=seen)
    except OSError as error:
        findings += [Finding(version, unit.label, f"cannot be read: {error.strerror}") for version, unit in owners]
        return
    findings += [Finding(version, unit.label, p) for version, unit in owners if (p := _differs(unit, digest))]


def _verify_view(store: Store, record: SnapshotRecord, findings: list[Finding], seen: Callable[[int], None]) -> None:
    """Hash the full model as it would be sent."""
    try:
        problem = _differs(record.units[-1], digest_view(store.folder(record.version), record, seen))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    if problem:
        findings.append(Finding(record.version, "full", problem))


def digest_view(folder: Path, record: SnapshotRecord, seen: Callable[[int], None]) -> Digest:
    """Both hashes of the full model as it would be sent from the unit files in `folder`. Raises OSError."""

    def blocks(files: list[FileIO]) -> Iterator[memoryview]:
        parts = (read_blocks(files[index].fileno(), offset, length) for index, offset, length in record.view)
        for block in chain([memoryview(record.head)], chain.from_iterable(parts)):
            yield block
            seen(len(block))

    with ExitStack() as cleanup:
        names = [folder / unit.file for unit in record.units if unit.file is not None]
        return digest_blocks(blocks([cleanup.enter_context(name.open("rb", buffering=0)) for name in names]))


def _differs(unit: UnitRecord, digest: Digest) -> str | None:
    if digest == Digest(unit.sha256, unit.chunks):
        return None
    damaged = [n for n, (was, now) in enumerate(zip(unit.chunks, digest.chunks, strict=False)) if was != now]
    if not damaged:
        return "does not have the published hash"
    first = damaged[0] * CHUNK
    return (
        f"{len(damaged)} of {len(unit.chunks)} chunks differ from what was published, "
        f"the first at bytes {first} to {min(first + CHUNK, unit.size) - 1}"
    )


def _read_envelope(fd: int) -> tuple[dict[str, Any] | None, int]:
    """The envelope at the start of a file and its length, or (None, 0) for a bare safetensors file."""
    first = os.pread(fd, 8, 0)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 0 < length <= 64 * 1024:
        return None, 0
    try:
        document = parse_json_object(os.pread(fd, length, 8))
    except JsonError:
        return None, 0
    known = {"expert_group", "content_hash", "model_version"} <= document.keys()
    return (document, 8 + length) if known else (None, 0)
