"""The two hashes of every unit: SHA-256 of the whole payload, BLAKE3 of each 8 MiB chunk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

__all__ = ["BLOCK", "CHUNK", "ChunkHasher", "Digest", "digest_chunks", "digest_file"]

CHUNK = 8 * 1024 * 1024
"""Bytes of a manifest's chunk, fixed by the contract: what a client fetches again when it arrives damaged."""

BLOCK = 1024 * 1024
"""Bytes of one read: the fastest size measured for copies, as the block is still in the core's cache when hashed."""


class Digest(NamedTuple):
    """Lower-case hex: SHA-256 of a payload, and BLAKE3 of its chunks in order."""

    sha256: str
    chunks: tuple[str, ...]


class ChunkHasher:
    """BLAKE3 of each CHUNK bytes of a stream."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._hasher = blake3()
        self._filled = 0

    def update(self, data: memoryview) -> None:
        while data:
            piece = data[: CHUNK - self._filled]
            self._hasher.update(piece)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == CHUNK:
                self._close()

    def finish(self) -> tuple[str, ...]:
        """The hashes; the stream ends here."""
        if self._filled:
            self._close()
        return tuple(self._done)

    def _close(self) -> None:
        self._done.append(self._hasher.hexdigest())
        self._hasher = blake3()
        self._filled = 0


def digest_file(path: Path, *, seen: Callable[[int], None] | None = None) -> Digest:
    """Both hashes of a file, read once; `seen` is called with the bytes of each block. Raises OSError."""
    sha, chunks = hashlib.sha256(), ChunkHasher()
    buffer = memoryview(bytearray(BLOCK))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while count := os.readv(fd, [buffer]):
            sha.update(buffer[:count])
            chunks.update(buffer[:count])
            if seen is not None:
                seen(count)
    finally:
        os.close(fd)
    return Digest(sha.hexdigest(), chunks.finish())


def digest_chunks(fd: int, *, stop: Callable[[], bool] = lambda: False) -> tuple[str, ...]:
    """The chunk hashes of an open file, or fewer when `stop` says so. Raises OSError."""
    chunks = ChunkHasher()
    buffer = memoryview(bytearray(BLOCK))
    offset = 0
    while not stop() and (count := os.preadv(fd, [buffer], offset)):
        chunks.update(buffer[:count])
        offset += count
    return chunks.finish()
