"""Where published bytes lie in a model's parameters: the one map behind loading, swapping and restoring.

A snapshot keeps tensors as the checkpoint names and shapes them; the model that is built from its config may hold the
same numbers otherwise. The differences that exist are few, and each is a rule here:

- fused experts (`…mlp.experts.gate_up_proj`, dimension 0 is the expert): row i of a slice is expert `rows[i]`;
- single experts (`…experts.7.up_proj.weight`, Mixtral's `w1`, `w3`, `w2`) that the model fuses: gate above up in
  `gate_up_proj[7]`, down in `down_proj[7]`; a model that keeps single experts takes them as they are;
- Qwen3-VL-MoE as the hub has it, the last two dimensions swapped against what transformers 5 holds: told apart by the
  shapes that the config gives; what is square is an error unless `down_proj` settles it (`model.fused_orientation`);
- everything else goes to the parameter of the same name.

`bind` is pure and works on names and shapes alone. It says for each tensor which rows go where, and fails, naming the
tensor, rather than guess. `missing` lists the parameters that the bindings leave unfilled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from bzstream.evaluation.reading.specs import TensorSpec
from bzstream.evaluation.rejection_codes import EvaluationError
from bzstream.model.naming import expert_name

__all__ = ["Binding", "bind", "missing"]


class Binding(NamedTuple):
    """A part of a published tensor and the region of a parameter that holds the same numbers."""

    tensor: int
    """Index into the published tensors."""
    row: int | None
    """Row of the published tensor (its dimension 0); None: all of it."""
    parameter: str
    expert: int | None
    """Row of the parameter; None: all of it."""
    span: tuple[int, int] | None
    """[start, stop) of the dimension after the expert; None: all of it."""
    transposed: bool
    """The last two dimensions are swapped."""


_SINGLE = {
    "gate_proj.weight": ("gate_up_proj", 0),
    "up_proj.weight": ("gate_up_proj", 1),
    "down_proj.weight": ("down_proj", None),
    "w1.weight": ("gate_up_proj", 0),
    "w3.weight": ("gate_up_proj", 1),
    "w2.weight": ("down_proj", None),
}
"""A single expert's tensor -> the fused parameter and which half of its rows (None: all), as transformers 5 fuses."""

_RENAMES: Sequence[Callable[[str], str]] = (
    lambda name: name,
    lambda name: name.replace(".block_sparse_moe.", ".mlp."),  # Mixtral in transformers 5
)

Shape = tuple[int, ...]


def bind(
    tensors: Sequence[TensorSpec],
    parameters: Mapping[str, Shape],
    *,
    rows: Mapping[int, Sequence[int]] | None = None,
    square_is_native: bool = True,
    ignored: Callable[[str], bool] = lambda name: False,
) -> list[Binding]:
    """Every binding of the published `tensors` to the model's `parameters` (name -> shape).

    `rows` maps a layer to the original index of each local row, for a slice; None for the full model. `ignored` says
    which tensors the model does without. Raises EvaluationError when a tensor has no place or its shape does not fit.
    """

    def named(name: str) -> str | None:
        return next((renamed for rename in _RENAMES if (renamed := rename(name)) in parameters), None)

    def place(index: int, spec: TensorSpec) -> list[Binding]:
        """[] when the tensor has no place."""
        name, direct = expert_name(spec.name), named(spec.name)
        if name is not None and name.expert is None:
            return (
                fused(
                    index, spec, direct, rows=range(parameters[direct][0]) if rows is None else rows.get(name.layer, ())
                )
                if direct
                else []
            )
        if direct is not None:
            return [Binding(index, None, direct, None, None, False)] if parameters[direct] == spec.shape else []
        return [] if name is None or name.expert is None else single(index, spec, name.block, name.rest, name.expert)

    def fused(index: int, spec: TensorSpec, parameter: str, *, rows: Sequence[int]) -> list[Binding]:
        experts, inner = parameters[parameter][0], parameters[parameter][1:]
        swapped = len(inner) == 2 and spec.shape[1:] == inner[::-1]
        if len(rows) != spec.shape[0] or any(not 0 <= expert < experts for expert in rows):
            return []
        if spec.shape[1:] != inner and not swapped:
            return []
        transposed = swapped and (inner[0] != inner[1] or not square_is_native)
        return [Binding(index, row, parameter, expert, None, transposed) for row, expert in enumerate(rows)]

    def single(index: int, spec: TensorSpec, block: str, rest: str, expert: int) -> list[Binding]:
        fused_name, half = _SINGLE.get(rest, (None, None))
        parameter = named(f"{block}.{fused_name}")
        if fused_name is None or parameter is None:
            return []
        shape = parameters[parameter]
        whole = shape[1:] if half is None else (shape[1] // 2, *shape[2:])
        if spec.shape != whole or expert >= shape[0]:
            return []
        span = None if half is None else (half * whole[0], (half + 1) * whole[0])
        return [Binding(index, None, parameter, expert, span, False)]

    bindings: list[Binding] = []
    for index, spec in enumerate(tensors):
        found = place(index, spec)
        bindings += found
        if not found and 0 not in spec.shape and not ignored(spec.name):
            raise EvaluationError(
                f"the model built from the config has no place for the published tensor {spec.name!r} of shape "
                f"{list(spec.shape)}; check config.json or set evaluation.model"
            )
    return bindings


def missing(bindings: Iterable[Binding], parameters: Mapping[str, Shape]) -> list[str]:
    """Parameters that the bindings do not fill to the last element. (Pieces of one `bind` never overlap.)"""
    filled = dict.fromkeys(parameters, 0)
    for binding in bindings:
        shape = parameters[binding.parameter]
        if binding.span is not None:
            start, stop = binding.span
            filled[binding.parameter] += (stop - start) * prod(shape[2:])
        else:
            filled[binding.parameter] += prod(shape if binding.expert is None else shape[1:])
    return [name for name, shape in parameters.items() if filled[name] != prod(shape)]
