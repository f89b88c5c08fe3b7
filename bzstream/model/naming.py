"""Where a checkpoint's experts are: tensor names to layers and experts, and what a layer's experts look like.

Model families name experts in two ways. *Fused*: one tensor holds all experts of a layer and its first dimension is
the expert (`…layers.3.mlp.experts.gate_up_proj`: Qwen3-VL-MoE, gpt-oss with its biases). *Per expert*: each expert
has tensors of its own (`…layers.3.mlp.experts.7.up_proj.weight`: Qwen3-MoE, DeepSeek;
`…layers.3.block_sparse_moe.experts.7.w1.weight`: Mixtral). The name of the block around `experts` (Gemma 4 has none)
and the names below it differ between families and do not matter here, so new families, quantization scales and biases
need no new code. Two families leave the word `experts` out: Granite MoE (`block_sparse_moe.input_linear.weight`) and
Step 3 (`moe.gate_proj.weight`). docs/families.md lists what was tried.

The pattern is anchored at both ends: `mlp.shared_experts.…` and the router `mlp.gate.…` belong to no expert, and the
layers of a multi-token-prediction head (`mtp.layers.0.…`) are not the decoder's layers, whose numbers the expert map
speaks of. What no pattern matches goes to the shared unit, and so does what a layer's experts have in common, such as
one scale of a quantized fused tensor. A checkpoint whose experts have names of no known form is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bzstream.model.errors import BadCheckpoint

__all__ = ["ExpertName", "Layer", "TensorInfo", "expert_count", "expert_name", "find_layers", "fused_orientation"]

_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_WRAPPERS = r"(?:(?:_orig_mod|backbone|decoder|language_model|llm|model|module|text_model|thinker|transformer)\.)*"
"""Modules that may stand around the text decoder's layers; `_orig_mod` is what torch.compile puts there."""

_LAYER = rf"layers\.(?P<layer>{_NUMBER})\.(?:_orig_mod\.)?"
_NAME = r"(?!expert_\d)[A-Za-z_][A-Za-z0-9_.]*"  # expert_0, expert_1: NLLB-MoE and Switch, encoder and decoder
_EXPERTS = re.compile(
    rf"(?P<block>{_WRAPPERS}{_LAYER}(?:(?!self_attention)[A-Za-z_]+\.)?experts)\.(?:(?P<expert>{_NUMBER})\.)?(?P<rest>{_NAME})"
)
_FUSED_WITHOUT_EXPERTS = re.compile(
    rf"(?P<block>{_WRAPPERS}{_LAYER}(?:block_sparse_moe(?=\.(?:in|out)put_linear\.)|moe(?=\.(?:gate|up|down)_proj\.)))"
    r"\.(?P<expert>(?!))?(?P<rest>[a-z_]+\.weight)"
)
"""The whole of an expert tensor's name, in either form. (JetMoE's `self_attention.experts` are attention heads.)"""

_SEEMS = re.compile(_WRAPPERS + r"layers\.\d+\.(?:[^.]+\.)*experts(?:\..*)?")
"""Names of the decoder's layers that have to do with experts, whatever their form."""


