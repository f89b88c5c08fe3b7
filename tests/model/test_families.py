"""Checkpoints that transformers itself writes, from tiny random configs of every family.

For each: the full view equals the files that were written, and each group's slice, put back in the place of its
experts, is what transformers loads from them, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from bzstream.model import SnapshotCache, publish

EXPERTS = 4
GROUPS = {2: {0: (3, 0), 1: (1, 2)}, 0: {0: (1, 2), 1: (0, 1)}}
"""Some experts in two groups (layer 1, expert 1), one in none (layer 1, expert 3), and orders that are not sorted."""


def qwen3_vl_moe() -> Any:
    text = {
        "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "vocab_size": 32,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32,
        )
    )  # fmt: skip


def deepseek_v2() -> Any:
    return transformers.DeepseekV2ForCausalLM(
        transformers.DeepseekV2Config(
            hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=2, vocab_size=32,
            kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=0, topk_method="greedy", n_group=1, topk_group=1,
        )
    )  # fmt: skip


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32,
        )
    )  # fmt: skip


def gpt_oss() -> Any:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32,
        )
    )  # fmt: skip


FAMILIES: list[Callable[[], Any]] = [qwen3_vl_moe, qwen3_moe, deepseek_v2, mixtral, gpt_oss]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    found = {}
    for family in FAMILIES:
        model = family().to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.normal_()  # biases and norms too: zeros would hide a row in the wrong place
        found[family.__name__] = model
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(bits(left), bits(right))


def written(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def units(store: Path) -> tuple[dict[str, dict[str, torch.Tensor]], str | None]:
    cache = SnapshotCache(store)
    assert cache.refresh()
    assert cache.current is not None
    found = {label: load_bytes(unit.payload.read()) for label, unit in cache.current.units.items()}
    orientation = cache.current.orientation
    cache.close()
    return found, orientation


def check(folder: Path, store: Path, model: Any) -> str | None:
    publish(folder, store, block=1, version="a", experts=GROUPS)
    stored, orientation = units(store)
    source = written(folder)
    assert stored["full"].keys() == source.keys()
    assert all(same(stored["full"][name], source[name]) for name in source)
    # A checkpoint whose every expert comes from the slices: transformers must load the model from it that was saved.
    patched = {name: tensor.clone() for name, tensor in stored["full"].items()}
    for name in patched:
        if re.search(r"\.experts\.", name):
            patched[name].zero_()
    for group, layers in GROUPS.items():
        for name, tensor in stored[f"partial/{group}"].items():
            layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
            if re.search(r"\.experts\.\d+\.", name):
                patched[name] = tensor
            else:
                patched[name][list(layers[layer])] = tensor
    for name, tensor in stored["shared"].items():
        assert not re.search(r"\.experts\.", name)
        assert same(tensor, source[name])
    loaded = load_patched(folder, patched, type(model))
    original = model.state_dict()
    assert loaded.keys() == original.keys()
    for name, tensor in original.items():
        if ".experts." in name and ".layers.1." in name:
            assert same(loaded[name][:3], tensor[:3]), name  # expert 3 of layer 1 is in no group
            assert not loaded[name][3].any()
        else:
            assert same(loaded[name], tensor), name
    return orientation


def load_patched(folder: Path, tensors: dict[str, torch.Tensor], kind: Any) -> dict[str, torch.Tensor]:
    target = folder.with_name("patched")
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    model = kind.from_pretrained(target, dtype=torch.bfloat16)
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


@pytest.mark.parametrize("shard_size", ["5GB", "4KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("original", [True, False], ids=["original format", "own format"])
@pytest.mark.parametrize("family", [family.__name__ for family in FAMILIES])
def test_a_checkpoint_of_transformers(
    tmp_path: Path, models: dict[str, Any], family: str, original: bool, shard_size: str
) -> None:
    model = models[family]
    folder = tmp_path / "in"
    model.save_pretrained(folder, save_original_format=original, max_shard_size=shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (shard_size == "4KB")
    orientation = check(folder, tmp_path / "store", model)
    assert orientation == ("native" if family == "qwen3_vl_moe" else None)


def test_the_hubs_transposed_layout(tmp_path: Path, models: dict[str, Any]) -> None:
    model = models["qwen3_vl_moe"]
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    hub = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in written(tmp_path / "own").items()
    }
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(hub, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((tmp_path / "own/config.json").read_text())
    assert check(folder, tmp_path / "store", model) == "transposed"
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["hidden_size"] != 2 * config["text_config"]["moe_intermediate_size"]
