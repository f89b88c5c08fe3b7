"""Pages from the disk: what is in memory, and what is read when it is not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bzstream.http.send.page_cache import PageCacheProbe
from bzstream.http.send.read_ahead import THREADS, WINDOW, ReadAhead, begin_large_folios, read_window
from bzstream.payload import UnitFile
from tests.http.support import evict


@pytest.fixture
def file(tmp_path: Path) -> Iterator[UnitFile]:
    """Ten windows and a bit, none of them in memory if the file system can."""
    path = tmp_path / "unit"
    path.write_bytes(os.urandom(10 * WINDOW + 5))
    evict(path)
    file = UnitFile(path)
    yield file
    file.release()
    assert file.references == 0


def windows_read(file: UnitFile, *wanted: tuple[int, int], threads: int = THREADS) -> list[int]:
    """Numbers of the windows that are read when these (offset, length) are fetched at a time."""
    read: list[int] = []

    def note(null: int, fd: int, start: int, length: int) -> None:
        assert length == WINDOW
        read.append(start // WINDOW)

    async def fetch() -> None:
        ahead = ReadAhead(asyncio.get_running_loop(), threads=threads, read=note)
        arrived = [asyncio.Event() for _ in wanted]
        for (offset, length), event in zip(wanted, arrived, strict=True):
            end = ahead.fetch(file, offset, length, event.set)
            assert end % WINDOW == 0
            assert offset < end <= offset + WINDOW
        async with asyncio.timeout(10):
            for event in arrived:
                await event.wait()
        await ahead.close()

    asyncio.run(fetch())
    return sorted(read)


def test_a_long_download_has_windows_read_ahead(file: UnitFile) -> None:
    assert windows_read(file, (WINDOW + 7, file.size)) == [1, 2, 3, 4]


def test_nothing_is_read_beyond_what_is_wanted(file: UnitFile) -> None:
    assert windows_read(file, (WINDOW + 7, 1)) == [1]
    assert windows_read(file, (WINDOW + 7, WINDOW - 7)) == [1]
    assert windows_read(file, (WINDOW + 7, WINDOW)) == [1, 2]
    assert windows_read(file, (9 * WINDOW, WINDOW + 5)) == [9, 10]


def test_downloads_share_a_read(file: UnitFile) -> None:
    assert windows_read(file, (0, 1), (1, WINDOW), (WINDOW - 1, 1)) == [0, 1]


def test_no_more_is_read_ahead_than_threads_can(file: UnitFile) -> None:
    assert windows_read(file, (0, file.size), threads=3) == [0, 1, 2]


def test_a_window_is_begun_as_a_whole(file: UnitFile) -> None:
    """Not page by page as sendfile asks: the kernel is told beforehand that large folios are welcome."""
    probe = PageCacheProbe({})
    if probe.is_cached(file, 3 * WINDOW, 1):
        pytest.skip("this file system does not let its pages go")
    maps = Path("/proc/self/maps").read_text().count(str(file.path))
    begin_large_folios(file.fd, 3 * WINDOW, WINDOW)
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert probe.is_cached(file, 3 * WINDOW, WINDOW)
    assert not probe.is_cached(file, 2 * WINDOW, 1)
    assert not probe.is_cached(file, 4 * WINDOW, 1)
    assert Path("/proc/self/maps").read_text().count(str(file.path)) == maps


def test_a_window_that_can_not_be_mapped_is_read_all_the_same(file: UnitFile) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    odd = 4096 * 3 + 1
    read_window(null, file.fd, odd, WINDOW)
    os.close(null)
    assert PageCacheProbe({}).is_cached(file, odd, WINDOW)
    begin_large_folios(-1, 0, WINDOW)
