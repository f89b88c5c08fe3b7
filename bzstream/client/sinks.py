"""Where received bytes go: a .part file, or memory that will be tensors.

A fetch worker asks its writer for memory, receives straight into it, and tells how much came. In a memory sink that
memory *is* the destination. For a file it is a page-aligned buffer that fits the processor's cache, hashed there and
then written: direct (past the page cache) when it filled up fast, because the copy that this saves is half of the
client's work on a fast link; through the page cache, at once, when the link is slow, so that a kill loses next to
nothing. Both can mix in one file because a direct write covers whole pages only.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bzstream.client.errors import DiskError
from bzstream.client.kernel import allocate, start_writing
from bzstream.client.tuning import Tuning
from bzstream.util.durable import replace_file
from bzstream.util.files import read_fully, write_fully

__all__ = ["Buffer", "FileSink", "MemorySink", "Sink", "SinkWriter", "disk_error", "require_regular"]

PAGE = mmap.PAGESIZE

Buffer = tuple[mmap.mmap, memoryview]
"""Page-aligned memory and the view of it."""


class SinkWriter(Protocol):
    """One worker's way into a sink."""

    def begin(self, position: int) -> None:
        """The next bytes belong at `position`."""

    def room(self) -> int:
        """The most bytes that `space` can give."""

    def space(self, count: int) -> memoryview:
        """Memory for the next up to `count` bytes."""

    def filled(self, count: int, *, last: bool) -> int:
        """`count` bytes were received into it. How many bytes are now in the sink that were not before; `last`: no
        more will follow these, all must go."""


class Sink(Protocol):
    """The destination of one unit."""

    def writer(self, spare: Callable[[int, Buffer], Buffer] | None) -> SinkWriter: ...

    def read(self, position: int, length: int) -> memoryview:
        """Bytes that are in the sink."""

    def memory_at(self, position: int, length: int) -> memoryview | None:
        """The destination itself, if it is memory."""

    def settled(self, begin: int, length: int) -> None:
        """These bytes were verified and will not change."""


class MemorySink:
    """Received straight into `memory` (writable, as long as the unit)."""

    def __init__(self, memory: memoryview, tuning: Tuning) -> None:
        self.memory = memory
        self._piece = tuning.memory_piece

    def writer(self, spare: Callable[[int, Buffer], Buffer] | None) -> SinkWriter:
        return _MemoryWriter(self.memory, self._piece)

    def read(self, position: int, length: int) -> memoryview:
        return self.memory[position : position + length]

    memory_at = read

    def settled(self, begin: int, length: int) -> None:
        pass


class _MemoryWriter:
    def __init__(self, memory: memoryview, piece: int) -> None:
        self._memory = memory
        self._piece = piece
        self._at = 0

    def begin(self, position: int) -> None:
        self._at = position

    def room(self) -> int:
        return self._piece

    def space(self, count: int) -> memoryview:
        return self._memory[self._at : self._at + count]

    def filled(self, count: int, *, last: bool) -> int:
        self._at += count
        return count


