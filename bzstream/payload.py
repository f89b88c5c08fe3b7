"""Extent and Payload: the one value that the model makes and the HTTP core sends.

A payload is a run of bytes that is never assembled. Its parts are short byte strings (an envelope, a safetensors
head, a multipart boundary) and *extents*, ranges of unit files that the kernel sends from its page cache by itself.
The full model of Qwen3-VL-30B-A3B is one payload of some 12,000 extents; a ranged request for it must not copy that
list, so a slice is a window over the same parts and costs O(1), and finding the part at a position costs O(log parts).

A snapshot opens each of its unit files once, and uses are counted: code that keeps a payload across turns of the event
loop holds a reference (`retain`/`release`), so that a new snapshot never takes a file away from a download under way.
References are counted on the event loop's thread alone; reading is allowed on any thread.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from bzstream.util.counted import Counted
from bzstream.util.files import file_stamp, read_fully, stamp_of

__all__ = ["Extent", "Payload", "UnitFile", "size_of"]


class UnitFile(Counted):
    """An immutable file, open for reading, with a count of its users; closed when the count falls to 0.

    `intact()` is the cheap test before each download that the file is still the one that was opened; a sender that
    finds the file short (sendfile returned 0) sets `broken`, after which it is never served from again.

    Raises OSError from the constructor when the file cannot be opened or is not a regular file.
    """

    __slots__ = ("_stamp", "broken", "fd", "path", "size")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        self.size = status.st_size
        self._stamp = stamp_of(status)
        self.broken = False

    @property
    def references(self) -> int:
        """Users of the open file; 0 when it is closed."""
        return self._references

    def intact(self) -> bool:
        """Whether size and modification time are still what they were at opening (one fstat, about 1 µs)."""
        self.broken = self.broken or file_stamp(self.fd) != self._stamp
        return not self.broken

    def on_last_release(self) -> None:
        os.close(self.fd)
        self.fd = -1


class Extent(NamedTuple):
    """`length` bytes of `file` from `offset`; the range lies inside the file as it was when opened."""

    file: UnitFile
    offset: int
    length: int


def size_of(part: bytes | Extent) -> int:
    """Bytes in one part. (`len` of an Extent is the number of its fields.)"""
    return part.length if isinstance(part, Extent) else len(part)


class Payload:
    """An immutable sequence of bytes made of `bytes` and `Extent` parts: `len(payload)`, `payload[a:b]`, iteration.

    A slice has step 1, follows Python's slice rules and shares the parts of the payload it was cut from.
    """

    __slots__ = ("_ends", "_parts", "_start", "_stop", "files")

    def __init__(self, parts: tuple[bytes | Extent, ...]) -> None:
        self._parts = tuple(p for p in parts if size_of(p))
        self._ends = list(accumulate(size_of(p) for p in self._parts))
        self._start = 0
        self._stop = self._ends[-1] if self._ends else 0
        self.files: tuple[UnitFile, ...] = tuple(dict.fromkeys(p.file for p in self._parts if isinstance(p, Extent)))
        """Every file that the parts (of the payload that this one was cut from) lie in, once each."""

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, window: slice) -> Payload:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError("a payload is sliced with step 1")
        cut = Payload.__new__(Payload)
        cut._parts, cut._ends, cut.files = self._parts, self._ends, self.files
        cut._start = self._start + start
        cut._stop = self._start + max(start, stop)
        return cut

    def at(self, position: int) -> bytes | Extent:
        """The rest of the part that holds byte `position`, cut at the payload's end. O(log parts).

        Raises IndexError when `position` is not in [0, len(self)).
        """
        where = self._start + position
        if position < 0 or where >= self._stop:
            raise IndexError("position is outside the payload")
        index = bisect_right(self._ends, where)
        part = self._parts[index]
        end = self._ends[index]
        stop = min(end, self._stop)
        if isinstance(part, Extent):
            begin = end - part.length
            return Extent(part.file, part.offset + where - begin, stop - where)
        begin = end - len(part)
        return part[where - begin : stop - begin]

    def __iter__(self) -> Iterator[bytes | Extent]:
        position, length = 0, len(self)
        while position < length:
            part = self.at(position)
            position += size_of(part)
            yield part

    def __add__(self, other: Payload) -> Payload:
        return Payload((*self, *other))

    def intact(self) -> bool:
        """Whether every file behind the payload is still the one that was opened."""
        return all(file.intact() for file in self.files)

    def retain(self) -> None:
        """Hold every file behind the payload; pair each call with one `release`."""
        for file in self.files:
            file.retain()

    def release(self) -> None:
        for file in self.files:
            file.release()

    def read_into(self, target: memoryview) -> int:
        """Copy the bytes into `target`, as long as the payload. Returns the bytes read: fewer if a file was cut."""
        done = 0
        for part in self:
            size = size_of(part)
            if isinstance(part, Extent):
                # pread, not a map: touching a mapped page of a file that was cut is a SIGBUS.
                count = read_fully(part.file.fd, target[done : done + size], part.offset)
            else:
                target[done : done + size] = part
                count = size
            done += count
            if count < size:
                break
        return done

    def read(self) -> bytes:
        """All bytes, copied into memory: for heads, tests and small payloads. Shorter if a file was cut."""
        target = bytearray(len(self))
        return bytes(memoryview(target)[: self.read_into(memoryview(target))])
