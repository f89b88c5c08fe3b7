"""The safetensors format: strict parsing and exact building of file heads, as pure functions.

A safetensors file is 8 bytes of little-endian length N, N bytes of JSON that name each tensor with its dtype, shape
and byte range, then the data. The stock library reads that head leniently: it takes duplicate keys (the last one
wins), ranges that no dtype can be mapped at, and heads of 100 MB (5.5 s and 1.4 GiB of memory to open). A file that
came from a miner, or that miners will get, deserves better, so this parser takes nothing on trust: the head's size is
bounded before it is read, every key is unique, every number is a whole number in range, every tensor's range has
exactly the size that its dtype and shape ask for, and the ranges fill the data section without gap or overlap.
Names, dtypes and shapes are the file's own claims: compare them to what you expect.

Files that bzstream writes have their data section on a multiple of 4096 (the head is padded with spaces) and their
tensors ordered by alignment, descending, then name. So every tensor lies on a boundary that suits it without any
padding between tensors, and a saved body can be memory-mapped.

Format: https://huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from bzstream.errors import BzstreamError
from bzstream.util.dtypes import DTYPES
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = [
    "ALIGNMENT",
    "MAX_HEAD",
    "Head",
    "Tensor",
    "TensorFileError",
    "arrange",
    "build_head",
    "head_size",
    "parse_head",
    "read_head",
    "tensor_bytes",
]

MAX_HEAD = 1024 * 1024
"""Bytes of JSON accepted from a file of unknown origin: some 8,000 tensors, several times a slice of
Qwen3-VL-30B-A3B. Parsing it takes 30 ms and some 10 MB."""

ALIGNMENT = 4096
"""The data section of a written file starts on a multiple of this: the page size of the machines it is mapped on."""

MAX_DIMENSIONS = 64
"""numpy's own limit. It also bounds the work of multiplying a hostile shape."""


class TensorFileError(BzstreamError):
    """The bytes are not a safetensors file that bzstream accepts; the text says why, and the caller names the file."""


