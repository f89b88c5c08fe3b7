"""What a submitted tensor must be (TensorSpec), where one was found (TensorLocation), and the dtypes that are allowed.

Pure values, shared by everything that reads or stages a submission, in any process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from bzstream.evaluation.rejection_codes import EvaluationError
from bzstream.tensorfile import MAX_HEAD, Head
from bzstream.util.dtypes import DTYPES

__all__ = [
    "CASTS",
    "Pread",
    "TensorLocation",
    "TensorSpec",
    "allowed_dtypes",
    "item_size",
    "largest_file",
    "largest_head",
    "specs_of",
]

Pread = Callable[[int, int], bytes]
"""`pread(length, offset)`: up to `length` bytes of the file from `offset`."""

CASTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("F32", "BF16", "F16"), ("F32", "BF16", "F16")),
    **{dtype: (dtype,) for dtype in ("F64", "F8_E4M3", "F8_E5M2")},
    **{dtype: (dtype,) for dtype in ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")},
}
"""Published dtype -> dtypes a submission may use for it. float32, bfloat16 and float16 are cast to each other."""


class TensorSpec(NamedTuple):
    """One tensor of a published slice."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the published dtype."""
        return prod(self.shape) * item_size(self.dtype)


class TensorLocation(NamedTuple):
    """One tensor's bytes in a file: C-contiguous little-endian elements at [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def item_size(dtype: str) -> int:
    """Bytes of one element, by safetensors dtype name."""
    return DTYPES[dtype].bits // 8


def allowed_dtypes(published: str) -> tuple[str, ...]:
    """What a submission may use for a tensor published in that dtype. Raises EvaluationError for an odd one."""
    if published not in CASTS:
        raise EvaluationError(f"tensors of dtype {published} cannot be evaluated; publish {', '.join(sorted(CASTS))}")
    return CASTS[published]


def specs_of(head: Head) -> tuple[TensorSpec, ...]:
    """What a submission for a slice must hold, from the published slice's own head. Raises EvaluationError."""
    for tensor in head.tensors:
        allowed_dtypes(tensor.dtype)
    return tuple(TensorSpec(t.name, t.dtype, t.shape) for t in head.tensors)


def largest_head(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a safetensors head that are accepted: 1 MiB, or more only when the published names need more.

    256 bytes hold an entry without its name.
    """
    return max(MAX_HEAD, sum(256 + 2 * len(spec.name) for spec in specs))


def largest_file(specs: Sequence[TensorSpec]) -> int:
    """Bytes of the largest honest file: every tensor in its widest allowed dtype, and room for heads."""
    widest = (prod(spec.shape) * max(map(item_size, allowed_dtypes(spec.dtype))) for spec in specs)
    return sum(widest) + largest_head(specs) + 4096 * len(specs)
