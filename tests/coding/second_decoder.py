"""A decoder of `planes-1` written from docs/coding.md alone: it shares no line and no idea with bzstream's own.

Slow and plain. It takes damaged input as a bug of the encoder, not as an attack, and asserts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zstandard


def decode(coded: bytes, size: int, base: bytes | None = None) -> bytes:
    """The chunk of `size` bytes that `coded` stands for."""
    if len(coded) == size:
        return coded
    chunk, at = b"", 0
    while len(chunk) < size:
        block, at = _block(coded, at, base and base[len(chunk) :])
        chunk += block
    assert at == len(coded)
    assert len(chunk) == size
    return chunk


def _block(coded: bytes, at: int, base: bytes | None) -> tuple[bytes, int]:
    form = coded[at]
    width, kind = {0: 1, 1: 2, 2: 4}[form & 3], ("values", "differences", "", "wide")[form >> 2]
    numbers = [int.from_bytes(coded[at + 1 + 3 * n : at + 4 + 3 * n], "little") for n in range(1 + width)]
    count, lengths = numbers[0], numbers[1:]
    assert 1 <= count <= 1 << 17
    at += 4 + 3 * width
    planes = []
    for length in lengths:
        plane = coded[at : at + length]
        at += length
        if length != count:
            plane = zstandard.ZstdDecompressor(max_window_size=1 << 17).decompress(plane)
        assert len(plane) == count
        planes.append(np.frombuffer(plane, np.uint8).astype(np.uint64))
    if kind != "values":
        assert base is not None
        before = np.frombuffer(base[: count * width], f"<u{width}").astype(np.uint64)
        if kind == "wide":
            assert width == 2
            high, low = planes[1] >> np.uint64(4), planes[1] & np.uint64(15)
            values = before + (high << np.uint64(12) | planes[0] << np.uint64(4) | low) + np.uint64(2**32 - 0x808)
        else:
            offset = {1: 0, 2: 0x80, 4: 0x808080}[width]
            values = before + _number(planes) + np.uint64(2**32 - offset)
    elif width == 1:
        values = planes[0]
    else:
        sign, exponent = planes[1] >> np.uint64(7), planes[0]
        mantissa = _number([planes[1] & np.uint64(0x7F), *planes[2:]])
        bits = 7 if width == 2 else 23
        values = sign << np.uint64(8 * width - 1) | exponent << np.uint64(bits) | mantissa
    return (values & np.uint64((1 << 8 * width) - 1)).astype(f"<u{width}").tobytes(), at


def _number(planes: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    total = np.zeros_like(planes[0])
    for plane in planes:
        total = total * np.uint64(256) + plane
    return total