class Tensor(NamedTuple):
    """One tensor of a file: its bytes are [start, end) of the data section, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Head(NamedTuple):
    """What a file's head says: tensors in the order of their bytes, and where the data section begins in the file."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]
    data_start: int


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor. Raises TensorFileError for an unknown dtype or a size that is no whole number of bytes."""
    if dtype not in DTYPES:
        raise TensorFileError(f"the dtype {_show(dtype)} is unknown")
    size, bits_left = divmod(DTYPES[dtype].bits * prod(shape), 8)
    if bits_left:
        raise TensorFileError(f"a {dtype} tensor of shape {list(shape)} is no whole number of bytes")
    return size


def head_size(first: bytes, file_size: int, *, max_head: int = MAX_HEAD) -> int:
    """Bytes from the start of the file to its data section, from its first 8 bytes: what to read for `parse_head`.

    Raises TensorFileError when the file is too short for the head it announces, or the head is over `max_head`.
    """
    if file_size < 8 or len(first) < 8:
        raise TensorFileError("the file is too short to be a safetensors file")
    (length,) = struct.unpack_from("<Q", first)
    if length > max_head:
        raise TensorFileError(f"the head claims {length} bytes, more than the {max_head} that are accepted")
    if 8 + length > file_size:
        raise TensorFileError(f"the head claims {length} bytes, but the file has only {file_size}")
    return 8 + int(length)


def parse_head(raw: bytes, file_size: int, *, max_head: int = MAX_HEAD, aligned: bool = False) -> Head:
    """The head of a file of `file_size` bytes that begins with `raw` (at least `head_size(...)` bytes of it).

    `aligned` also demands that every tensor begins, in the file, on a multiple of its element size, as files that
    are to be memory-mapped must. Raises TensorFileError for anything that is not exactly as the format says.
    """
    data_start = head_size(raw[:8], file_size, max_head=max_head)
    if len(raw) < data_start:
        raise TensorFileError("the head is cut short")
    entries = _parse_json(raw[8:data_start])
    metadata = _parse_metadata(entries.pop("__metadata__", {}))
    tensors = sorted((_parse_tensor(name, entry) for name, entry in entries.items()), key=lambda t: (t.start, t.end))
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise TensorFileError(f"the tensor {_show(tensor.name)} {what} (it begins at {tensor.start}, not {end})")
        if aligned and (data_start + tensor.start) % max(1, DTYPES[tensor.dtype].bits // 8):
            raise TensorFileError(f"the tensor {_show(tensor.name)} does not begin on a multiple of its element size")
        end = tensor.end
    if data_start + end != file_size:
        raise TensorFileError(f"the head asks for a file of {data_start + end} bytes, but it has {file_size}")
    return Head(tuple(tensors), metadata, data_start)


def read_head(fd: int, *, at: int = 0, max_head: int = MAX_HEAD, aligned: bool = False) -> Head:
    """The head of the safetensors file that begins `at` bytes into an open file and ends with it, by `parse_head`.

    Raises TensorFileError, and OSError when reading fails.
    """
    file_size = os.fstat(fd).st_size - at
    size = head_size(os.pread(fd, 8, at), file_size, max_head=max_head)
    return parse_head(os.pread(fd, size, at), file_size, max_head=max_head, aligned=aligned)


def arrange(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Tensor, ...]:
    """Tensors (name, dtype, shape) in the order in which bzstream writes them, with their ranges.

    The order is by alignment, the largest power of two that divides the size in bytes, descending; then by name.
    Each tensor then begins on a multiple of its own alignment: all sizes before it are multiples of it too.
    """
    sized = [(name, dtype, shape, tensor_bytes(dtype, shape)) for name, dtype, shape in tensors]
    # size & -size is that power of two; an empty tensor is divisible by every power and goes first.
    sized.sort(key=lambda item: (-(item[3] & -item[3]) if item[3] else -(1 << 64), item[0]))
    placed: list[Tensor] = []
    end = 0
    for name, dtype, shape, size in sized:
        placed.append(Tensor(name, dtype, tuple(shape), end, end + size))
        end += size
    return tuple(placed)


def build_head(tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None, align: int = ALIGNMENT) -> bytes:
    """The bytes before the data section: length, JSON, and spaces up to a multiple of `align`.

    Deterministic: equal tensors and metadata give equal bytes, which is what lets an unchanged file be linked.
    Raises TensorFileError when the tensors' ranges do not follow each other, or a name comes twice.
    """
    tensors = tuple(tensors)
    for left, right in pairwise(tensors):
        if left.end != right.start:
            raise TensorFileError(f"the tensor {_show(right.name)} does not begin where the one before it ends")
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for tensor in tensors:
        if tensor.name in document:
            raise TensorFileError(f"the name {_show(tensor.name)} comes twice")
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text


def _parse_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise TensorFileError("the head is not a JSON object")
    try:
        return parse_json_object(text)
    except JsonError as error:
        raise TensorFileError(f"the head cannot be used: {error}") from None


def _parse_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise TensorFileError("the head's __metadata__ is not a map of text to text")
    return value


def _parse_tensor(name: str, entry: object) -> Tensor:
    if not name or not name.isprintable():
        # Also refuses lone surrogates, which JSON can spell and UTF-8 cannot.
        raise TensorFileError(f"{_show(name)} is no name for a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"the tensor {_show(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorFileError(f"the tensor {_show(name)} has the unknown dtype {_show(dtype)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise TensorFileError(f"the shape of the tensor {_show(name)} is not a list of up to {MAX_DIMENSIONS} sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorFileError(f"the data_offsets of the tensor {_show(name)} are not two positions in order")
    start, end = offsets
    size = tensor_bytes(dtype, shape)
    if end - start != size:
        raise TensorFileError(
            f"the tensor {_show(name)} takes {end - start} bytes, but its dtype and shape ask for {size}"
        )
    return Tensor(name, dtype, tuple(shape), start, end)


def _counts(value: object) -> bool:
    """Whether `value` is a list of whole numbers in [0, 2^63); JSON's true and 1.0 are no whole numbers."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _show(value: object) -> str:
    """A claim from the file, short and printable, for a message."""
    text = repr(value)
    return ascii(value if len(text) <= 100 else text[:97] + "...") if isinstance(value, str) else text[:100]
