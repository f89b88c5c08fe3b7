"""Does this file hold exactly the tensors of the group's slice? Names, dtypes, shapes and byte ranges; no values.

A `.safetensors` head (strict parser in `bzstream.tensorfile`) and a `.pt` file (`ptfile.py`) both come down to byte
ranges; a file is what its first bytes say, whatever its URL ends with. The ranges are held against what was published:
the same names, no more and no fewer; the published dtype or an allowed cast to it; the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

from bzstream.evaluation.reading.ptfile import is_zip, read_pt
from bzstream.evaluation.reading.specs import Pread, TensorLocation, TensorSpec, allowed_dtypes, largest_head
from bzstream.evaluation.rejection_codes import Refusal
from bzstream.tensorfile import TensorFileError, head_size, parse_head

__all__ = ["check_layout"]


def check_layout(pread: Pread, size: int, specs: Sequence[TensorSpec]) -> list[TensorLocation]:
    """Where each tensor of the slice lies in the file of `size` bytes, in the order of `specs`.

    Raises Refusal: `not_safetensors_or_pt`, `unsafe_pickle`, `bad_layout`, `wrong_keys`, `wrong_dtype`, `wrong_shape`.
    """
    start = pread(8, 0)
    found = read_pt(pread, size, max_tensors=len(specs)) if is_zip(start) else _safetensors(pread, start, size, specs)
    by_name = {location.name: location for location in found}
    names = {spec.name for spec in specs}
    if by_name.keys() != names:
        # The file's own names are shown escaped and cut: they end in a log and on a person's terminal.
        missing = [f"{spec.name!r} is missing" for spec in specs if spec.name not in by_name]
        extra = [f"{name[:120]!a} does not belong to it" for name in by_name if name not in names]
        raise Refusal("wrong_keys", f"the tensors are not exactly those of the group's slice: {[*missing, *extra][0]}")
    for spec in specs:
        location = by_name[spec.name]
        if location.dtype not in allowed_dtypes(spec.dtype):
            allowed = " or ".join(allowed_dtypes(spec.dtype))
            raise Refusal("wrong_dtype", f"{spec.name!r} is {location.dtype}; it must be {allowed}")
        if location.shape != spec.shape:
            raise Refusal("wrong_shape", f"{spec.name!r} has shape {list(location.shape)[:8]}, not {list(spec.shape)}")
    return [by_name[spec.name] for spec in specs]


def _safetensors(pread: Pread, start: bytes, size: int, specs: Sequence[TensorSpec]) -> list[TensorLocation]:
    limit = largest_head(specs)
    try:
        head = parse_head(pread(head_size(start, size, max_head=limit), 0), size, max_head=limit)
    except TensorFileError as error:
        raise Refusal("not_safetensors_or_pt", f"the file is not valid safetensors: {error}") from None
    return [TensorLocation(t.name, t.dtype, t.shape, head.data_start + t.start, t.end - t.start) for t in head.tensors]
