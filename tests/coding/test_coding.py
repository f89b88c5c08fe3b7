"""What is coded comes back bit for bit, by two decoders; it is never longer; damaged bytes end in one clear error."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.coding import MAX_CHUNK, CodingError, Decoder, Encoder, Layout
from bzstream.coding.form import MAX_BLOCK_ELEMENTS, MAX_BLOCKS, build_block_head
from bzstream.coding.layout import Span
from bzstream.tensorfile import arrange, build_head, parse_head
from bzstream.util.dtypes import DTYPES
from tests.coding.second_decoder import decode as second_decode

WHOLE_BYTE_DTYPES = sorted(name for name, dtype in DTYPES.items() if dtype.bits >= 8)


def code(chunk: bytes, spans: list[Span], base: bytes | None = None) -> bytes:
    """The coded chunk as it lies in a file, checked: never longer, and both decoders give the chunk back."""
    coded = Encoder().encode(chunk, spans, base)
    if coded is None:
        return chunk
    assert len(coded) < len(chunk)
    out = bytearray(os.urandom(len(chunk)))
    Decoder().decode(coded, out, base)
    assert out == chunk
    assert second_decode(coded, len(chunk), base) == chunk
    return coded


def whole(chunk: bytes, width: int) -> list[Span]:
    return list(Layout([Span(0, len(chunk), width)]).between(0, len(chunk)))


def weights(count: int, dtype: str = "bf16", *, seed: int = 0, scale: float = 0.02) -> bytes:
    values = (np.random.default_rng(seed).standard_normal(count) * scale).astype(np.float32)
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"f16": "<f2", "f32": "<f4"}[dtype]).tobytes()


def moved(chunk: bytes, by: float = 3e-4) -> bytes:
    """bf16 weights after a step of training."""
    values = (np.frombuffer(chunk, "<u2").astype(np.uint32) << 16).view(np.float32)
    values = values + (np.random.default_rng(7).standard_normal(len(values)) * by).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


# Every element and every size


@pytest.mark.parametrize("width", [1, 2, 4])
def test_every_16_bit_pattern_comes_back(width: int) -> None:
    """All of bf16 and f16: both zeros, denormals, infinities, every NaN; as values and as differences."""
    patterns = np.arange(65536, dtype="<u2")
    chunk = np.repeat(patterns, 2).tobytes()
    base = np.random.default_rng(0).permutation(np.repeat(patterns, 2)).tobytes()
    code(chunk, whole(chunk, width))
    code(chunk, whole(chunk, width), base)
    values = np.tile(patterns, 2)
    for step in (1, 3, 40, 3000):  # a run of small differences, and one for which the wide form is made
        code(values.tobytes(), whole(chunk, width), (values + np.arange(len(values)) % step).astype("<u2").tobytes())


@pytest.mark.parametrize("width", [2, 4])
def test_special_values_of_f32_and_their_differences(width: int) -> None:
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0],
        "<f4",
    )
    bits = np.concatenate([special.view("<u4"), np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], "<u4")])
    chunk, base = np.repeat(bits, 50).tobytes(), np.tile(bits, 50).tobytes()
    assert len(code(chunk, whole(chunk, width))) < len(chunk)
    code(chunk, whole(chunk, width), base)


spans_of = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 4])), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(sizes=spans_of, data=st.data())
def test_any_bytes_under_any_layout(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """Spans of odd sizes, cut anywhere: an element may be in two chunks."""
    spans, at = [], 0
    for count, width in sizes:
        spans.append(Span(at, at + count * width, width))
        at += count * width
    start = data.draw(st.integers(0, at))
    end = data.draw(st.integers(start, at + 5))
    alphabet = st.sampled_from([0, 0, 0, 1, 0x80, 0xFF])
    chunk = bytes(data.draw(st.lists(alphabet, min_size=end - start, max_size=end - start)))
    base = bytes(data.draw(st.lists(alphabet, min_size=end - start, max_size=end - start)))
    cut = list(Layout(spans).between(start, end))
    assert [a.end for a in cut[:-1]] == [b.start for b in cut[1:]]
    assert sum(span.end - span.start for span in cut) == end - start
    code(chunk, cut)
    code(chunk, cut, base)


@pytest.mark.parametrize("dtype", WHOLE_BYTE_DTYPES)
@pytest.mark.parametrize("count", [1, 3, 4099, 150_001])
def test_a_file_of_every_dtype_in_chunks(dtype: str, count: int) -> None:
    """A safetensors file, its head and an odd tensor before; chunks so odd that elements cross their ends."""
    tensors = arrange([("odd", "U8", (3,)), ("tensor", dtype, (count,)), ("norm", "F32", (7,))])
    payload = build_head(tensors) + np.random.default_rng(1).integers(0, 4, tensors[-1].end, np.uint8).tobytes()
    layout = Layout.of_file(parse_head(payload, len(payload)))
    for size in (1 << 16, 99_991):
        for start in range(0, len(payload), size):
            chunk = payload[start : start + size]
            coded = code(chunk, list(layout.between(start, start + len(chunk))))
            assert len(coded) < len(chunk) / 2 or len(chunk) < 1000


def test_elements_keep_their_place_across_chunks() -> None:
    """Both chunks of a tensor that is cut in the middle of an element shrink as weights do, not as bytes."""
    payload = b"abc" + weights(300_000)
    layout = Layout([Span(0, 3, 1), Span(3, len(payload), 2)])
    cut = 200_000
    for start, end in ((0, cut), (cut, len(payload))):
        assert len(code(payload[start:end], list(layout.between(start, end)))) < 0.68 * (end - start)


# How far it shrinks


def test_weights_shrink_to_two_thirds_and_their_difference_further() -> None:
    before = weights(1 << 20)
    after = moved(before)
    fresh = code(after, whole(after, 2))
    difference = code(after, whole(after, 2), before)
    assert len(fresh) < 0.67 * len(after)
    assert len(difference) < 0.36 * len(after)
    assert len(code(after, whole(after, 2), after)) < 0.001 * len(after)
    far = moved(before, 5e-3)
    assert len(code(far, whole(far, 2), before)) < 0.6 * len(far)


@pytest.mark.parametrize(("dtype", "width", "bound"), [("f16", 2, 0.88), ("f32", 4, 0.84)])
def test_the_other_floats_shrink(dtype: str, width: int, bound: float) -> None:
    chunk = weights(1 << 18, dtype)
    assert len(code(chunk, whole(chunk, width))) < bound * len(chunk)


def test_a_base_that_does_not_help_is_never_worse_than_none() -> None:
    chunk = weights(1 << 18)
    unrelated = weights(1 << 18, seed=5, scale=3.0)
    assert len(code(chunk, whole(chunk, 2), unrelated)) <= len(code(chunk, whole(chunk, 2)))


def test_a_base_of_another_size_is_not_used() -> None:
    chunk = weights(1 << 16)
    assert Encoder().encode(chunk, whole(chunk, 2), chunk[:-2]) == Encoder().encode(chunk, whole(chunk, 2))


def test_noise_stands_for_itself() -> None:
    chunk = os.urandom(1 << 18)
    assert Encoder().encode(chunk, whole(chunk, 2)) is None
    out = bytearray(len(chunk))
    Decoder().decode(chunk, out)
    assert out == chunk


def test_thousands_of_small_tensors_stay_within_the_bound_of_blocks() -> None:
    spans = [Span(at * 6, at * 6 + 6, 2) if at % 2 else Span(at * 6, at * 6 + 6, 1) for at in range(4 * MAX_BLOCKS)]
    chunk = weights(3 * len(spans))
    assert len(code(chunk, spans)) < len(chunk)


# Where it is decoded to


def test_decoding_takes_less_than_two_mib_beside_the_chunk() -> None:
    before = weights(4 << 20)
    after = moved(before)
    for base in (None, before):
        coded = Encoder().encode(after, whole(after, 2), base)
        assert coded is not None
        out = bytearray(len(after))
        tracemalloc.start()
        try:
            Decoder().decode(coded, out, base)
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
        finally:
            tracemalloc.stop()
        assert out == after


def test_decoding_writes_into_a_part_of_a_larger_buffer() -> None:
    chunk = weights(70_000)
    coded = Encoder().encode(chunk, whole(chunk, 2))
    assert coded is not None
    out = bytearray(len(chunk) + 10)
    Decoder().decode(coded, memoryview(out)[5:-5])
    assert out == bytes(5) + chunk + bytes(5)


# The document


def vector_bytes(text: str) -> bytes:
    """`07 07, then 16 times 80 3f` of docs/coding.md as bytes."""
    result = b""
    for part in text.split(", then "):
        times, _, digits = part.rpartition("times ")
        result += bytes.fromhex(digits) * int(times or 1)
    return result


def test_both_decoders_read_the_documents_vectors() -> None:
    text = (Path(__file__).parents[2] / "docs/coding.md").read_text(encoding="utf-8")
    vectors = re.findall(r"^chunk  (.+)\n(?:base   (.+)\n)?coded  (.+)$", text, re.MULTILINE)
    assert len(vectors) == 4
    for chunk_text, base_text, coded_text in vectors:
        chunk, base = vector_bytes(chunk_text), vector_bytes(base_text) if base_text else None
        out = bytearray(len(chunk))
        Decoder().decode(bytes.fromhex(coded_text), out, base)
        assert out == chunk
        assert second_decode(bytes.fromhex(coded_text), len(chunk), base) == chunk


# Hostile bytes


def block(form: int, count: int, *planes: bytes, stored: list[int] | None = None) -> bytes:
    width, sizes = 1 << (form & 3), stored or [len(plane) for plane in planes]
    return build_block_head(width, form >> 2, count, sizes) + b"".join(planes)


def frame(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


RLE_BLOCK_OF_4096 = (1 | 1 << 1 | 4096 << 3).to_bytes(3, "little") + b"\0"

HOSTILE = {
    "nothing": b"",
    "unknown width": b"\x03" + bytes(12),
    "unknown kind": b"\x09" + bytes(12),
    "unknown bits": b"\x11" + bytes(12),
    "wide differences of bytes": block(0b1100, 4096, frame(bytes(4096))),
    "head cut": b"\x01\x10",
    "no element": block(0, 0, b"", stored=[1]),
    "too many elements": block(0, MAX_BLOCK_ELEMENTS + 1, b"x", stored=[5]),
    "more than the chunk": block(0, 4097, frame(bytes(4097))),
    "plane missing": block(0, 4096, b"", stored=[40]),
    "plane cut": block(0, 4096, frame(bytes(4096))[:-3]),
    "empty plane": block(0, 4096, b"", stored=[1]).replace(b"\x01\x00\x00", bytes(3)),
    "plane longer than its elements": block(0, 16, bytes(17)) + bytes(200),
    "no frame": block(0, 4096, b"this is no frame at all"),
    "frame of another size": block(0, 4096, frame(bytes(4095))),
    "frame that hides its size": block(0, 4096, frame(bytes(4096), write_content_size=False)),
    "bytes after the frame": block(0, 4096, frame(bytes(4096)) + b"more"),
    "two frames": block(0, 4096, frame(bytes(4096)) * 2),
    "bytes after the last block": block(0, 4096, frame(bytes(4096))) + b"more",
    "block cut": block(0, 2048, frame(bytes(2048))),
    "a base is needed": block(4, 4096, frame(bytes(4096))),
    "a base is needed for wide differences": block(0b1101, 2048, frame(bytes(2048)), frame(bytes(2048))),
    "longer than the chunk": bytes(4097),
    # A valid frame: a window of 128 MiB, 4096 bytes of content, one block that repeats a byte (RFC 8878, 3.1.1).
    "window of 128 MiB": block(
        0, 4096, struct.pack("<IBBH", 0xFD2FB528, 0b0100_0000, (27 - 10) << 3, 4096 - 256) + RLE_BLOCK_OF_4096
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_bytes_are_one_clear_error(name: str) -> None:
    out = bytearray(4096)
    tracemalloc.start()
    try:
        with pytest.raises(CodingError, match=r"coded chunk"):
            Decoder().decode(HOSTILE[name], out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_chunk_of_tiny_blocks_is_given_up_early() -> None:
    """Work is bounded by the chunk's size: a million blocks of one byte each are not decoded."""
    tiny = block(0, 1, b"x") * 100_000
    out = bytearray(1 << 20)
    with pytest.raises(CodingError, match="too many blocks"):
        Decoder().decode(tiny, out)
    assert out.count(b"x") == MAX_BLOCKS


