"""From a checkpoint and an expert map to the files of a snapshot: which byte of the source goes where.

Everything here is a pure function of tensor names, shapes and the map. The plan lists the units (each with its
finished head) and the *runs*: stretches of source bytes in the order of the full model's file, each with the places
that it goes to in the unit files. Every source byte is in exactly one run, and a run has one target, or several when
an expert belongs to several groups. Reading the runs in order therefore reads the source once, hashes the full model
on the way, and fills the unit files.

A unit is *streamed* when the runs fill it from front to back, so that it too can be hashed on the way. It is the rule:
units and the full view order tensors the same way. A local order that differs from the original order, or layers with
different numbers of experts, break it; such a unit is hashed by reading it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bzstream.model.checkpoint import Place
from bzstream.model.expert_map import ExpertMap
from bzstream.model.naming import Layer, TensorInfo
from bzstream.tensorfile import Tensor, arrange, build_head

__all__ = ["CopyRun", "Extents", "Plan", "UnitPlan", "make_plan"]

Extents = list[tuple[int, int, int]]
"""(unit index, offset in the unit's file, length): where the data of the full view lies, in order."""


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """One file to write. `kind` is "shared", "partial" or "ungrouped"; `experts` is layer -> original indices."""

    kind: str
    group: int | None
    experts: Mapping[int, tuple[int, ...]]
    head: bytes
    tensors: tuple[Tensor, ...]
    streamed: bool

    @property
    def file(self) -> str:
        return f"group-{self.group}.safetensors" if self.kind == "partial" else f"{self.kind}.safetensors"

    @property
    def label(self) -> str:
        return f"partial/{self.group}" if self.kind == "partial" else self.kind

    @property
    def size(self) -> int:
        return len(self.head) + (self.tensors[-1].end if self.tensors else 0)


class CopyRun(NamedTuple):
    """`length` bytes from `offset` of a source go to each of `targets`, (unit index, offset in its file)."""

    source: int
    offset: int
    length: int
    targets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to publish: the units, the full view's head and data, and the runs in the view's order."""

    units: tuple[UnitPlan, ...]
    head: bytes
    tensors: tuple[Tensor, ...]
    runs: tuple[CopyRun, ...]

    @property
    def size(self) -> int:
        """Bytes of the full view."""
        return len(self.head) + (self.tensors[-1].end if self.tensors else 0)

    def extents(self) -> Extents:
        """The data of the full view in the unit files: the lowest group's copy of each run, neighbours joined."""
        joined: Extents = []
        for run in self.runs:
            unit, offset = run.targets[0]
            if joined and joined[-1][0] == unit and joined[-1][1] + joined[-1][2] == offset:
                joined[-1] = (unit, joined[-1][1], joined[-1][2] + run.length)
            else:
                joined.append((unit, offset, run.length))
        return joined


@dataclass(slots=True)
class _Draft:
    """A unit while its tensors are being collected."""

    kind: str
    group: int | None
    experts: Mapping[int, tuple[int, ...]]
    shapes: dict[str, tuple[str, tuple[int, ...]]]

    def metadata(self) -> dict[str, str]:
        found = {"format": "pt"}
        if self.kind == "partial":
            found["expert_group"] = str(self.group)
        if self.kind != "shared":
            layers = {str(layer): list(indices) for layer, indices in sorted(self.experts.items())}
            found["experts"] = json.dumps(layers, separators=(",", ":"))
        return found


def make_plan(
    tensors: Mapping[str, TensorInfo],
    places: Mapping[str, Place],
    layers: Mapping[int, Layer],
    experts: ExpertMap,
    metadata: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for a map that `check_map` found to fit the layers that `find_layers` found in the tensors.

    `metadata` is what the sources' heads say beyond tensors; the full view's head says it too.
    """
    drafts = [_Draft("shared", None, {}, {})]
    drafts += [_Draft("partial", group, dict(experts[group]), {}) for group in sorted(experts)]
    left = {number: _left_over(layer, number, experts) for number, layer in layers.items()}
    if any(left.values()):
        drafts.append(_Draft("ungrouped", None, {number: indices for number, indices in left.items() if indices}, {}))

    # Tensor -> its rows, a row being what goes to one place: (bytes, ((unit, row in the unit's tensor), …)).
    rows: dict[str, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    for number, layer in layers.items():
        owners = _owners(drafts, number, layer.experts)
        for tensor in layer.fused:
            rows[tensor.name] = [(tensor.size // layer.experts, owners[expert]) for expert in range(layer.experts)]
            for draft in drafts:
                if number in draft.experts:
                    draft.shapes[tensor.name] = tensor.dtype, (len(draft.experts[number]), *tensor.shape[1:])
        for expert, members in enumerate(layer.separate):
            for tensor in members:
                rows[tensor.name] = [(tensor.size, tuple((unit, 0) for unit, _ in owners[expert]))]
                for unit, _ in owners[expert]:
                    drafts[unit].shapes[tensor.name] = tensor.dtype, tensor.shape
    for tensor in tensors.values():
        if tensor.name not in rows:
            rows[tensor.name] = [(tensor.size, ((0, 0),))]
            drafts[0].shapes[tensor.name] = tensor.dtype, tensor.shape

    arranged = [arrange((name, *shape) for name, shape in draft.shapes.items()) for draft in drafts]
    heads = [build_head(placed, draft.metadata()) for placed, draft in zip(arranged, drafts, strict=True)]
    begin = [{t.name: len(head) + t.start for t in placed} for placed, head in zip(arranged, heads, strict=True)]
    view = arrange((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors.values())
    runs: list[CopyRun] = []
    for wanted in view:
        source, offset = places[wanted.name]
        for size, owned in rows[wanted.name]:
            targets = tuple((unit, begin[unit][wanted.name] + row * size) for unit, row in owned)
            _append(runs, CopyRun(source, offset, size, targets))
            offset += size
    streamed = _streamed(runs, heads)
    # A slice may be published as if it were a model; the full view must not call itself one.
    kept = {key: value for key, value in (metadata or {}).items() if key not in ("expert_group", "experts")}
    units = tuple(
        UnitPlan(draft.kind, draft.group, draft.experts, head, placed, unit in streamed)
        for unit, (draft, head, placed) in enumerate(zip(drafts, heads, arranged, strict=True))
    )
    return Plan(units, build_head(view, {"format": "pt", **kept}), view, tuple(runs))


def _left_over(layer: Layer, number: int, experts: ExpertMap) -> tuple[int, ...]:
    taken = {index for assigned in experts.values() for index in assigned[number]}
    return tuple(index for index in range(layer.experts) if index not in taken)


def _owners(drafts: Iterable[_Draft], layer: int, count: int) -> list[tuple[tuple[int, int], ...]]:
    """Expert -> the units that hold it and its row there, lowest group first."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for unit, draft in enumerate(drafts):
        for row, expert in enumerate(draft.experts.get(layer, ())):
            found[expert].append((unit, row))
    return [tuple(owners) for owners in found]


def _append(runs: list[CopyRun], run: CopyRun) -> None:
    """Add a run, joined with the one before it where both source and every target go on without a gap."""
    if run.length == 0:
        return
    last = runs[-1] if runs else None
    if (
        last is not None
        and (last.source, last.offset + last.length) == (run.source, run.offset)
        and tuple((unit, offset + last.length) for unit, offset in last.targets) == run.targets
    ):
        runs[-1] = last._replace(length=last.length + run.length)
    else:
        runs.append(run)


def _streamed(runs: Iterable[CopyRun], heads: list[bytes]) -> set[int]:
    """The units that the runs fill from front to back."""
    filled = {unit: len(head) for unit, head in enumerate(heads)}
    for run in runs:
        for unit, offset in run.targets:
            if filled.get(unit) == offset:
                filled[unit] += run.length
            else:
                filled.pop(unit, None)
    return set(filled)
