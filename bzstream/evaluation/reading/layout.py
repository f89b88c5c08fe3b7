"""Is this file exactly the group's slice? The checks that a miner's file must pass, as functions over `pread`.

Two formats, one answer. A `.safetensors` head (strict parser in `bzstream.tensorfile`) and a `.pt` file
(`ptfile.py`) both come down to byte ranges; a file is what its first bytes say, whatever its URL ends with. The ranges
are held against what was published: the same names, no more and no fewer; the published dtype or an allowed cast to
it; the same shapes; every value finite *after* the cast, for 1e39 is a fine float32 and an infinite bfloat16; and
every value within what training can reach, for one finite but enormous value makes sums over the whole slice infinite.

Both are asked of a value's bits: with the sign cleared, the bits of an IEEE number grow with its magnitude, and from
some pattern on they mean infinity or NaN. So one AND and one maximum over integers decides for every dtype and cast,
without a float operation and at the speed of memory. The bound is a power of two, so that its bits are exact in every
dtype: 64 times the largest magnitude in the published slice, taken as at least 1, rounded up. Adam moves a weight by
about the learning rate a step, so that 1,000 steps at 1e-3 move it by 1; weights beyond 64 times the largest one that
was published are no result of training.

Nothing here maps the file: `pread` into one buffer cannot raise SIGBUS and keeps the reader's memory small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from bzstream.evaluation.reading.ptfile import ITEM_SIZES, TensorLocation, is_zip, read_pt
from bzstream.evaluation.rejection_codes import EvaluationError, Failure, Refusal
from bzstream.tensorfile import MAX_HEAD, Head, TensorFileError, head_size, parse_head

__all__ = [
    "CASTS",
    "TensorSpec",
    "allowed_dtypes",
    "check_layout",
    "check_values",
    "largest_file",
    "published_exponent",
    "specs_of",
    "value_bound",
]

Pread = Callable[[int, int], bytes]
"""`pread(length, offset)`: up to `length` bytes of the file from `offset`."""


class TensorSpec(NamedTuple):
    """One tensor of a published slice."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the published dtype."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


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
ties to even)."""

_FLOAT_FORMATS: Mapping[str, tuple[int, int]] = {
    "F64": (52, 1023), "F32": (23, 127), "F16": (10, 15), "BF16": (7, 127), "F8_E4M3": (3, 7), "F8_E5M2": (2, 15),
}  # fmt: skip
"""Floating-point dtype -> (bits of its mantissa, bias of its exponent)."""

_REACH = 6
"""Training reaches less than 2**6 = 64 times the largest published magnitude."""

_EXACT = ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")
"""BaselineModel dtypes that have no infinities and take no cast."""

CASTS: Mapping[str, tuple[str, ...]] = {
    **{published: tuple(f for f, p in _FIRST_BAD if p == published) for _, published in _FIRST_BAD},
    **{dtype: (dtype,) for dtype in _EXACT},
}
"""BaselineModel dtype -> dtypes a submission may use for it. float32, bfloat16 and float16 are cast to each other."""

_CHUNK = 256 * 1024
"""Bytes looked at together: small enough to stay in the second-level cache between read, AND and maximum."""


def allowed_dtypes(published: str) -> tuple[str, ...]:
    """What a submission may use for a tensor published in that dtype. Raises EvaluationError for an odd one."""
    if published not in CASTS:
        raise EvaluationError(f"tensors of dtype {published} cannot be evaluated; publish {', '.join(sorted(CASTS))}")
    return CASTS[published]


def specs_of(head: Head) -> tuple[TensorSpec, ...]:
    """What a submission for a slice must hold, from the published slice's own head."""
    for tensor in head.tensors:
        allowed_dtypes(tensor.dtype)
    return tuple(TensorSpec(t.name, t.dtype, t.shape) for t in head.tensors)


def largest_file(specs: Sequence[TensorSpec]) -> int:
    """Bytes of the largest honest file: every tensor in its widest allowed dtype, and room for heads."""
    widest = (prod(w.shape) * max(ITEM_SIZES[d] for d in allowed_dtypes(w.dtype)) for w in specs)
    return sum(widest) + _max_head(specs) + 4096 * len(specs)


def check_layout(pread: Pread, size: int, specs: Sequence[TensorSpec]) -> list[TensorLocation]:
    """Where each specs tensor lies in the file, in the order of `specs`.

    Raises Refusal: `not_safetensors_or_pt`, `unsafe_pickle`, `bad_layout`, `wrong_keys`, `wrong_dtype`, `wrong_shape`.
    """
    start = pread(8, 0)
    found = read_pt(pread, size, max_tensors=len(specs)) if is_zip(start) else _safetensors(pread, start, size, specs)
    by_name = {location.name: location for location in found}
    if len(by_name) != len(specs) or any(w.name not in by_name for w in specs):
        missing = [w.name for w in specs if w.name not in by_name]
        known = {w.name for w in specs}
        extra = [name for name in by_name if name not in known]
        # The file's own names are shown escaped and cut: they end in a log and on a person's terminal.
        what = f"{missing[0]!r} is missing" if missing else f"{extra[0][:120]!a} does not belong to it"
        raise Refusal("wrong_keys", f"the tensors are not exactly those of the group's slice: {what}")
    for w in specs:
        location = by_name[w.name]
        if location.dtype not in allowed_dtypes(w.dtype):
            allowed = " or ".join(allowed_dtypes(w.dtype))
            raise Refusal("wrong_dtype", f"{w.name!r} is {location.dtype}; it must be {allowed}")
        if location.shape != w.shape:
            raise Refusal("wrong_shape", f"{w.name!r} has shape {list(location.shape)[:8]}, not {list(w.shape)}")
    return [by_name[w.name] for w in specs]


def _safetensors(pread: Pread, start: bytes, size: int, specs: Sequence[TensorSpec]) -> list[TensorLocation]:
    limit = _max_head(specs)
    try:
        head = parse_head(pread(head_size(start, size, max_head=limit), 0), size, max_head=limit)
    except TensorFileError as error:
        raise Refusal("not_safetensors_or_pt", f"the file is not valid safetensors: {error}") from None
    return [TensorLocation(t.name, t.dtype, t.shape, head.data_start + t.start, t.end - t.start) for t in head.tensors]


def _max_head(specs: Sequence[TensorSpec]) -> int:
    """1 MiB, or more only when the published names themselves need more (256 bytes hold an entry without its name)."""
    return max(MAX_HEAD, sum(256 + 2 * len(w.name) for w in specs))


def value_bound(exponents: Sequence[int]) -> int:
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
    """Check every value of a tensor of a submitted file.

    Raises Refusal: `non_finite` when one is not finite once cast to `published`, `out_of_range` when the magnitude of
    one is 2**bound or more.
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
    width = ITEM_SIZES[dtype]
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
