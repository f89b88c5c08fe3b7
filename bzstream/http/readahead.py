"""Cold pages keep nobody waiting but their own download.

sendfile of a page that is not in the page cache waits for the disk, and with it a sending thread and every download
that this thread could serve. So the sender asks `resident` first, about 1 µs a MiB: cachestat(2) (Linux 6.5) counts the
cached pages of a range in one call; on older kernels, and where it is not permitted, a one-byte preadv2 with RWF_NOWAIT
at every 64 KiB stands in for it.

A miss goes to a few threads. They read a window of the file into the page cache without copying it anywhere, by
sendfile to /dev/null (7 µs a MiB when warm); while few are busy, the windows after it too. Downloads that wait for the
same window wait for one read. (Announcing windows by posix_fadvise first was measured to halve the whole: the pages are
then allocated in one go, and waited for in another.)

Before that the kernel is asked for large folios, where it and the file system know them (ext4 since Linux 6.16). What
is in the page cache in pieces of 2 MiB, not 16 to 128 KiB, is sent with a tenth less CPU time, as long as it is there.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from bzstream.payload import UnitFile

__all__ = ["WINDOW", "ReadAhead", "Residency"]

WINDOW = 2 * 1024 * 1024
"""Bytes of one read-ahead: long enough for a disk's full speed, short enough that 256 downloads need 1 GiB of cache."""

_THREADS = 32
"""Reads at a time: a disk is fast only with several (nginx has 32 threads in a pool)."""
_MORE = 3
"""While fewer are busy, so many windows more are read for a download that goes on for as long: 8 MiB at a time."""
_SETTLE_S = 5.0
"""For so long after a read-ahead began, pages that the kernel reads beyond it may still be on their way."""
_PROBE = 64 * 1024
_CACHESTAT = 451
"""System call number, the same on every architecture."""
_MADV_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value

Waiter = Callable[[], None]


class _CachestatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently"))


# PyDLL keeps the interpreter's lock during the call: it takes a microsecond, giving the lock away and back takes more.
_libc = ctypes.PyDLL(None)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
# CDLL gives it away: these may wait for the disk. (Python's own mmap does not give it away, and takes a descriptor.)
_maps = ctypes.CDLL(None)
_maps.mmap.restype = ctypes.c_void_p
_maps.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_maps.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_maps.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Residency:
    """Asks the kernel what is cached; one for each thread that asks, because it keeps the call's memory."""

    __slots__ = ("_at", "_byte", "_range", "_settling", "_stat")

    def __init__(self, settling: Mapping[UnitFile, float]) -> None:
        """`settling`: files that the disk is at work on, and until when (monotonic) that is to be reckoned with."""
        self._settling = settling
        self._range, self._stat = _CachestatRange(), _Cachestat()
        self._at = (ctypes.addressof(self._range), ctypes.addressof(self._stat))
        self._byte = [bytearray(1)]

    def resident(self, file: UnitFile, offset: int, length: int) -> bool:
        """Whether bytes [offset, offset + length) of a file, length > 0, can be read without waiting for the disk.

        What lies beyond the file's end counts as resident: reading there returns at once.
        """
        page, fd = mmap.PAGESIZE, file.fd
        first, last = offset // page, (offset + length - 1) // page
        self._range.offset, self._range.length = first * page, (last - first + 1) * page
        if _libc.syscall(_CACHESTAT, fd, *self._at, 0) == 0:
            # Preempted while it counts, the call counts too few: once in 10 GB under load. So a miss is asked twice.
            if self._stat.cached < last - first + 1 and (
                _libc.syscall(_CACHESTAT, fd, *self._at, 0) or self._stat.cached < last - first + 1
            ):
                return os.fstat(fd).st_size < offset + length
            # Pages on their way from the disk count as cached. They are there only where a read-ahead put them.
            settled = self._settling.get(file, 0.0) < time.monotonic()
            return settled or self._readable(fd, offset + length - 1)
        return all(self._readable(fd, at) for at in (*range(offset, offset + length, _PROBE), offset + length - 1))

    def _readable(self, fd: int, offset: int) -> bool:
        try:
            os.preadv(fd, self._byte, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True  # not supported by this file system: sendfile itself will tell
        return True


class ReadAhead:
    """Brings windows of files into the page cache on a few threads and calls the waiters back on the loop."""

    __slots__ = ("_loop", "_null", "_pool", "_waiting", "settling")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-ahead")
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._waiting: dict[tuple[UnitFile, int], list[Waiter]] = {}
        self.settling: dict[UnitFile, float] = {}
        """Files that the disk is, or was a moment ago, at work on, and until when that is reckoned with."""

    def fetch(self, file: UnitFile, offset: int, length: int, waiter: Waiter) -> int:
        """Bring in the window that holds `offset`, then call `waiter` once on the loop, also when reading failed.

        Returns where the window ends. `length`: bytes that are wanted from `offset` on, now and later; no window beyond
        them is read. The file is held for as long as a thread uses it.
        """
        start = offset - offset % WINDOW
        self._begin(file, start).append(waiter)
        for further in range(start + WINDOW, min(start + (1 + _MORE) * WINDOW, offset + length), WINDOW):
            if len(self._waiting) < _THREADS:
                self._begin(file, further)
        return start + WINDOW

    def _begin(self, file: UnitFile, start: int) -> list[Waiter]:
        """Have a window read, if it is not being read already; returns those who wait for it."""
        waiters = self._waiting.get((file, start))
        if waiters is None:
            waiters = self._waiting[file, start] = []
            self.settling[file] = time.monotonic() + _SETTLE_S
            file.retain()
            future = self._pool.submit(_bring_in, self._null, file.fd, start)
            future.add_done_callback(partial(self._from_thread, file, start))
        return waiters

    def _from_thread(self, file: UnitFile, start: int, _: Future[None]) -> None:
        self._loop.call_soon_threadsafe(self._done, file, start)

    def _done(self, file: UnitFile, start: int) -> None:
        for old in [other for other, until in self.settling.items() if until < time.monotonic()]:
            del self.settling[old]
        file.release()
        for waiter in self._waiting.pop((file, start)):
            waiter()

    async def close(self) -> None:
        """End the threads and let go of every file. Waiters still waiting are called."""
        await self._loop.run_in_executor(None, self._pool.shutdown)
        assert not self._waiting, "threads report before they end"
        os.close(self._null)


def _bring_in(null: int, fd: int, start: int) -> None:
    """Read one window into the page cache."""
    _begin_large(fd, start)
    offset, end = start, start + WINDOW
    while offset < end:
        sent = os.sendfile(null, fd, offset, end - offset)
        if not sent:
            break
        offset += sent


def _begin_large(fd: int, start: int) -> None:
    """Have the kernel begin to read a window, and no more, into large folios.

    A page fault in a mapping with MADV_HUGEPAGE does so (mm/filemap.c, do_sync_mmap_readahead), and nothing else does;
    without MADV_RANDOM it reads the next window too. It is a wish: when any of this fails, the window is read as it
    comes.
    """
    address = _maps.mmap(None, WINDOW, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address == _MAP_FAILED:
        return
    wishes = (mmap.MADV_RANDOM, mmap.MADV_HUGEPAGE)
    if all(_maps.madvise(address, WINDOW, wish) == 0 for wish in wishes):
        _maps.madvise(address, mmap.PAGESIZE, _MADV_POPULATE_READ)
    _maps.munmap(address, WINDOW)
