"""A checked file's tensors, read into one flat buffer in the published dtypes: what will be exchanged with the model.

Every byte range was checked by `sandbox.Reader`, so nothing is parsed here; bytes are read, cast where the file's dtype
is another float, and hashed in the published dtype and order, so that the same weights have the same hash whatever
file they came in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3

from bzstream.evaluation.reading.specs import TensorLocation, TensorSpec, item_size
from bzstream.evaluation.rejection_codes import Failure
from bzstream.evaluation.scoring.module import torch_dtype
from bzstream.util.files import read_fully

__all__ = ["CHUNK", "fill", "layout", "memory_of"]

CHUNK = 32 * 1024 * 1024
"""Bytes moved at a time: large enough for full bandwidth, small against a slice."""
_HOT = 1024 * 1024
"""Bytes read and then hashed while they are still in the cache."""
_ALIGN = 256
"""Alignment of each tensor in a staging buffer, enough for every vector load."""


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """(byte of each tensor in a staging buffer, bytes in all)"""
    starts: list[int] = []
    end = 0
    for each in specs:
        starts.append(end)
        end += -(-each.nbytes // _ALIGN) * _ALIGN
    return starts, end


def fill(
    fd: int, locations: Sequence[TensorLocation], specs: Sequence[TensorSpec], starts: Sequence[int], host: torch.Tensor
) -> str:
    """Read the tensors into host memory, cast them, and hash them (BLAKE3 over the published dtype and order)."""
    hasher = blake3()
    memory = memory_of(host)
    for source, aim, start in zip(locations, specs, starts, strict=True):
        here = memory[start : start + aim.nbytes]
        if source.dtype == aim.dtype:
            for at in range(0, aim.nbytes, _HOT):
                piece = here[at : at + _HOT]
                _read(fd, source.offset + at, piece)
                hasher.update(piece)
            continue
        target = host[start : start + aim.nbytes].view(torch_dtype(aim.dtype))
        step = CHUNK // item_size(source.dtype)
        for first in range(0, target.numel(), step):
            piece_of = target[first : first + step]
            raw = torch.empty(piece_of.numel(), dtype=torch_dtype(source.dtype))
            _read(fd, source.offset + first * item_size(source.dtype), memory_of(raw))
            piece_of.copy_(raw)
            hasher.update(memory_of(piece_of))
    return hasher.hexdigest()


def _read(fd: int, offset: int, target: memoryview) -> None:
    try:
        if read_fully(fd, target, offset) < len(target):
            raise Failure("spool_error", "the spooled file was cut")
    except OSError as error:
        raise Failure("spool_error", f"the spooled file cannot be read: {error.strerror}") from None
