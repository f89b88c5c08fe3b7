"""Pages from the disk: what is in memory, and what is read when it is not."""

from __future__ import annotations

import asyncio
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bzstream.http import readahead
from bzstream.http.readahead import WINDOW, ReadAhead, Residency
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
    assert file._references == 0


@pytest.mark.parametrize("cachestat", [True, False])
def test_what_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cachestat: bool) -> None:
    if not cachestat:
        monkeypatch.setattr(readahead, "_CACHESTAT", 100_000)  # ENOSYS, as on older kernels
    path = tmp_path / "unit"
    path.write_bytes(os.urandom(4 << 20))
    evict(path)
    file = UnitFile(path)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    probe = Residency({file: math.inf})
    try:
        if probe.resident(file, 0, 1):
            pytest.skip("this file system does not let its pages go")
        assert not probe.resident(file, 1 << 20, 1 << 20)
        os.pread(file.fd, 1 << 20, 1 << 20)
        assert probe.resident(file, 1 << 20, 1 << 20)
        assert probe.resident(file, (1 << 20) + 5, 1)
        assert not probe.resident(file, 1 << 20, 3 << 20)
        os.pread(file.fd, 4 << 20, 0)
        assert probe.resident(file, 0, 4 << 20)
        assert probe.resident(file, (4 << 20) - 1, 5), "what lies beyond the end is not waited for"
        assert probe.resident(file, 5 << 20, mmap.PAGESIZE)
    finally:
        file.release()


def windows_read(file: UnitFile, monkeypatch: pytest.MonkeyPatch, *wanted: tuple[int, int]) -> list[int]:
    """Numbers of the windows that are read when these (offset, length) are fetched at a time."""
    read: list[int] = []
    monkeypatch.setattr(readahead, "_bring_in", lambda null, fd, start: read.append(start // WINDOW))

    async def fetch() -> None:
        ahead = ReadAhead(asyncio.get_running_loop())
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


def test_a_long_download_has_windows_read_ahead(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows_read(file, monkeypatch, (WINDOW + 7, file.size)) == [1, 2, 3, 4]


def test_nothing_is_read_beyond_what_is_wanted(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows_read(file, monkeypatch, (WINDOW + 7, 1)) == [1]
    assert windows_read(file, monkeypatch, (WINDOW + 7, WINDOW - 7)) == [1]
    assert windows_read(file, monkeypatch, (WINDOW + 7, WINDOW)) == [1, 2]
    assert windows_read(file, monkeypatch, (9 * WINDOW, WINDOW + 5)) == [9, 10]


def test_downloads_share_a_read(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows_read(file, monkeypatch, (0, 1), (1, WINDOW), (WINDOW - 1, 1)) == [0, 1]


def test_no_more_is_read_ahead_than_threads_can(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_THREADS", 3)
    assert windows_read(file, monkeypatch, (0, file.size)) == [0, 1, 2]


def test_a_window_is_begun_as_a_whole(file: UnitFile) -> None:
    """Not page by page as sendfile asks: the kernel is told beforehand that large folios are welcome."""
    probe = Residency({})
    if probe.resident(file, 3 * WINDOW, 1):
        pytest.skip("this file system does not let its pages go")
    maps = Path("/proc/self/maps").read_text().count(str(file.path))
    readahead._begin_large(file.fd, 3 * WINDOW)
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert probe.resident(file, 3 * WINDOW, WINDOW)
    assert not probe.resident(file, 2 * WINDOW, 1)
    assert not probe.resident(file, 4 * WINDOW, 1)
    assert Path("/proc/self/maps").read_text().count(str(file.path)) == maps


def test_a_window_that_can_not_be_mapped_is_read_all_the_same(file: UnitFile) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    odd = 4096 * 3 + 1
    readahead._bring_in(null, file.fd, odd)
    os.close(null)
    assert Residency({}).resident(file, odd, WINDOW)
    readahead._begin_large(-1, 0)
