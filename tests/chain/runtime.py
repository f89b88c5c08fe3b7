"""The recorded runtime: its metadata, with one storage item more, and the codec that speaks by it.

The SDK's own core encodes and decodes; nothing here knows SCALE but `with_storage_item`.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from typing import Any

import bittensor_core

__all__ = ["SPEC_VERSION", "TRANSACTION_VERSION", "metadata", "opaque_metadata", "runtime"]

SPEC_VERSION = 461
TRANSACTION_VERSION = 1

_RECORDED = Path(__file__).parent / "data" / "runtime-461-v15.scale.xz"


@cache
def metadata() -> bytes:
    """The metadata as a node of this chain gives it: the recorded one and `SubnetEpochConsensus` (data/NOTICE.md)."""
    recorded = lzma.decompress(_RECORDED.read_bytes())
    assert recorded[0] == 1, "Option<OpaqueMetadata>: Some"
    length, start = _read_compact(recorded, 1)
    assert start + length == len(recorded)
    # MinAllowedWeights has the type that is needed: a map from netuid to a small number.
    return with_storage_item(recorded[start:], "SubtensorModule", like="MinAllowedWeights", name="SubnetEpochConsensus")


@cache
def runtime() -> Any:
    """A `bittensor_core.Runtime` of that metadata."""
    return bittensor_core.Runtime(metadata(), SPEC_VERSION, TRANSACTION_VERSION, 42)


def opaque_metadata(*, recorded: bool = False) -> bytes:
    """What the runtime call `Metadata_metadata_at_version` returns: Option<OpaqueMetadata>; or just as `recorded`."""
    return lzma.decompress(_RECORDED.read_bytes()) if recorded else b"\1" + _compact(len(metadata())) + metadata()


def with_storage_item(plain: bytes, pallet: str, *, like: str, name: str) -> bytes:
    """Metadata whose `pallet` has a storage item `name`, in type and default a copy of the one called `like`.

    In V15 metadata a pallet is its name, then Option<storage>: the prefix (the same name), then a vector of items,
    each of which begins with its own name. The copy goes before the first item; its documentation comes along.
    """
    begins = _text(pallet) + b"\1" + _text(pallet)
    assert plain.count(begins) == 1
    count, items = _read_compact(plain, plain.index(begins) + len(begins))
    count_at = plain.index(begins) + len(begins)
    item = _text(like)
    assert plain.count(item, items) >= 1
    copied_at = plain.index(item, items)
    # Where the item ends: modifier (1), Map tag (1), hashers (vector of 1 byte), key and value types (compact), then
    # the default (vector of bytes) and the documentation (vector of strings).
    at = copied_at + len(item) + 2
    hashers, at = _read_compact(plain, at)
    at += hashers
    for _ in range(2):
        _, at = _read_compact(plain, at)
    length, at = _read_compact(plain, at)
    at += length
    lines, at = _read_compact(plain, at)
    for _ in range(lines):
        length, at = _read_compact(plain, at)
        at += length
    copy = _text(name) + plain[copied_at + len(item) : at]
    return plain[:count_at] + _compact(count + 1) + copy + plain[items:]


def _text(text: str) -> bytes:
    return _compact(len(text)) + text.encode("ascii")


def _compact(value: int) -> bytes:
    """SCALE's compact integer, up to four bytes: the two low bits say how many."""
    for mode, size in ((0, 1), (1, 2), (2, 4)):
        if value < 1 << (8 * size - 2):
            return (value << 2 | mode).to_bytes(size, "little")
    raise AssertionError("larger than any length here")


def _read_compact(data: bytes, at: int) -> tuple[int, int]:
    """A compact integer and where it ends."""
    size = {0: 1, 1: 2, 2: 4}[data[at] & 3]
    return int.from_bytes(data[at : at + size], "little") >> 2, at + size
