"""Reads and writes that go on until they are done, bounded reading of small files, file stamps and file hashes.

One `read` or `write` call may move fewer bytes than it was asked to. Everything here may be called from any thread,
and raises OSError as the operating system gives it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["FileStamp", "file_stamp", "hash_file", "read_fully", "read_small_file", "stamp_of", "write_fully"]

FileStamp = tuple[int, int, int, int]
"""(device, inode, size in bytes, modification time in ns): equal as long as nobody replaced or wrote to the file."""


def read_fully(fd: int, into: memoryview, offset: int) -> int:
    """Fill `into` with the file's bytes from `offset` on. Returns the bytes read: fewer only where the file ends."""
    done = 0
    while done < len(into) and (count := os.preadv(fd, [into[done:]], offset + done)):
        done += count
    return done


def write_fully(fd: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of `data`, at `offset`, or where the descriptor stands (pipes, sockets) when that is None."""
    left = memoryview(data)
    while left:
        count = os.write(fd, left) if offset is None else os.pwrite(fd, left, offset)
        left = left[count:]
        if offset is not None:
            offset += count


def read_small_file(path: Path, limit: int, *, check: Callable[[os.stat_result], None] | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    `check` sees the status of the open file before anything is read. A named pipe or a folder is refused rather than
    waited for. Every OSError has a `strerror` that fits after "it cannot be used: ".
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if check is not None:
            check(status)
        with open(fd, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(fd)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
    return content


def stamp_of(status: os.stat_result) -> FileStamp:
    """The stamp in a status that was already taken.

    The change time (ctime) is left out on purpose: it moves when another name of the file is removed, and unit files
    have a name in every snapshot that they are part of.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def file_stamp(path: Path | int) -> FileStamp | None:
    """The stamp of a file (a path or a descriptor) now, or None when there is none to be had."""
    try:
        return stamp_of(os.stat(path))
    except OSError:
        return None


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes as 64 lower-case hex digits."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
