"""From a chunk to its coded form: blocks of planes, each plane by Huffman coding nearly alone.

The planes have no repetitions worth finding, so zstd's match finder is starved (the smallest tables, the longest
shortest match): the result is smaller than level 1's, which takes chance matches that cost more than they bring, and
takes half the time; any zstd decodes it. Runs of one byte, as in the upper plane of a small difference, are still
found, because zstd always looks for a repetition of the last offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from bzstream.coding.form import (
    DIFFERENCES,
    MAX_BLOCK_ELEMENTS,
    MAX_BLOCKS,
    MAX_CHUNK,
    OFFSETS,
    VALUES,
    WIDE_DIFFERENCES,
    WIDTHS,
    build_block_head,
)
from bzstream.coding.layout import Span

__all__ = ["Encoder"]

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview
Parts = list[bytes]

HUFFMAN_ONLY = zstandard.ZstdCompressionParameters(
    compression_level=1, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0,
    strategy=zstandard.STRATEGY_FAST, write_content_size=True,
)  # fmt: skip

SAMPLE_STRIDE, SAMPLE = 32, 4096
"""One byte in 32 of a plane, if that makes 4096 of them, tells in a fraction of the time whether coding it pays."""

WORTH = 0.98
"""A plane that shrinks by less is stored as it is: decoding it would cost more time than the bytes do."""

MAY_WIN = 1.1
"""Values are coded beside a difference when a sample says that they may take less than 1.1 times its bytes."""


class Encoder:
    """Encodes chunks; one for each thread that does so. Scratch memory: 2 MiB and the coded chunk."""

    def __init__(self) -> None:
        self._huffman = zstandard.ZstdCompressor(compression_params=HUFFMAN_ONLY)
        self._difference = np.empty(MAX_BLOCK_ELEMENTS, np.uint32)
        *self._planes, self._upper = np.empty((max(WIDTHS) + 1, MAX_BLOCK_ELEMENTS), np.uint8)

    def encode(self, chunk: Buffer, spans: Iterable[Span], base: Buffer | None = None) -> bytes | None:
        """The coded form of `chunk`, or None when it would not be shorter: then the chunk stands for itself.

        `spans` cover the chunk without a gap (`Layout.between`); they decide how well it shrinks, never what it
        decodes to. A `base` of another length is not used.
        """
        size = memoryview(chunk).nbytes
        if not 0 < size <= MAX_CHUNK:
            return None
        if base is not None and memoryview(base).nbytes != size:
            base = None
        blocks = list(_blocks(spans))
        if len(blocks) > MAX_BLOCKS:
            blocks = list(_blocks((Span(0, size, 1),)))
        parts: Parts = []
        for start, count, width in blocks:
            values = np.frombuffer(chunk, f"<u{width}", count, start)
            parts += self._block(values, None if base is None else np.frombuffer(base, values.dtype, count, start))
        coded = b"".join(parts)
        return coded if len(coded) < size else None

    def _block(self, values: Array, base: Array | None) -> Parts:
        """The shorter of the block's values and their difference to `base`."""
        if base is None:
            return self._code(values, VALUES)
        difference = self._difference.view(values.dtype)[: len(values)]
        np.subtract(values, base, out=difference)
        kind = WIDE_DIFFERENCES if values.itemsize == 2 and _is_wide(difference) else DIFFERENCES
        np.add(difference, OFFSETS[values.itemsize, kind], out=difference)
        coded = self._code(difference, kind)
        if self._estimate(values) < MAY_WIN * _size(coded):
            coded = min(coded, self._code(values, VALUES), key=_size)
        return coded

    def _estimate(self, values: Array) -> float:
        """About how many bytes the block's values would take; 0 when it is too small to tell."""
        sample = values[::SAMPLE_STRIDE].copy()
        if len(sample) < SAMPLE:
            return 0
        planes = self._split(sample, VALUES)
        return SAMPLE_STRIDE * sum(min(len(sample), len(self._huffman.compress(plane.data))) for plane in planes)

    def _code(self, elements: Array, kind: int) -> Parts:
        coded = [self._plane(plane, sampled=place > 0) for place, plane in enumerate(self._split(elements, kind))]
        sizes = [len(plane) for plane in coded]
        return [build_block_head(elements.itemsize, kind, len(elements), sizes), *coded]

    def _plane(self, plane: Array, *, sampled: bool) -> bytes:
        """A plane as it is stored. `sampled`: a sample first tells whether coding it pays."""
        sample = plane[::SAMPLE_STRIDE].tobytes() if sampled else b""
        if len(sample) >= SAMPLE and len(self._huffman.compress(sample)) > WORTH * len(sample):
            return plane.tobytes()
        coded = self._huffman.compress(plane.data)
        return coded if len(coded) < len(plane) else plane.tobytes()

    def _split(self, elements: Array, kind: int) -> list[Array]:
        """The planes of values, or of differences with their offset. They are overwritten by the next call."""
        width = elements.itemsize
        planes = [plane[: len(elements)] for plane in self._planes[:width]]
        for place, plane in enumerate(planes, 1):
            shift = 8 * (width - place)
            if shift:
                np.right_shift(elements, shift, out=plane, casting="unsafe")
            else:
                np.copyto(plane, elements, casting="unsafe")
        # Now they are the bytes of each element, most significant first.
        if width > 1 and kind == VALUES:
            self._move(elements, planes, bits=7, below=8 * width - 16)
        elif kind == WIDE_DIFFERENCES:
            self._move(elements, planes, bits=4, below=0)
        return planes

    def _move(self, elements: Array, planes: list[Array], *, bits: int, below: int) -> None:
        """Make of an element's two upper bytes its 8 bits above the lowest `bits` of them, and the other 8.

        `below`: how many bits of the element lie below those two bytes.
        """
        first, second, *_ = planes
        upper = np.bitwise_and(first, 0xFF << bits & 0xFF, out=self._upper[: len(elements)])
        np.right_shift(elements, below + bits, out=first, casting="unsafe")
        np.bitwise_and(second, 0xFF >> 8 - bits, out=second)
        np.bitwise_or(second, upper, out=second)


def _is_wide(difference: Array) -> bool:
    """Whether less than half of the 16-bit differences are within 8 of 0, by a sample."""
    near = difference[::SAMPLE_STRIDE] + np.uint16(8) < 16
    return bool(2 * np.count_nonzero(near) < len(near))


def _blocks(spans: Iterable[Span]) -> Iterator[tuple[int, int, int]]:
    """Where each block begins, its elements and their width."""
    for span in spans:
        for start in range(span.start, span.end, MAX_BLOCK_ELEMENTS * span.width):
            count = min(MAX_BLOCK_ELEMENTS, (span.end - start) // span.width)
            yield start, count, span.width


def _size(parts: Parts) -> int:
    return sum(len(part) for part in parts)
