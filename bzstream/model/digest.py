"""The two hashes of every unit: SHA-256 of the whole payload, BLAKE3 of each 8 MiB chunk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

__all__ = ["BLOCK", "CHUNK", "ChunkHasher", "Digest", "digest_blocks", "digest_chunks", "digest_file", "read_blocks"]

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


def read_blocks(fd: int, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
    """An open file's bytes from `offset` on, `length` of them or up to its end, in one buffer that is used again.

    Ends early where the file does. Raises OSError.
    """
    buffer = memoryview(bytearray(BLOCK))
    while count := os.preadv(fd, [buffer if length is None else buffer[: min(length, BLOCK)]], offset):
        yield buffer[:count]
        offset += count
        length = None if length is None else length - count


def digest_blocks(blocks: Iterable[memoryview]) -> Digest:
    """Both hashes of what the blocks hold one after the other."""
    sha, chunks = hashlib.sha256(), ChunkHasher()
    for block in blocks:
        sha.update(block)
        chunks.update(block)
    return Digest(sha.hexdigest(), chunks.finish())


def digest_file(path: Path, *, seen: Callable[[int], None] = lambda _: None) -> Digest:
    """Both hashes of a file, read once; `seen` is called with the bytes of each block. Raises OSError."""

    def told(blocks: Iterable[memoryview]) -> Iterator[memoryview]:
        for block in blocks:
            yield block
            seen(len(block))

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return digest_blocks(told(read_blocks(fd)))
    finally:
        os.close(fd)


def digest_chunks(fd: int, *, stop: Callable[[], bool] = lambda: False) -> tuple[str, ...]:
    """The chunk hashes of an open file, or fewer when `stop` says so. Raises OSError."""
    chunks = ChunkHasher()
    for block in takewhile(lambda _: not stop(), read_blocks(fd)):
        chunks.update(block)
    return chunks.finish()
