"""The element types of tensors: their safetensors names, sizes, and what numpy and torch call them. No imports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["BY_FRAMEWORK_NAME", "DTYPES", "DType"]


class DType(NamedTuple):
    """One element type. `bits` is the size of an element.

    `numpy` is what `numpy.dtype` takes (little-endian); kinds that numpy lacks appear as their raw bits, and types of
    less than a byte have none. `torch` is the attribute of the torch module, and the name that numpy and ml_dtypes use.
    """

    bits: int
    numpy: str | None = None
    torch: str | None = None


DTYPES: Mapping[str, DType] = {
    "F64": DType(64, "<f8", "float64"), "F32": DType(32, "<f4", "float32"),
    "F16": DType(16, "<f2", "float16"), "BF16": DType(16, "<u2", "bfloat16"),
    "I64": DType(64, "<i8", "int64"), "I32": DType(32, "<i4", "int32"),
    "I16": DType(16, "<i2", "int16"), "I8": DType(8, "|i1", "int8"),
    "U64": DType(64, "<u8", "uint64"), "U32": DType(32, "<u4", "uint32"),
    "U16": DType(16, "<u2", "uint16"), "U8": DType(8, "|u1", "uint8"),
    "BOOL": DType(8, "|b1", "bool"), "C64": DType(64, "<c8", "complex64"),
    "F8_E4M3": DType(8, "|u1", "float8_e4m3fn"), "F8_E5M2": DType(8, "|u1", "float8_e5m2"),
    "F8_E8M0": DType(8, "|u1", "float8_e8m0fnu"), "F8_E4M3FNUZ": DType(8, "|u1", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "|u1", "float8_e5m2fnuz"),
    "F6_E2M3": DType(6), "F6_E3M2": DType(6), "F4": DType(4),
}  # fmt: skip
"""By safetensors name: every type that safetensors 0.8 knows."""

BY_FRAMEWORK_NAME: Mapping[str, str] = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch}
"""The name that torch, numpy and ml_dtypes give to a type -> safetensors' name for it."""
