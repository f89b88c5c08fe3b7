"""The safetensors parser: what it accepts, what it refuses, and that what it builds is what the stock library reads."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.tensorfile import (
    MAX_HEAD,
    Tensor,
    TensorFileError,
    arrange,
    build_head,
    head_size,
    parse_head,
    read_head,
    tensor_bytes,
)
from bzstream.util.dtypes import DTYPES

NUMPY_DTYPES = {name: dtype.numpy for name, dtype in DTYPES.items() if dtype.numpy}


def raw_head(document: object, *, text: str | None = None) -> bytes:
    encoded = (json.dumps(document) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
specs = st.dictionaries(
    names.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), shapes), max_size=8
)


@settings(deadline=None)
@given(specs, st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=8), max_size=3))
def test_a_built_file_is_read_back_by_us_and_by_the_stock_library(
    wanted: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    tensors = arrange((name, dtype, shape) for name, (dtype, shape) in wanted.items())
    head = build_head(tensors, metadata)
    assert len(head) % 4096 == 0
    total = tensors[-1].end if tensors else 0
    data = bytes(i % 251 for i in range(total))
    parsed = parse_head(head, len(head) + total, aligned=True)
    assert parsed.tensors == tuple(sorted(tensors, key=lambda t: (t.start, t.end)))
    assert parsed.metadata == metadata
    assert parsed.data_start == len(head)
    stock = dict(safetensors.deserialize(head + data))  # type: ignore[no-untyped-call]
    assert stock.keys() == wanted.keys()
    for tensor in tensors:
        assert bytes(stock[tensor.name]["data"]) == data[tensor.start : tensor.end]
        assert tuple(stock[tensor.name]["shape"]) == tensor.shape


@settings(deadline=None)
@given(specs)
def test_every_tensor_lies_on_its_own_alignment_and_the_order_is_fixed(
    wanted: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    tensors = arrange((name, dtype, shape) for name, (dtype, shape) in wanted.items())
    for tensor in tensors:
        size = tensor.end - tensor.start
        assert size == tensor_bytes(tensor.dtype, tensor.shape)
        if size:
            assert tensor.start % (size & -size) == 0
    keys = [(-((t.end - t.start) & -(t.end - t.start)) or -(1 << 64), t.name) for t in tensors]
    assert keys == sorted(keys)
    backwards = arrange((name, *wanted[name]) for name in reversed(list(wanted)))
    assert backwards == tensors


def test_order_is_by_alignment_then_name() -> None:
    tensors = arrange([("a", "U8", (3,)), ("b", "U8", (8,)), ("c", "U8", (12,)), ("d", "U8", (24,)), ("e", "U8", (0,))])
    assert [t.name for t in tensors] == ["e", "b", "d", "c", "a"]
    assert [t.start for t in tensors] == [0, 0, 8, 32, 44]


@pytest.mark.parametrize(
    ("document", "size", "sentence"),
    [
        ({"a": entry()}, 7, "asks for a file"),
        ({"a": entry()}, 9, "asks for a file"),
        ({"a": entry("F33")}, 8, "unknown dtype"),
        ({"a": entry(3)}, 8, "unknown dtype"),  # type: ignore[arg-type]
        ({"a": entry(shape=(3,))}, 8, "ask for 12"),
        ({"a": entry(shape="2")}, 8, "shape"),
        ({"a": entry(shape=(-1, -2))}, 8, "shape"),
        ({"a": entry(shape=(True, 2))}, 8, "shape"),
        ({"a": entry(shape=(2.0,))}, 8, "shape"),
        ({"a": entry(shape=(1 << 63,))}, 8, "shape"),
        ({"a": entry(shape=(1,) * 65)}, 8, "shape"),
        ({"a": entry(offsets=(0, 8, 9))}, 8, "data_offsets"),
        ({"a": entry(offsets=(8, 0))}, 8, "data_offsets"),
        ({"a": entry(offsets=(-8, 0))}, 8, "data_offsets"),
        ({"a": entry(offsets=None)}, 8, "data_offsets"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "overlaps"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "gap"),
        ({"a": entry(offsets=(4, 12))}, 12, "gap"),
        ({"a": {**entry(), "more": 1}}, 8, "exactly"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly"),
        ({"a": [1]}, 8, "exactly"),
        ({"": entry()}, 8, "no name"),
        ({"a\x00b": entry()}, 8, "no name"),
        ({"\ud800": entry()}, 8, "surrogate"),
        ({"__metadata__": {"a": 1}, "a": entry()}, 8, "__metadata__"),
        ({"__metadata__": "x", "a": entry()}, 8, "__metadata__"),
        ({"a": entry("F4", (3,), (0, 2))}, 2, "whole number"),
    ],
)
def test_a_lying_head_is_refused(document: object, size: int, sentence: str) -> None:
    raw = raw_head(document)
    with pytest.raises(TensorFileError, match=sentence):
        parse_head(raw, len(raw) + size)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        " {}",
        "\ufeff{}",
        "{",
        "{}x",
        '{"a":NaN}',
        "{'a':1}",
        '{"a":' + "[" * 100_000,
        '{"a":' + "9" * 10_000 + "}",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_head_that_is_no_json_object_is_refused(text: str) -> None:
    raw = raw_head(None, text=text)
    with pytest.raises(TensorFileError):
        parse_head(raw, len(raw))


def test_invalid_utf8_is_refused() -> None:
    raw = struct.pack("<Q", 4) + b'{"\xff}'
    with pytest.raises(TensorFileError, match="UTF-8"):
        parse_head(raw, len(raw))


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"__metadata__":{"x":"1","x":"2"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_a_key_that_comes_twice_is_refused(text: str) -> None:
    raw = raw_head(None, text=text)
    with pytest.raises(TensorFileError, match="twice"):
        parse_head(raw, len(raw) + 8)


def test_a_head_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(TensorFileError, match="more than"):
        head_size(struct.pack("<Q", MAX_HEAD + 1), 1 << 40)
    with pytest.raises(TensorFileError, match="only 100"):
        head_size(struct.pack("<Q", 93), 100)
    with pytest.raises(TensorFileError, match="too short"):
        head_size(b"\0" * 7, 7)
    with pytest.raises(TensorFileError, match="cut short"):
        parse_head(struct.pack("<Q", 20) + b"{", 28)
    assert head_size(struct.pack("<Q", 92), 100) == 100


def test_a_head_full_of_duplicates_is_refused_in_linear_time() -> None:
    text = "{" + ",".join(f'"{i}":1' for i in range(80_000)) + ',"79999":1}'
    raw = raw_head(None, text=text)
    with pytest.raises(TensorFileError, match="79999"):
        parse_head(raw, len(raw))


def test_misaligned_tensors_are_refused_on_request() -> None:
    document = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (1,), (1, 5))}
    raw = raw_head(document)
    assert len(parse_head(raw, len(raw) + 5).tensors) == 2
    with pytest.raises(TensorFileError, match="multiple of its element size"):
        parse_head(raw, len(raw) + 5, aligned=True)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_either_parsed_or_refused_in_a_sentence(noise: bytes) -> None:
    raw = struct.pack("<Q", len(noise)) + noise
    with contextlib.suppress(TensorFileError):
        parse_head(raw, len(raw))


@settings(deadline=None)
@given(st.data())
def test_one_changed_byte_never_crashes_the_parser(data: st.DataObject) -> None:
    tensors = arrange([("model.a", "BF16", (4, 2)), ("b", "F32", (3,)), ("c", "U8", ())])
    head = bytearray(build_head(tensors, {"format": "pt"}, align=8))
    where = data.draw(st.integers(0, len(head) - 1))
    head[where] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TensorFileError):
        parse_head(bytes(head), len(head) + tensors[-1].end)


def test_build_refuses_gaps_and_duplicates() -> None:
    with pytest.raises(TensorFileError, match="does not begin"):
        build_head([Tensor("a", "U8", (1,), 0, 1), Tensor("b", "U8", (1,), 2, 3)])
    with pytest.raises(TensorFileError, match="twice"):
        build_head([Tensor("a", "U8", (1,), 0, 1), Tensor("a", "U8", (1,), 1, 2)])


def test_dtypes_agree_with_the_stock_library() -> None:
    for name in DTYPES:
        tensors = arrange([("a", name, (8,))])
        head = build_head(tensors)
        stock = safetensors.deserialize(head + bytes(tensors[0].end))  # type: ignore[no-untyped-call]
        assert dict(stock)["a"]["dtype"] == name


def test_read_head_of_a_file(tmp_path: Path) -> None:
    tensors = arrange([("a", "F32", (2, 2))])
    path = tmp_path / "a.safetensors"
    path.write_bytes(build_head(tensors) + bytes(16))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_head(fd).tensors == tensors
        os.truncate(path, 4100)
        with pytest.raises(TensorFileError, match="asks for a file"):
            read_head(fd)
    finally:
        os.close(fd)
