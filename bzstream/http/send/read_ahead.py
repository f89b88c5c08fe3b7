"""Reads pieces of files into the page cache, for downloads whose next bytes are on the disk.

A few threads read a window of the file into the page cache without copying it anywhere, by sendfile to /dev/null (7 µs
a MiB when it is cached already). While few windows are being read, the windows after it are read too. Downloads that
wait for the same window wait for one read. (Announcing windows by posix_fadvise first was measured to halve the speed:
the pages are then allocated in one go, and waited for in another.)

Before that the kernel is asked for large folios, where it and the file system know them (ext4 since Linux 6.16). What
is in the page cache in pieces of 2 MiB, not 16 to 128 KiB, is sent with a tenth less CPU time, as long as it is there.

All methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from bzstream.payload import UnitFile

__all__ = ["THREADS", "WINDOW", "ReadAhead", "begin_large_folios", "read_window"]

WINDOW = 2 * 1024 * 1024
"""Bytes of one read-ahead: long enough for a disk's full speed, short enough that 256 downloads need 1 GiB of cache."""

THREADS = 32
"""Reads at a time: a disk is fast only with several (nginx has 32 threads in a pool)."""
_MORE = 3
"""While fewer are busy, so many windows more are read for a download that goes on for as long: 8 MiB at a time."""
_SETTLE_S = 5.0
"""For so long after a read-ahead began, pages that the kernel reads beyond it may still be on their way."""
_MADV_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value

Waiter = Callable[[], None]


# CDLL gives it away: these may wait for the disk. (Python's own mmap does not give it away, and takes a descriptor.)
_maps = ctypes.CDLL(None)
_maps.mmap.restype = ctypes.c_void_p
_maps.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_maps.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_maps.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class ReadAhead:
    """Brings windows of files into the page cache on a few threads and calls the waiters back on the loop."""

    __slots__ = ("_loop", "_null", "_pool", "_read", "_threads", "_waiting", "_window", "settling")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        window: int = WINDOW,
        threads: int = THREADS,
        read: Callable[[int, int, int, int], None] | None = None,
    ) -> None:
        """`read` is called on a thread with the arguments of `read_window`, which it replaces."""
        self._loop = loop
        self._window = window
        self._threads = threads
        self._read = read or read_window
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._waiting: dict[tuple[UnitFile, int], list[Waiter]] = {}
        self.settling: dict[UnitFile, float] = {}
        """Files that are being read, or were a moment ago, and until when (monotonic seconds) pages may be on their
        way. Sending threads read it; each access is one operation of the dictionary."""

    def fetch(self, file: UnitFile, offset: int, length: int, waiter: Waiter) -> int:
        """Bring in the window that holds `offset`, then call `waiter` once on the loop, also when reading failed.

        Returns where the window ends. `length`: bytes that are wanted from `offset` on, now and later; no window beyond
        them is read. The file is held for as long as a thread uses it.
        """
        window = self._window
        start = offset - offset % window
        self._begin(file, start).append(waiter)
        for further in range(start + window, min(start + (1 + _MORE) * window, offset + length), window):
            if len(self._waiting) < self._threads:
                self._begin(file, further)
        return start + window

    def _begin(self, file: UnitFile, start: int) -> list[Waiter]:
        """Have a window read, if it is not being read already; returns the list of its waiters."""
        waiters = self._waiting.get((file, start))
        if waiters is None:
            waiters = self._waiting[file, start] = []
            self.settling[file] = time.monotonic() + _SETTLE_S
            file.retain()
            future = self._pool.submit(self._read, self._null, file.fd, start, self._window)
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


def read_window(null: int, fd: int, start: int, length: int) -> None:
    """Read one window of a file into the page cache. `null`: a descriptor of /dev/null."""
    begin_large_folios(fd, start, length)
    offset, end = start, start + length
    while offset < end:
        sent = os.sendfile(null, fd, offset, end - offset)
        if not sent:
            break
        offset += sent


def begin_large_folios(fd: int, start: int, length: int) -> None:
    """Have the kernel begin to read a window, and no more, into large folios.

    A page fault in a mapping with MADV_HUGEPAGE does so (mm/filemap.c, do_sync_mmap_readahead), and nothing else does;
    without MADV_RANDOM it reads the next window too. Nothing depends on it: when any of this fails, the window is read
    all the same.
    """
    address = _maps.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address == _MAP_FAILED:
        return
    wishes = (mmap.MADV_RANDOM, mmap.MADV_HUGEPAGE)
    if all(_maps.madvise(address, length, wish) == 0 for wish in wishes):
        _maps.madvise(address, mmap.PAGESIZE, _MADV_POPULATE_READ)
    _maps.munmap(address, length)