def test_a_chunk_beyond_the_bound_is_refused_before_anything_is_read() -> None:
    with pytest.raises(CodingError, match="larger than"):
        Decoder().decode(b"\x00", bytearray(MAX_CHUNK + 1))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_coded_bytes_changed_anywhere_decode_or_raise(data: st.DataObject) -> None:
    """Whatever is done to coded bytes: a CodingError or some chunk, never another error and never a write beyond."""
    before = weights(5000)
    after = moved(before)
    coded = bytearray(Encoder().encode(after, whole(after, 2), before) or after)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(coded) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            coded[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del coded[at : at + data.draw(st.integers(1, 50))]
        else:
            coded[at:at] = data.draw(st.binary(max_size=20))
        if not coded:
            break
    guarded = bytearray(len(after) + 64)
    try:
        Decoder().decode(coded, memoryview(guarded)[32:-32], before)
    except CodingError:
        pass
    assert guarded[:32] == guarded[-32:] == bytes(32)


@settings(max_examples=300, deadline=None)
@given(coded=st.binary(max_size=300), size=st.integers(0, 2000))
def test_any_bytes_decode_or_raise(coded: bytes, size: int) -> None:
    try:
        Decoder().decode(coded, bytearray(size), bytes(size))
    except CodingError:
        pass