class FileSink:
    """A .part file of `size` bytes, its blocks reserved at the start so that a full disk is known at once.

    Raises DiskError.
    """

    def __init__(self, path: Path, size: int, tuning: Tuning) -> None:
        self.path = path
        self.size = size
        self.tuning = tuning
        self.use_direct = False
        """Whether the file system takes writes past the page cache."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = self._direct = -1
        try:
            self.fd = os.open(path, flags, 0o644)
            require_regular(self.fd, path)
            allocate(self.fd, size)
        except (OSError, DiskError) as error:
            self.close()
            raise (disk_error(error, path) if isinstance(error, OSError) else error) from None
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.use_direct = True
        except OSError:
            pass  # tmpfs before Linux 6.6 and some network file systems

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def writer(self, spare: Callable[[int, Buffer], Buffer] | None) -> SinkWriter:
        return _FileWriter(self, spare)

    def read(self, position: int, length: int) -> memoryview:
        view = memoryview(bytearray(length))
        self.read_into(position, view)
        return view

    def read_into(self, position: int, view: memoryview) -> None:
        """Fill `view` from the file."""
        try:
            if read_fully(self.fd, view, position) < len(view):
                raise DiskError(f"{self.path} was cut short by somebody else; start the pull again")
        except OSError as error:
            raise disk_error(error, self.path) from None

    def write(self, view: memoryview, position: int) -> None:
        """Write through the page cache."""
        try:
            write_fully(self.fd, view, position)
        except OSError as error:
            raise disk_error(error, self.path) from None

    def write_direct(self, view: memoryview, position: int) -> bool:
        """Write whole pages past the page cache; False if the file system does not want that after all."""
        try:
            count = os.pwrite(self._direct, view, position)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise disk_error(error, self.path) from None
        if count < len(view):
            self.write(view[count:], position + count)
        return True

    def memory_at(self, position: int, length: int) -> memoryview | None:
        return None

    def settled(self, begin: int, length: int) -> None:
        start_writing(self.fd, begin, length)

    def finish(self, final: Path) -> None:
        """Give the complete file its name: all bytes durable first, then the name, then the folder."""
        try:
            os.fsync(self.fd)
            replace_file(self.path, final)
        except OSError as error:
            raise disk_error(error, final) from None

    def close(self) -> None:
        for fd in (self.fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self.fd = self._direct = -1


class _FileWriter:
    """Gathers one worker's bytes. The buffer's offset and the file's position agree modulo the page size."""

    def __init__(self, sink: FileSink, spare: Callable[[int, Buffer], Buffer] | None) -> None:
        self._sink = sink
        self._spare = spare
        self._size = sink.tuning.buffer
        area = mmap.mmap(-1, self._size)
        self._buffer: Buffer = (area, memoryview(area))
        self._low = self._high = 0
        """The buffer's bytes [low, high) are received and not written; the first belongs at `_at`."""
        self._at = 0
        self._since = 0.0
        self._clock = time.monotonic

    def begin(self, position: int) -> None:
        self._at = position
        self._low = self._high = position % PAGE

    def room(self) -> int:
        return self._size - self._high

    def space(self, count: int) -> memoryview:
        if self._high == self._low:
            self._since = self._clock()
        return self._buffer[1][self._high : self._high + count]

    def filled(self, count: int, *, last: bool) -> int:
        self._high += count
        full = self._high == self._size
        if not last and not full and self._clock() - self._since < self._sink.tuning.gather_s:
            return 0
        before = self._at
        self._flush(keep_rest=not last)
        self._since = self._clock()
        if self._low == self._high:
            self._low = self._high = self._at % PAGE
        return self._at - before

    def _flush(self, *, keep_rest: bool) -> None:
        view = self._buffer[1]
        if self._sink.use_direct and self._high - self._low >= self._sink.tuning.direct_from:
            edge = -self._at % PAGE
            if edge:
                self._write(view, edge)
            pages = (self._high - self._low) // PAGE * PAGE
            if self._sink.write_direct(view[self._low : self._low + pages], self._at):
                whole = pages == self._size
                self._at += pages
                self._low += pages
                if whole and self._spare is not None:
                    self._buffer = self._spare(self._at - pages, self._buffer)
                    self._low = self._high = 0
                    return
            else:
                self._sink.use_direct = False
        if self._low < self._high and not (keep_rest and self._high < self._size and self._high - self._low < PAGE):
            self._write(view, self._high - self._low)

    def _write(self, view: memoryview, count: int) -> None:
        self._sink.write(view[self._low : self._low + count], self._at)
        self._low += count
        self._at += count


def require_regular(fd: int, path: Path) -> os.stat_result:
    """The status of an open file. Raises DiskError for a folder, a pipe or a device."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise DiskError(f"{path} is in the way: it is no regular file; remove it or choose another folder")
    return status


def disk_error(error: OSError, path: Path) -> DiskError:
    """One clear sentence for what the disk said."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"the disk is full: there is no room for {path}; free some and run the same command again")
    if error.errno == errno.EFBIG:
        return DiskError(f"{path} is larger than the file system or a limit of this shell allows")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiskError(f"{path} cannot be written: {error.strerror}; choose another folder")
    return DiskError(f"{path}: {error.strerror or error}")
