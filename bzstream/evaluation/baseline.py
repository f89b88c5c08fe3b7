"""A snapshot as the evaluator sees it: the full model's tensors and each group's slice, as ranges of payloads.

It holds references to the unit files, so that a version that is being scored stays readable after the store has
dropped it, and reads with `pread`: a mapped page of a file that was cut is a SIGBUS, a short read is an error.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from bzstream.evaluation.reading.specs import TensorSpec, specs_of
from bzstream.evaluation.reading.values import published_exponent, value_bound
from bzstream.evaluation.rejection_codes import EvaluationError, Failure
from bzstream.model import Snapshot
from bzstream.payload import Payload
from bzstream.tensorfile import head_size, parse_head

__all__ = ["BaselineModel", "UnitTensors", "read_into"]

_MAX_HEAD = 1 << 30
"""Our own files: a full model's head of 18,000 tensors is 3 MB."""


class UnitTensors(NamedTuple):
    """One safetensors unit: its tensors in the order of their bytes, where those lie, and the experts of its rows."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    """Byte of the payload at which each tensor begins."""
    payload: Payload
    rows: Mapping[int, tuple[int, ...]] | None
    """Layer -> original index of each local row; None for the full model."""
    content_hash: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs)

    def pread(self, length: int, offset: int) -> bytes:
        """Bytes of the unit. Raises OSError when a file is cut."""
        return self.payload[offset : offset + length].read()


class BaselineModel:
    """One model version. `close()` gives the files back."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Raises EvaluationError when the snapshot has no config.json or a tensor that cannot be evaluated."""
        self.version = snapshot.version
        self.config: Mapping[str, Any] = snapshot.config or {}
        self.square_is_native = snapshot.orientation != "transposed"
        if not self.config:
            raise EvaluationError(f"version {self.version} was published without a config.json; publish it with one")
        self._snapshot = snapshot
        snapshot.retain()
        self._units: dict[int | None, UnitTensors] = {}
        self._bounds: dict[int, int] = {}
        self._bounds_lock = threading.Lock()

    def close(self) -> None:
        self._snapshot.release()

    @property
    def full(self) -> UnitTensors:
        """The whole model under the checkpoint's own names and shapes."""
        return self._unit(None)

    def group(self, group: int) -> UnitTensors:
        """One group's slice. Raises Failure `unknown_group`."""
        return self._unit(group)

    def value_bound(self, group: int) -> int:
        """The exponent b of a group: no training reaches a magnitude of 2**b (`reading.values`).

        Any thread may call it. The first call for a group reads its slice. Raises Failure `unknown_group` and
        `baseline_not_finite`.
        """
        unit = self.group(group)
        with self._bounds_lock:
            if group not in self._bounds:
                tensors = zip(unit.offsets, unit.specs, strict=True)
                self._bounds[group] = value_bound(published_exponent(unit.pread, at, spec) for at, spec in tensors)
            return self._bounds[group]

    def _unit(self, group: int | None) -> UnitTensors:
        if group not in self._units:
            unit = self._snapshot.full if group is None else self._snapshot.partial(group)
            if unit is None:
                raise Failure("unknown_group", f"version {self.version} has no expert group {group}")
            self._units[group] = _unit_tensors(unit.payload, unit.content_hash)
        return self._units[group]


def _unit_tensors(payload: Payload, content_hash: str) -> UnitTensors:
    size = head_size(payload[:8].read(), len(payload), max_head=_MAX_HEAD)
    head = parse_head(payload[:size].read(), len(payload), max_head=_MAX_HEAD)
    rows = None
    if "expert_group" in head.metadata:
        rows = {int(layer): tuple(row) for layer, row in json.loads(head.metadata["experts"]).items()}
    offsets = tuple(head.data_start + tensor.start for tensor in head.tensors)
    return UnitTensors(specs_of(head), offsets, payload, rows, content_hash)


def read_into(payload: Payload, offset: int, target: memoryview) -> None:
    """Fill `target` with the payload's bytes from `offset`. Raises EvaluationError when a file is cut."""
    if payload[offset : offset + len(target)].read_into(target) < len(target):
        raise EvaluationError("a unit of the store was cut; run `bzstream inspect --verify` on the store")