class TensorInfo(NamedTuple):
    """What the plan needs to know of a source tensor; `size` is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


class ExpertName(NamedTuple):
    """A parsed name. `expert` is None for a fused tensor; `rest` is what follows `experts.` and the expert's number."""

    block: str
    layer: int
    expert: int | None
    rest: str


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one decoder layer: `fused` tensors, or `separate[expert]` tensors, never both.

    The first dimension of a fused tensor is the expert; what the experts have in common is not among them.
    """

    number: int
    experts: int
    fused: tuple[TensorInfo, ...]
    separate: tuple[tuple[TensorInfo, ...], ...]


def expert_name(name: str) -> ExpertName | None:
    """The parts of an expert tensor's name, or None for a tensor of no expert.

    Raises BadCheckpoint for a name of the decoder's experts that follows no known form.
    """
    found = _EXPERTS.fullmatch(name) or _FUSED_WITHOUT_EXPERTS.fullmatch(name)
    if found is None:
        if _SEEMS.fullmatch(name):
            raise BadCheckpoint(
                f"the tensor {name} seems to be an expert's, but its name has no form that bzstream knows"
            )
        return None
    expert = found["expert"]
    return ExpertName(found["block"], int(found["layer"]), None if expert is None else int(expert), found["rest"])


def find_layers(tensors: Collection[TensorInfo], config: Mapping[str, Any] | None = None) -> dict[int, Layer]:
    """Layer number -> its experts, for every decoder layer that has any.

    `config` is the checkpoint's config.json; what it says of the experts must agree with the tensors. Raises
    BadCheckpoint when there are no experts, or a layer's experts are incomplete, mixed or unlike each other.
    """
    prediction = _prediction_layers(config)
    blocks: dict[int, str] = {}
    fused: dict[int, list[TensorInfo]] = {}
    separate: dict[int, dict[int, dict[str, TensorInfo]]] = {}
    for tensor in tensors:
        name = expert_name(tensor.name)
        if name is None or name.layer in prediction:
            continue
        if blocks.setdefault(name.layer, name.block) != name.block:
            raise BadCheckpoint(
                f"layer {name.layer} has experts under two names: {blocks[name.layer]} and {name.block}"
            )
        if name.expert is None:
            fused.setdefault(name.layer, []).append(tensor)
        else:
            separate.setdefault(name.layer, {}).setdefault(name.expert, {})[name.rest] = tensor
    if not blocks:
        odd = next((tensor.name for tensor in tensors if "experts" in tensor.name.split(".")), None)
        raise BadCheckpoint(
            "the checkpoint has no expert tensors; bzstream publishes mixture-of-experts models only"
            if odd is None
            else f"the experts have names of no form that bzstream knows, such as {odd}; see docs/families.md"
        )
    expected = expert_count(config)
    layers: dict[int, Layer] = {}
    for number in sorted(blocks):
        if number in separate:
            layer = _separate(number, separate[number])
            if any(len(tensor.shape) > 1 for tensor in fused.get(number, ())):
                raise BadCheckpoint(f"layer {number} has fused experts and single experts at once; keep one of the two")
        else:
            layer = _fused(number, fused[number])
        if expected is not None and layer.experts != expected:
            raise BadCheckpoint(
                f"layer {number} has {layer.experts} experts, but config.json says that there are {expected}"
            )
        layers[number] = layer
    return layers


def expert_count(config: Mapping[str, Any] | None) -> int | None:
    """The number of routed experts of a layer by config.json, or None if it does not say."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        value = _text_config(config).get(name)
        if type(value) is int and value > 0:
            return value
    return None


def fused_orientation(layers: Mapping[int, Layer], config: Mapping[str, Any] | None) -> str | None:
    """How fused Qwen3-VL-MoE experts lie: `"native"` as transformers 5 holds them, `"transposed"` as on the hub.

    None where the question does not arise: another family, no fused tensors, or no sizes in config.json.
    The hub's files hold gate_up_proj as [experts, hidden, 2 * intermediate] and down_proj as [experts, intermediate,
    hidden]; transformers 5 holds both with the last two dimensions swapped, and on loading swaps what does not fit.
    A square gate_up_proj fits both ways. down_proj then tells which convention the file follows (both cannot be
    square); transposed, transformers would load wrong weights from it, so it is refused.

    Raises BadCheckpoint when shapes fit neither way, differ between layers, or are ambiguous.
    """
    text = _text_config(config)
    hidden, middle = text.get("hidden_size"), text.get("moe_intermediate_size")
    families = {str(section.get("model_type", "")) for section in (config or {}, text)}
    if (
        not any(family.startswith("qwen3_vl_moe") for family in families)
        or type(hidden) is not int
        or type(middle) is not int
    ):
        return None
    native = {"gate_up_proj": (2 * middle, hidden), "down_proj": (hidden, middle)}
    seen: dict[str, str] = {}
    square = None
    for layer in layers.values():
        for tensor in layer.fused:
            wanted = native.get(tensor.name.rpartition(".")[2])
            if wanted is None:
                continue
            if tensor.shape[1:] not in (wanted, wanted[::-1]):
                raise BadCheckpoint(
                    f"the tensor {tensor.name} has the shape {list(tensor.shape)}, which does not fit the hidden_size "
                    f"{hidden} and moe_intermediate_size {middle} of config.json"
                )
            if wanted[0] == wanted[1]:
                square = tensor.name
            else:
                seen.setdefault("native" if tensor.shape[1:] == wanted else "transposed", tensor.name)
    if len(seen) > 1:
        raise BadCheckpoint(
            f"{seen['native']} and {seen['transposed']} lie in different orientations; save the model anew"
        )
    if square and seen.keys() != {"native"}:
        raise BadCheckpoint(
            f"the tensor {square} is square, so that it cannot be told whether it is transposed (as on the hub); load "
            "the model with the release of transformers that wrote it and save it with transformers 5"
        )
    return next(iter(seen), None)


