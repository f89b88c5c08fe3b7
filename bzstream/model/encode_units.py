"""Writes the coded files of the current version, one chunk after the other, beside serving.

It takes up a core's idle time and some 30 MiB of memory. What is complete stays complete: after a kill, or when another
version becomes current, the next call goes on with the first file that is missing. One call at a time for one version,
whatever process makes it (a lock on the folder).

Which comes first: the difference to the version before, as most miners have that; then the form that stands alone;
then the differences to older versions.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from blake3 import blake3

from bzstream.coding import NAME, Encoder, Layout
from bzstream.model.codings import (
    CODED_KINDS,
    Codings,
    UnitCoding,
    read_codings,
    sign_codings,
    write_codings,
)
from bzstream.model.digest import CHUNK
from bzstream.model.errors import StoreDamaged, StoreFailed
from bzstream.model.record import ManifestSigner, SnapshotRecord, UnitRecord, read_record
from bzstream.model.store import Store
from bzstream.tensorfile import MAX_HEAD, TensorFileError, read_head
from bzstream.util.durable import replace_file, temporary_name, write_file
from bzstream.util.files import read_fully, write_fully

__all__ = ["encode_current"]

MUST_SHRINK = 0.98
"""A coded file that is not smaller than this share of its unit is not kept."""

Bases = dict[str, tuple[Path, UnitRecord]]
"""By label: an earlier version's unit and its file."""


def encode_current(
    store: Store, *, bases: int, signer: ManifestSigner | None = None, stop: Callable[[], bool] = lambda: False
) -> bool:
    """Write what is missing of the current version's codings; True when nothing is missing afterwards.

    `bases`: to how many earlier versions differences are made. `signer` must be the hotkey that signed the version's
    manifests, None when they are not signed. `stop` is asked before each chunk. False when it stopped, when another
    process is at it, or when the version went away. Raises StoreFailed and StoreDamaged.
    """
    version = store.current()
    if version is None:
        return False
    folder = store.folder(version)
    record = read_record(folder)
    if record.hotkey != (signer.ss58_address if signer else None):
        raise StoreFailed(
            f"the manifests of {version} are signed by {record.hotkey or 'nobody'}, and codings belong into the signed "
            "manifest; set node.wallet to that hotkey's key"
        )
    try:
        with _lock(folder / "coded") as held:
            return held and _encode(store, folder, record, bases, signer, stop)
    except (FileNotFoundError, NotADirectoryError):
        return False  # the version was retired meanwhile
    except OSError as error:
        raise StoreFailed(f"the codings of {version} cannot be written: {error.strerror}") from error


def _encode(
    store: Store,
    folder: Path,
    record: SnapshotRecord,
    bases: int,
    signer: ManifestSigner | None,
    stop: Callable[[], bool],
) -> bool:
    units = [unit for unit in record.units if unit.kind in CODED_KINDS and unit.size]
    found = _published(folder)
    earlier = _earlier(store, record, bases)
    for base_of in (*earlier[:1], None, *earlier[1:]):
        for unit in units:
            base = None if base_of is None else base_of.get(unit.label)
            if (base_of is not None and base is None) or (base and base[1].sha256 == unit.sha256):
                continue
            coding = _coded_unit(folder, unit, base, stop)
            if coding is None:
                return False
            if coding.size:
                found.setdefault(unit.label, {})[coding.base] = coding
        codings = sign_codings(record, {label: tuple(of_unit.values()) for label, of_unit in found.items()}, signer)
        if codings != _read(folder):
            write_codings(folder, codings)
    return True


def _published(folder: Path) -> dict[str, dict[str | None, UnitCoding]]:
    """Label -> base -> the coding that codings.json lists. It stays in force, its base's version gone or not."""
    codings = _read(folder)
    units = codings.units if codings else {}
    return {label: {coding.base: coding for coding in unit.codings} for label, unit in units.items()}


def _read(folder: Path) -> Codings | None:
    try:
        return read_codings(folder)
    except StoreDamaged:
        return None  # it is written anew


