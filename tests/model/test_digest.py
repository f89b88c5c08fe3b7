"""Chunk hashes do not depend on how a stream is cut into pieces."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.model import SnapshotCache, publish
from bzstream.model.digest import CHUNK, ChunkHasher, digest_chunks, digest_file

from .build import fused, write_checkpoint

DATA = np.random.default_rng(5).bytes(2 * CHUNK + 12345)
WANTED = tuple(blake3(DATA[at : at + CHUNK]).hexdigest() for at in range(0, len(DATA), CHUNK))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, len(DATA) - 1), max_size=6))
def test_any_cut_gives_the_same_chunks(cuts: list[int]) -> None:
    chunks = ChunkHasher()
    edges = [0, *sorted(cuts), len(DATA)]
    for begin, end in pairwise(edges):
        chunks.update(memoryview(DATA)[begin:end])
    assert chunks.finish() == WANTED


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_the_last_chunk_is_short_and_never_empty(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA[:size])
    digest = digest_file(path)
    assert digest.sha256 == hashlib.sha256(DATA[:size]).hexdigest()
    assert len(digest.chunks) == -(-size // CHUNK)
    fd = os.open(path, os.O_RDONLY)
    assert digest_chunks(fd) == digest.chunks
    os.close(fd)


def test_units_of_several_chunks(tmp_path: Path) -> None:
    """Pieces of a unit begin anywhere in its chunks, unlike those of the view."""
    write_checkpoint(tmp_path / "in", fused(layers=1, experts=4, hidden=1024, inner=1536))
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    for unit in cache.current.units.values():
        raw = unit.payload.read()
        assert list(unit.chunks) == [blake3(raw[at : at + CHUNK]).hexdigest() for at in range(0, len(raw), CHUNK)]
    assert len(cache.current.units["partial/1"].chunks) == 3
    cache.close()
