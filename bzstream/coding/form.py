"""The coded form, `planes-1`: its constants and the head of a block. docs/coding.md is the specification.

A coded chunk that is as long as the chunk is the chunk itself. Any other is a sequence of blocks that follow each
other until the chunk is complete:

    u8            form: bits 0-1 the element's width as a power of two (0, 1, 2), the others the kind of block
    u24           number of elements, 1 to 131,072
    width x u24   stored bytes of each plane, the most significant plane first
    the planes

A plane holds one byte of every element. It is stored as it is when its stored bytes are as many as its elements, and
otherwise as one zstd frame (RFC 8878) that states its content size and has no dictionary. All numbers are
little-endian.

Why planes and Huffman alone: the exponents of weights take few values, in no order that a match finder could use,
and the mantissas take all of them equally (bench/coding.py has the figures and the alternatives).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from bzstream.errors import BzstreamError

__all__ = [
    "DIFFERENCES",
    "MAX_BLOCKS",
    "MAX_BLOCK_ELEMENTS",
    "MAX_CHUNK",
    "NAME",
    "OFFSETS",
    "VALUES",
    "VALUE_BITS",
    "WIDE_BITS",
    "WIDE_DIFFERENCES",
    "WIDTHS",
    "BlockHead",
    "CodingError",
    "block_head_size",
    "build_block_head",
    "parse_block_head",
]

NAME: Final = "planes-1"
"""The coding's name in a manifest."""

MAX_CHUNK: Final = 64 << 20
"""Bytes of the largest chunk that is coded or decoded. A node's chunks have 8 MiB."""

MAX_BLOCK_ELEMENTS: Final = 1 << 17
"""zstd makes a new Huffman table every 128 KiB at the latest (RFC 8878, section 3.1.1.2.3), and a block's planes, the
result and the base together stay in a core's second-level cache."""

MAX_BLOCKS: Final = 1024
"""Blocks of one chunk. A chunk of 8 MiB needs 32 to 65; without a bound, a hostile chunk of a million blocks of one
element each would cost 10 s instead of 20 ms."""

WIDTHS: Final = (1, 2, 4)
VALUES, DIFFERENCES, WIDE_DIFFERENCES = 0, 1, 3
"""The kinds of block: the elements themselves, or what to add to the base's. Wide differences are of width 2 only."""

OFFSETS: Final = {(1, DIFFERENCES): 0, (2, DIFFERENCES): 0x80, (4, DIFFERENCES): 0x808080, (2, WIDE_DIFFERENCES): 0x808}
"""Added to a difference, by width and kind, so that small ones of either sign have the same upper bits."""

VALUE_BITS: Final = (0x80, 0x807F)
WIDE_BITS: Final = (0x10, 0xF00F)
"""How two planes of bytes make 16 bits: the first times a factor, and the second, twice side by side, under a mask.

Values: bits 14 to 7 are the exponent and go into the first plane; sign and mantissa make the second. Wide differences:
bits 11 to 4 go into the first plane. With the upper byte there, it would be 0 so often that a Huffman code, which
needs a whole bit for the most likely byte too, lost a twentieth of the result (measured: 0.508 and 0.483 after 50 steps
at 3e-4)."""


class CodingError(BzstreamError):
    """The coded bytes are damaged, or need a base that was not given."""


class BlockHead(NamedTuple):
    """What a block's head says. `stored`: bytes of each plane as it lies in the block."""

    width: int
    kind: int
    elements: int
    stored: tuple[int, ...]


def block_head_size(form: int) -> int:
    """Bytes of the head of a block that begins with the byte `form`. Raises CodingError for an unknown form."""
    code, kind = form & 0b11, form >> 2
    if code >= len(WIDTHS) or (kind != VALUES and (WIDTHS[code], kind) not in OFFSETS):
        raise CodingError(f"the coded chunk is damaged: it has a block of the unknown form {form}")
    return 4 + 3 * WIDTHS[code]


def build_block_head(width: int, kind: int, elements: int, stored: Sequence[int]) -> bytes:
    numbers = b"".join(number.to_bytes(3, "little") for number in (elements, *stored))
    return bytes((WIDTHS.index(width) | kind << 2,)) + numbers


def parse_block_head(raw: bytes) -> BlockHead:
    """The head in `raw`, which has `block_head_size` bytes. Raises CodingError for numbers out of range."""
    elements, *stored = (int.from_bytes(raw[at : at + 3], "little") for at in range(1, len(raw), 3))
    if not 0 < elements <= MAX_BLOCK_ELEMENTS:
        raise CodingError(f"the coded chunk is damaged: a block claims {elements} elements")
    if any(not 0 < size <= elements for size in stored):
        raise CodingError("the coded chunk is damaged: a plane is longer than what it stands for, or empty")
    return BlockHead(WIDTHS[raw[0] & 0b11], raw[0] >> 2, elements, tuple(stored))
