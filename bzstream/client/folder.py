"""The folder that a pull writes into: its lock, the files of a unit, and chunks that older files can give.

For a unit `group-0.safetensors` the folder holds, until it is finished, `.group-0.safetensors.part` (the bytes, with
holes) and `.group-0.safetensors.state` (the journal). Nothing unfinished ever has the final name. An older finished
file is only read: chunks of it that the new manifest also has are copied instead of fetched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from bzstream.client.errors import DiskError, FolderBusy
from bzstream.client.manifest import Manifest
from bzstream.client.sinks import disk_error, require_regular
from bzstream.util.durable import temporary_name
from bzstream.util.files import read_fully

__all__ = ["OldFile", "UnitFiles", "lock_folder", "matching_chunks"]


_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
"""What a file system without flock answers."""


@contextmanager
def lock_folder(folder: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Make the folder and hold it for this pull; the kernel lets go of it however the process ends.

    Raises FolderBusy and DiskError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise disk_error(error, folder) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(f"another pull is writing into {folder}; wait for it or choose another folder") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise disk_error(error, folder) from None
            notify(f"the file system of {folder} has no locks: run only one pull into it at a time")
        yield
    finally:
        os.close(fd)


class UnitFiles:
    """The three names of one unit in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.final = folder / name
        self.part = folder / f".{name}.part"
        self.state = folder / f".{name}.state"

    def remove_unfinished(self) -> None:
        """Remove what an unfinished pull left."""
        for path in (self.part, self.state, temporary_name(self.state)):
            path.unlink(missing_ok=True)


class OldFile:
    """A finished file of an earlier version, as a source of unchanged chunks (`transfer.LocalChunkSource`).

    Raises OSError from the constructor, and DiskError for what is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.size = require_regular(self._fd, path).st_size
        except BaseException:
            os.close(self._fd)
            raise
        self._places: dict[int, int] = {}

    def compare(self, manifest: Manifest, seen: Callable[[int], None]) -> bool:
        """Find the chunks of the manifest that are in this file, at whatever multiple of the chunk size.

        Whether the file is, chunk by chunk, exactly the manifest's. `seen(n)` is told of n more bytes read.
        """
        size = manifest.chunk_size
        offsets = range(0, self.size, size)
        found = hash_chunks(self._fd, [(offset, min(size, self.size - offset)) for offset in offsets], seen)
        where: dict[bytes, int] = {}
        for offset, digest in zip(offsets, found, strict=True):
            where.setdefault(digest, offset)
        if self.size == manifest.size and tuple(found) == manifest.chunks:
            return True
        # The last chunk may be short; a match of its hash implies its length.
        self._places = {i: where[digest] for i, digest in enumerate(manifest.chunks) if digest in where}
        return False

    def keep_only(self, wanted: Callable[[int], bool]) -> None:
        """Drop the chunks that are not wanted."""
        self._places = {index: place for index, place in self._places.items() if wanted(index)}

    def chunks(self) -> Sequence[int]:
        return sorted(self._places)

    def read_into(self, index: int, view: memoryview) -> bool:
        return _read(self._fd, self._places[index], view)

    def read_at(self, offset: int, view: memoryview) -> bool:
        """Fill `view` with the file's bytes; False if it ends first. Raises DiskError."""
        return _read(self._fd, offset, view)

    def sha256(self, stopped: threading.Event) -> bytes | None:
        """The digest of the whole file, None when it was stopped or cannot be read."""
        hasher, buffer, offset = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
        try:
            while offset < self.size:
                view = buffer[: min(len(buffer), self.size - offset)]
                if stopped.is_set() or not _read(self._fd, offset, view):
                    return None
                hasher.update(view)
                offset += len(view)
        except DiskError:
            return None
        return hasher.digest()

    def close(self) -> None:
        os.close(self._fd)


def matching_chunks(fd: int, manifest: Manifest, candidates: Sequence[int], seen: Callable[[int], None]) -> list[int]:
    """Those of the candidate chunks that an open file really holds at their own place."""
    ranges = [(index * manifest.chunk_size, manifest.chunk_length(index)) for index in candidates]
    found = hash_chunks(fd, ranges, seen)
    return [index for index, digest in zip(candidates, found, strict=True) if digest == manifest.chunks[index]]


def hash_chunks(fd: int, ranges: Sequence[tuple[int, int]], seen: Callable[[int], None]) -> list[bytes]:
    """BLAKE3 of each (offset, length) of a file, over a few threads; b"" where the file is too short."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms that a first pull need not pay

    piece = 1 << 20

    def digest(span: tuple[int, int]) -> bytes:
        offset, length = span
        hasher = blake3()
        buffer = memoryview(bytearray(min(piece, length)))
        while length:
            view = buffer[: min(len(buffer), length)]
            if not _read(fd, offset, view):
                return b""
            hasher.update(view)
            offset += len(view)
            length -= len(view)
            seen(len(view))
        return hasher.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "bzstream-compare") as pool:
        return list(pool.map(digest, ranges))


def _read(fd: int, offset: int, view: memoryview) -> bool:
    """Fill `view` from the file; False if the file ends first. Raises DiskError."""
    try:
        return read_fully(fd, view, offset) == len(view)
    except OSError as error:
        raise DiskError(f"an older file cannot be read: {error.strerror}; remove it and pull again") from None
