"""What the page cache holds, as the kernel tells it."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import pytest

from bzstream.http.send.page_cache import PageCacheProbe
from bzstream.payload import UnitFile
from tests.http.support import evict


@pytest.mark.parametrize("cachestat", [True, False])
def test_what_is_cached(tmp_path: Path, cachestat: bool) -> None:
    """With `cachestat` False as on older kernels, which do not know the call."""
    path = tmp_path / "unit"
    path.write_bytes(os.urandom(4 << 20))
    evict(path)
    file = UnitFile(path)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    probe = PageCacheProbe({file: math.inf}, None if cachestat else lambda fd, offset, length: None)
    try:
        if probe.is_cached(file, 0, 1):
            pytest.skip("this file system does not let its pages go")
        assert not probe.is_cached(file, 1 << 20, 1 << 20)
        os.pread(file.fd, 1 << 20, 1 << 20)
        assert probe.is_cached(file, 1 << 20, 1 << 20)
        assert probe.is_cached(file, (1 << 20) + 5, 1)
        assert not probe.is_cached(file, 1 << 20, 3 << 20)
        os.pread(file.fd, 4 << 20, 0)
        assert probe.is_cached(file, 0, 4 << 20)
        assert probe.is_cached(file, (4 << 20) - 1, 5), "what lies beyond the end is not waited for"
        assert probe.is_cached(file, 5 << 20, mmap.PAGESIZE)
    finally:
        file.release()


@pytest.mark.parametrize(("counts", "cached"), [([0, 4], True), ([4], True), ([0, 3], False)])
def test_a_count_that_was_too_small_is_asked_for_again(tmp_path: Path, counts: list[int], cached: bool) -> None:
    """A preempted cachestat counts too few pages: that alone must not send anybody to the disk."""
    path = tmp_path / "unit"
    path.write_bytes(bytes(8 * mmap.PAGESIZE))
    file, left = UnitFile(path), list(counts)
    probe = PageCacheProbe({}, lambda fd, offset, length: left.pop(0))
    assert probe.is_cached(file, mmap.PAGESIZE, 4 * mmap.PAGESIZE) is cached
    assert left == []
    file.release()
