"""Is every value of a file finite, and within what training can reach?

Finite means finite *after* the cast to the published dtype: 1e39 is a fine float32 and an infinite bfloat16. A value
that is finite but enormous is refused too, because it makes sums over the whole slice infinite.

Both are read from a value's bits: with the sign cleared, the bits of an IEEE number grow with its magnitude, and from
some pattern on they mean infinity or NaN. So one AND and one maximum over integers decide for every dtype and cast,
without a float operation and at the speed of memory.

The bound is a power of two, so that its bits are exact in every dtype: 64 times the largest magnitude in the published
slice, taken as at least 1, rounded up. Adam moves a weight by about the learning rate a step, so that 1,000 steps at
1e-3 move it by 1; weights beyond 64 times the largest one that was published are no result of training.

Nothing here maps the file: `pread` cannot raise SIGBUS, and the memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from bzstream.evaluation.reading.specs import Pread, TensorLocation, TensorSpec, item_size
from bzstream.evaluation.rejection_codes import Failure, Refusal

__all__ = ["check_values", "published_exponent", "value_bound"]

_FIRST_BAD: Mapping[tuple[str, str], int] = {
    ("F32", "F32"): 0x7F80_0000,  # infinity
    ("F32", "BF16"): 0x7F7F_8000,  # halfway between the largest bfloat16 (0x7F7F) and 2^128: rounds to infinity
    ("F32", "F16"): 0x477F_F000,  # 65520, halfway between the largest float16 (65504) and 2^16
    ("BF16", "BF16"): 0x7F80,
    ("BF16", "F32"): 0x7F80,
    ("BF16", "F16"): 0x4780,  # 2^16; the bfloat16 below it, 65280, fits
    ("F16", "F16"): 0x7C00,
    ("F16", "F32"): 0x7C00,
    ("F16", "BF16"): 0x7C00,
    ("F64", "F64"): 0x7FF0_0000_0000_0000,
    ("F8_E4M3", "F8_E4M3"): 0x7F,  # no infinity; all ones is NaN
    ("F8_E5M2", "F8_E5M2"): 0x7C,
}
"""(dtype in the file, published dtype) -> the smallest magnitude bits that are not finite once cast (round to nearest,
ties to even). Dtypes that are not here have no infinities."""

_FLOAT_FORMATS: Mapping[str, tuple[int, int]] = {
    "F64": (52, 1023), "F32": (23, 127), "F16": (10, 15), "BF16": (7, 127), "F8_E4M3": (3, 7), "F8_E5M2": (2, 15),
}  # fmt: skip
"""Floating-point dtype -> (bits of its mantissa, bias of its exponent)."""

_REACH = 6
"""Training reaches less than 2**6 = 64 times the largest published magnitude."""

_CHUNK = 256 * 1024
"""Bytes looked at together: small enough to stay in the second-level cache between read, AND and maximum."""


def value_bound(exponents: Iterable[int]) -> int:
    """The exponent b of a slice whose published tensors have these: magnitudes of 2**b or more are refused."""
    return max([0, *exponents]) + _REACH


def published_exponent(pread: Pread, offset: int, spec: TensorSpec) -> int:
    """The smallest e such that every magnitude of a published tensor is below 2**e; 0 for dtypes that are no floats.

    Raises Failure `baseline_not_finite` when the published tensor holds a value that is not finite.
    """
    if spec.dtype not in _FLOAT_FORMATS:
        return 0
    largest = max((bits for _, bits in _maxima(pread, offset, spec.nbytes, spec.dtype)), default=0)
    if largest >= _FIRST_BAD[spec.dtype, spec.dtype]:
        raise Failure("baseline_not_finite", f"the published tensor {spec.name!r} holds a value that is not finite")
    mantissa, bias = _FLOAT_FORMATS[spec.dtype]
    return (largest >> mantissa) - bias + 1


def check_values(pread: Pread, location: TensorLocation, published: str, bound: int) -> None:
    """Check every value of a tensor of a submitted file, which is published in the dtype `published`.

    Raises Refusal: `non_finite` when one is not finite once cast, `out_of_range` when the magnitude of one is 2**bound
    or more.
    """
    not_finite = _FIRST_BAD.get((location.dtype, published))
    if not_finite is None:
        return
    mantissa, bias = _FLOAT_FORMATS[location.dtype]
    limit = min(not_finite, (bound + bias) << mantissa)
    for position, largest in _maxima(pread, location.offset, location.nbytes, location.dtype):
        where = f"{location.name!r} holds a value in its bytes {position} to {position + _CHUNK} that"
        if largest >= not_finite:
            raise Refusal("non_finite", f"{where} is not finite in {published}")
        if largest >= limit:
            raise Refusal("out_of_range", f"{where} is 2^{bound} or more, beyond what training can reach")


def _maxima(pread: Pread, offset: int, nbytes: int, dtype: str) -> Iterator[tuple[int, int]]:
    """(position, largest magnitude bits) of each chunk of a tensor. Raises Refusal `truncated`."""
    width = item_size(dtype)
    kind = np.dtype(f"<u{width}")
    magnitude = kind.type((1 << (8 * width - 1)) - 1)
    scratch = np.empty(_CHUNK // width, kind)
    done = 0
    while done < nbytes:
        raw = pread(min(_CHUNK, nbytes - done), offset + done)
        if not raw or len(raw) % width:
            raise Refusal("truncated", "a tensor is cut short")
        bits = np.frombuffer(raw, kind)
        yield done, int(np.bitwise_and(bits, magnitude, out=scratch[: len(bits)]).max())
        done += len(raw)
