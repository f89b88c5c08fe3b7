"""A model in memory as a checkpoint: numpy arrays and torch tensors, without importing torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy

from bzstream.model.checkpoint import Checkpoint
from bzstream.model.errors import BadCheckpoint
from bzstream.model.small_files import CONFIG
from bzstream.tensorfile import Tensor, tensor_bytes
from bzstream.util.dtypes import BY_FRAMEWORK_NAME

__all__ = ["open_state_dict"]


class ArraySource:
    """The bytes of one array or tensor. What is not contiguous in CPU memory is copied when it is first read, and
    the copy is dropped when its last byte was read: the plan reads every tensor once, from its start to its end.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self._value = value
        self._bytes: memoryview | None = None

    def read_into(self, offset: int, into: memoryview) -> None:
        if self._bytes is None:
            self._bytes = _bytes_of(self._value)
        into[:] = self._bytes[offset : offset + len(into)]
        if offset + len(into) == len(self._bytes):
            self._bytes = None

    def check(self) -> None:
        """Memory has no time stamp; the caller keeps the tensors still."""

    def close(self) -> None:
        self._bytes = self._value = None


def open_state_dict(tensors: Mapping[str, Any], config: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint behind a state dict. Raises BadCheckpoint for what is no tensor or has no safetensors dtype."""
    try:
        files = {} if config is None else {CONFIG: json.dumps(dict(config), indent=2).encode("ascii")}
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"the config cannot be written as JSON: {error}; give what config.json would hold"
        ) from None
    checkpoint = Checkpoint([ArraySource(name, value) for name, value in tensors.items()], files)
    checkpoint.config = config
    for number, (name, value) in enumerate(tensors.items()):
        if not isinstance(name, str) or not name.isprintable() or not name or name == "__metadata__":
            raise BadCheckpoint(f"{name!r} is no name for a tensor")
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise BadCheckpoint(f"{name} is {type(value).__name__}, no numpy array or torch tensor")
        if getattr(value, "is_meta", False) or str(getattr(value, "layout", "torch.strided")) != "torch.strided":
            raise BadCheckpoint(f"{name} has no plain values: it is a meta or sparse tensor")
        dtype = BY_FRAMEWORK_NAME.get(getattr(value.dtype, "name", str(value.dtype)).removeprefix("torch."))
        if dtype is None:
            raise BadCheckpoint(f"{name} has the dtype {value.dtype}, which safetensors files cannot hold")
        shape = tuple(int(size) for size in value.shape)
        checkpoint.add(number, [Tensor(name, dtype, shape, 0, tensor_bytes(dtype, shape))], 0)
    if not checkpoint.size:
        raise BadCheckpoint("the state dict has no tensors")
    return checkpoint


def _bytes_of(value: Any) -> memoryview:
    """The bytes of a tensor, row-major and little-endian, without a copy where it lies so already."""
    if not isinstance(value, (numpy.ndarray, numpy.generic)):
        value = value.detach().cpu().contiguous()
        # Scalars first: torch reinterprets only the last dimension. uint8 is the one dtype that numpy always knows.
        value = value.reshape(-1).view(_torch_uint8(value)).numpy()
    array = numpy.ascontiguousarray(value)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(numpy.uint8).data


def _torch_uint8(tensor: Any) -> Any:
    """`torch.uint8` by way of a tensor, as this module must not import torch."""
    return tensor.new_empty(0).byte().dtype
