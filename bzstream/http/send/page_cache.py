"""Asks the kernel whether a piece of a file is in the page cache, so that no sending thread waits for the disk.

sendfile of a page that is not cached waits for the disk, and with it waits every download that the thread could serve.
So the sender asks first, which costs about 1 µs a MiB: cachestat(2) (Linux 6.5) counts the cached pages of a range in
one call. On older kernels, and where it is not permitted, a one-byte preadv2 with RWF_NOWAIT at every 64 KiB replaces
it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from bzstream.payload import UnitFile

__all__ = ["Cachestat", "PageCacheProbe", "Probe"]

_STEP = 64 * 1024
_CACHESTAT = 451
"""System call number, the same on every architecture."""


class Probe(Protocol):
    """What the sender asks before it sends from a file. Each sending thread has a probe of its own."""

    def is_cached(self, file: UnitFile, offset: int, length: int) -> bool:
        """Whether bytes [offset, offset + length), length > 0, can be read without waiting for the disk."""


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently"))


# PyDLL keeps the interpreter's lock during the call: it takes a microsecond, giving the lock away and back takes more.
_libc = ctypes.PyDLL(None)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)


class Cachestat:
    """cachestat(2). Keeps the memory of the call, so each thread needs an object of its own."""

    __slots__ = ("_at", "_counts", "_range")

    def __init__(self) -> None:
        self._range, self._counts = _Range(), _Counts()
        self._at = (ctypes.addressof(self._range), ctypes.addressof(self._counts))

    def __call__(self, fd: int, offset: int, length: int) -> int | None:
        """The number of cached pages in a range of whole pages; None where the kernel does not tell."""
        self._range.offset, self._range.length = offset, length
        if _libc.syscall(_CACHESTAT, fd, *self._at, 0) != 0:
            return None
        cached: int = self._counts.cached
        return cached


class PageCacheProbe:
    """The probe of the running kernel."""

    __slots__ = ("_byte", "_count", "_settling")

    def __init__(
        self, settling: Mapping[UnitFile, float], count: Callable[[int, int, int], int | None] | None = None
    ) -> None:
        """`settling`: files that are being read ahead, and until when (monotonic seconds) pages may be on their way.

        `count`: what counts cached pages, a `Cachestat` by default.
        """
        self._settling = settling
        self._count = count or Cachestat()
        self._byte = [bytearray(1)]

    def is_cached(self, file: UnitFile, offset: int, length: int) -> bool:
        """As `Probe.is_cached`. What lies beyond the file's end counts as cached: reading there returns at once."""
        page, fd = mmap.PAGESIZE, file.fd
        first, last = offset // page, (offset + length - 1) // page
        pages = last - first + 1
        # When it is preempted while it counts, the call counts too few: once in 10 GB under load. So ask twice.
        for _ in range(2):
            cached = self._count(fd, first * page, pages * page)
            if cached is None:
                positions = (*range(offset, offset + length, _STEP), offset + length - 1)
                return all(self._is_readable(fd, position) for position in positions)
            if cached >= pages:
                # Pages on their way from the disk count as cached. They exist only where a read-ahead put them.
                settled = self._settling.get(file, 0.0) < time.monotonic()
                return settled or self._is_readable(fd, offset + length - 1)
        return os.fstat(fd).st_size < offset + length

    def _is_readable(self, fd: int, offset: int) -> bool:
        try:
            os.preadv(fd, self._byte, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True  # not supported by this file system: sendfile itself will tell
        return True
