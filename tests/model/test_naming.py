"""Tensor names to layers and experts: what is an expert, what is not, and which checkpoints make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from bzstream.model.errors import BadCheckpoint
from bzstream.model.naming import TensorInfo, expert_name, find_layers, fused_orientation
from bzstream.tensorfile import tensor_bytes

from .build import Spec, fused, separate


def infos(specs: dict[str, Spec]) -> list[TensorInfo]:
    return [TensorInfo(name, dtype, shape, tensor_bytes(dtype, shape)) for name, (dtype, shape) in specs.items()]


@pytest.mark.parametrize(
    ("name", "layer", "expert"),
    [
        ("model.language_model.layers.47.mlp.experts.gate_up_proj", 47, None),
        ("model.layers.0.mlp.experts.down_proj_bias", 0, None),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", 0, None),
        ("model.layers.3.mlp.experts.127.gate_proj.weight", 3, 127),
        ("model.layers.3.mlp.experts.7.gate_proj.weight_scale_inv", 3, 7),
        ("model.layers.31.block_sparse_moe.experts.7.w2.weight", 31, 7),
        ("layers.2.mlp.experts.0.up_proj.weight", 2, 0),
        ("language_model.model.layers.1.feed_forward.experts.gate_up_proj", 1, None),
        ("model.language_model.layers.2.experts.gate_up_proj", 2, None),
        ("backbone.layers.1.mixer.experts.5.up_proj.weight", 1, 5),
        ("_orig_mod.model.layers.1.mlp.experts.5.up_proj.weight", 1, 5),
        ("model.layers.1._orig_mod.mlp.experts.down_proj", 1, None),
        ("model.llm.layers.4.mlp.experts.w13_weight", 4, None),
        ("model.layers.6.block_sparse_moe.input_linear.weight", 6, None),
        ("model.layers.6.moe.up_proj.weight", 6, None),
    ],
)
def test_expert_tensors_are_recognised(name: str, layer: int, expert: int | None) -> None:
    found = expert_name(name)
    assert found is not None
    assert (found.layer, found.expert) == (layer, expert)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.experts_norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "mtp.layers.0.mlp.experts.gate_up_proj",
        "mtp.layers.0.mlp.experts.3.up_proj.weight",
        "model.mtp.layers.0.mlp.experts.3.up_proj.weight",
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "model.layers.0.shared_mlp.input_linear.weight",
        "model.layers.0.moe.gate.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "xmodel.layers.0.mlp.experts.gate_up_proj",
        "lm_head.weight",
    ],
)
def test_other_tensors_belong_to_no_expert(name: str) -> None:
    assert expert_name(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.01.up_proj.weight",
        "model.layers.00.mlp.experts.1.up_proj.weight",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts.3",
        "model.layers.0.mlp.experts.1234567890.up_proj.weight",
        "model.layers.0.mlp.text_moe.experts.gate_up_proj",
        "model.layers.0.self_attention.experts.input_linear.weight",
    ],
)
def test_unknown_forms_of_expert_names_are_refused(name: str) -> None:
    with pytest.raises(BadCheckpoint, match="no form that bzstream knows"):
        expert_name(name)


def test_layers_of_both_namings() -> None:
    layers = find_layers(infos(fused(layers=3, experts=5, biases=True)))
    assert {number: layer.experts for number, layer in layers.items()} == {0: 5, 1: 5, 2: 5}
    assert [len(layer.fused) for layer in layers.values()] == [4, 4, 4]
    layers = find_layers(infos(separate(layers=2, experts=3, block="block_sparse_moe")))
    assert [len(members) for members in layers[1].separate] == [3, 3, 3]


SCALES: dict[str, Spec] = {
    "gate_up_proj_input_scale": ("F32", ()),  # Llama 4 in NVFP4
    "down_proj_input_scale": ("F32", (1,)),
    "post_expert_norm.weight": ("BF16", (8,)),
}


@pytest.mark.parametrize("specs", [fused(1), separate(1)], ids=["fused", "separate"])
def test_what_the_experts_have_in_common_is_not_sliced(specs: dict[str, Spec]) -> None:
    block = next(name for name in specs if ".experts." in name).partition(".experts.")[0] + ".experts"
    own = {f"{block}.{name}": spec for name, spec in SCALES.items()}
    (layer,) = find_layers(infos(specs | own)).values()
    assert layer.experts == 4
    names = {tensor.name for members in (layer.fused, *layer.separate) for tensor in members}
    assert names == {name for name in specs if ".experts." in name}


def test_a_scale_for_each_expert_is_sliced() -> None:
    scale = "model.language_model.layers.0.mlp.experts.down_proj_weight_scale_2"
    (layer,) = find_layers(infos(fused(1) | {scale: ("F32", (4,))})).values()
    assert scale in {tensor.name for tensor in layer.fused}


def test_layers_that_predict_further_tokens_are_not_the_decoders() -> None:
    specs = separate(layers=3)
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "n_routed_experts": 4}
    assert sorted(find_layers(infos(specs), config)) == [0, 1]
    assert sorted(find_layers(infos(specs), {"num_hidden_layers": 2})) == [0, 1, 2]


def spoil(specs: dict[str, Spec], **changes: Any) -> list[TensorInfo]:
    """`specs` with tensors replaced (or, for None, removed) whose names end in the keys ("__" stands for a dot)."""
    for ending, spec in changes.items():
        name = next(name for name in specs if name.endswith(ending.replace("__", ".")))
        if spec is None:
            del specs[name]
        else:
            specs[name] = spec
    return infos(specs)


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        (infos({"model.norm.weight": ("F32", (4,))}), None, "no expert tensors"),
        (infos({"decoder.block.0.mlp.experts.expert_0.wi.weight": ("F32", (4,))}), None, "such as decoder.block.0.mlp"),
        (
            spoil(separate(), experts__2__up_proj__weight=None),
            None,
            "expert 2 of layer 0 lacks the tensor up_proj.weight",
        ),
        (
            spoil(separate(), experts__0__up_proj__weight=None),
            None,
            "expert 0 of layer 0 lacks the tensor up_proj.weight",
        ),
        (spoil(separate(), experts__1__up_proj__weight=("F32", (6, 8))), None, "unlike that of expert 0"),
        (spoil(separate(), experts__1__up_proj__weight=("BF16", (8, 6))), None, "unlike that of expert 0"),
        (infos({"layers.0.mlp.experts.1.w.weight": ("F32", (1,))}), None, "no expert 0"),
        (spoil(fused(), experts__down_proj=("BF16", (3, 8, 6))), None, "disagree on the number"),
        (infos({"layers.0.mlp.experts.w": ("F32", (0, 4))}), None, "layer 0 has no experts"),
        (infos({"layers.0.mlp.experts.w": ("F32", ())}), None, "layer 0 has no experts"),
        (infos({"layers.0.mlp.experts.w": ("F4", (2, 1))}), None, "no whole number of bytes"),
        (infos(fused(experts=4)), {"text_config": {"num_experts": 5}}, "config.json says that there are 5"),
        (infos(separate(experts=4)), {"n_routed_experts": 8}, "config.json says that there are 8"),
        (infos(separate(experts=4)), {"num_local_experts": 8}, "config.json says that there are 8"),
        (
            infos(fused(1) | {"model.language_model.layers.0.mlp.experts.0.up_proj.weight": ("F32", (1,))}),
            None,
            "fused experts and single experts",
        ),
        (infos(fused(1) | {"model.layers.0.mlp.experts.up_proj": ("F32", (4, 1))}), None, "experts under two names"),
    ],
)
def test_a_checkpoint_whose_experts_make_no_sense_is_refused(
    tensors: list[TensorInfo], config: dict[str, Any] | None, sentence: str
) -> None:
    with pytest.raises(BadCheckpoint, match=sentence):
        find_layers(tensors, config)


def qwen(hidden: int, inner: int) -> dict[str, Any]:
    return {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": hidden, "moe_intermediate_size": inner}}


def hub(specs: dict[str, Spec]) -> dict[str, Spec]:
    """The same experts transposed, as the hub stores them."""
    return {
        name: (dtype, (shape[0], shape[2], shape[1]) if ".experts." in name else shape)
        for name, (dtype, shape) in specs.items()
    }


def test_orientation_is_told_by_the_config() -> None:
    specs = fused(hidden=8, inner=6)
    assert fused_orientation(find_layers(infos(specs)), qwen(8, 6)) == "native"
    assert fused_orientation(find_layers(infos(hub(specs))), qwen(8, 6)) == "transposed"
    assert fused_orientation(find_layers(infos(specs)), None) is None
    assert fused_orientation(find_layers(infos(specs)), {"model_type": "gpt_oss", "hidden_size": 1}) is None
    assert fused_orientation(find_layers(infos(separate())), qwen(8, 6)) is None


def test_a_square_tensor_is_only_accepted_where_it_cannot_be_read_wrongly() -> None:
    square = fused(hidden=8, inner=4)
    assert fused_orientation(find_layers(infos(square)), qwen(8, 4)) == "native"
    with pytest.raises(BadCheckpoint, match="square"):
        fused_orientation(find_layers(infos(hub(square))), qwen(8, 4))
    only = {name: spec for name, spec in square.items() if not name.endswith("down_proj")}
    with pytest.raises(BadCheckpoint, match="square"):
        fused_orientation(find_layers(infos(only)), qwen(8, 4))


def test_shapes_that_fit_no_orientation_or_several_are_refused() -> None:
    specs = fused(hidden=8, inner=6)
    with pytest.raises(BadCheckpoint, match="does not fit"):
        fused_orientation(find_layers(infos(specs)), qwen(8, 7))
    mixed = hub(specs)
    mixed["model.language_model.layers.1.mlp.experts.down_proj"] = ("BF16", (4, 8, 6))
    with pytest.raises(BadCheckpoint, match="different orientations"):
        fused_orientation(find_layers(infos(mixed)), qwen(8, 6))