def _earlier(store: Store, record: SnapshotRecord, bases: int) -> list[Bases]:
    """The units of the newest `bases` versions before `record`, newest first."""
    older = [other for other in store.records() if other.sequence < record.sequence][:bases]
    return [
        {unit.label: (store.folder(other.version) / unit.file, unit) for unit in other.units if unit.file is not None}
        for other in older
    ]


def _coded_unit(
    folder: Path, unit: UnitRecord, base: tuple[Path, UnitRecord] | None, stop: Callable[[], bool]
) -> UnitCoding | None:
    """The unit's coded file and its entry, written unless they are there. None: stopped."""
    assert unit.file is not None
    path = folder / "coded" / f"{unit.file}.{base[1].sha256[:16] if base else 'alone'}.{NAME}"
    entry = path.with_name(f"{path.name}.json")
    try:
        coding = msgspec.json.decode(entry.read_bytes(), type=UnitCoding)
        if not coding.size or path.stat().st_size == coding.size:
            return coding
    except (FileNotFoundError, msgspec.MsgspecError):
        pass
    new = temporary_name(path)
    try:
        chunks = _write_chunks(folder / unit.file, unit, base, new, stop)
        if chunks is None:
            return None
        size = chunks[-1][0] + chunks[-1][1]
        if size < MUST_SHRINK * unit.size:
            replace_file(new, path)
        else:
            size, chunks = 0, []
        coding = UnitCoding(
            name=NAME, base=base[1].content_hash if base else None, file=path.name, size=size, chunks=tuple(chunks)
        )
        write_file(entry, msgspec.json.encode(coding))
        return coding
    finally:
        new.unlink(missing_ok=True)


def _write_chunks(
    file: Path, unit: UnitRecord, base: tuple[Path, UnitRecord] | None, target: Path, stop: Callable[[], bool]
) -> list[tuple[int, int, str]] | None:
    """Code every chunk into `target` and make it durable; where each lies. None: stopped."""
    encoder, chunks, position = Encoder(), [], 0
    buffer, base_buffer = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK if base else 0))
    with ExitStack() as cleanup:
        source = cleanup.enter_context(file.open("rb", buffering=0)).fileno()
        before = cleanup.enter_context(base[0].open("rb", buffering=0)).fileno() if base else -1
        layout = _layout(source, unit.size)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        out = os.open(target, flags, 0o644)
        cleanup.callback(os.close, out)
        room = os.fstatvfs(out)
        if room.f_bavail * room.f_frsize < unit.size:
            raise OSError(errno.ENOSPC, "there is not enough room on the disk")
        os.fchmod(out, 0o644)
        for index, expected in enumerate(unit.chunks):
            if stop():
                return None
            start = index * CHUNK
            chunk = buffer[: min(CHUNK, unit.size - start)]
            if not _read_chunk(source, chunk, start, expected):
                raise StoreDamaged(f"{file} is not what was published (chunk {index}); it is not coded")
            other = None
            if base is not None and index < len(base[1].chunks):
                other = base_buffer[: min(CHUNK, base[1].size - start)]
                if not _read_chunk(before, other, start, base[1].chunks[index]):
                    other = None
            coded = encoder.encode(chunk, layout.between(start, start + len(chunk)), other) or chunk
            write_fully(out, coded)
            chunks.append((position, len(coded), blake3(coded).hexdigest()))
            position += len(coded)
        os.fsync(out)
    return chunks


def _read_chunk(fd: int, into: memoryview, offset: int, expected: str) -> bool:
    """Read a chunk; whether it is whole and has the expected hash."""
    return read_fully(fd, into, offset) == len(into) and blake3(into).hexdigest() == expected


def _layout(fd: int, size: int) -> Layout:
    try:
        return Layout.of_file(read_head(fd, max_head=32 * MAX_HEAD))
    except TensorFileError:
        return Layout.of_dtype("U8", size)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether nobody else encodes into `folder`, which is made if need be, until the block ends."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        os.chmod(folder, 0o755)  # noqa: S103  the contract's mode, whatever the umask
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