def _text_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The section of config.json that describes the text decoder."""
    found: Mapping[str, Any] = config or {}
    for section in ("thinker_config", "text_config"):
        inner = found.get(section)
        found = inner if isinstance(inner, Mapping) else found
    return found


def _prediction_layers(config: Mapping[str, Any] | None) -> range:
    """Layers behind the decoder's last that only predict further tokens (DeepSeek-V3 stores its own as layer 61)."""
    text = _text_config(config)
    layers, extra = text.get("num_hidden_layers"), text.get("num_nextn_predict_layers")
    return range(layers, layers + extra) if type(layers) is int and type(extra) is int else range(0)


def _fused(number: int, tensors: list[TensorInfo]) -> Layer:
    # Weights have two dimensions at least; only where there are none do shorter ones say how many experts there are.
    counts = {t.shape[0] for t in tensors if len(t.shape) > 1} or {t.shape[0] for t in tensors if t.shape}
    if len(counts) > 1:
        raise BadCheckpoint(f"the fused expert tensors of layer {number} disagree on the number of experts")
    count = counts.pop() if counts else 0
    if count == 0:
        raise BadCheckpoint(f"layer {number} has no experts: the first dimension of {tensors[0].name} is empty")
    sliced = _sliced(tensors, count)
    for tensor in sliced:
        if tensor.size % count:  # only dtypes of less than a byte
            raise BadCheckpoint(f"one expert of the tensor {tensor.name} is no whole number of bytes")
    return Layer(number, count, tuple(sorted(sliced)), ())


def _sliced(tensors: Iterable[TensorInfo], count: int) -> list[TensorInfo]:
    """The fused tensors that hold something of each expert, not a scale or a norm that all experts share."""
    return [tensor for tensor in tensors if len(tensor.shape) > 1 or tensor.shape == (count,)]


def _separate(number: int, experts: dict[int, dict[str, TensorInfo]]) -> Layer:
    count = max(experts) + 1
    missing = next((index for index in range(count) if index not in experts), None)
    if missing is not None:
        raise BadCheckpoint(f"layer {number} has an expert {count - 1}, but no expert {missing}")
    pattern = {rest: (tensor.dtype, tensor.shape) for rest, tensor in experts[0].items()}
    for index in range(count):
        for rest in sorted(pattern.keys() | experts[index].keys()):
            if rest not in experts[index] or rest not in pattern:
                lacking, having = (index, 0) if rest not in experts[index] else (0, index)
                raise BadCheckpoint(
                    f"expert {lacking} of layer {number} lacks the tensor {rest} that expert {having} has"
                )
            tensor = experts[index][rest]
            if (tensor.dtype, tensor.shape) != pattern[rest]:
                dtype, shape = pattern[rest]
                raise BadCheckpoint(
                    f"the tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"unlike that of expert 0, which is {dtype} {list(shape)}"
                )
    return Layer(number, count, (), tuple(tuple(sorted(experts[index].values())) for index in range(count)))
