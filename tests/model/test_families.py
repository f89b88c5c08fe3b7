"""Checkpoints that transformers itself writes, of every mixture-of-experts family that it builds from a config.

For each: the units put together are the files that were written, bit for bit; and a checkpoint that holds one group's
slice, with zeros for all other experts, is loaded by transformers with exactly that group's experts.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from bzstream.model import BadCheckpoint, SnapshotCache, publish
from tests.seeds import LONG

from .families import EXPERTS, bits, build

USUAL = (
    "qwen3_vl_moe", "qwen3_moe", "deepseek_v2", "mixtral", "gpt_oss", "gemma4", "llama4_text", "nemotron_h",
    "granitemoe", "step3p7",
)  # fmt: skip
"""One of each way to name experts: tried always. The others are tried by the long tests."""

MORE = (
    "afmoe", "aria", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "diffusion_gemma", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "flint", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text",
    "inkling_text", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "longcat_flash", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mistral_large4", "muse_spark_text", "olmoe",
    "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_next", "qwen3_omni_moe_thinker", "qwen4_exp",
    "solar_open", "unlimited_ocr", "zaya",
)  # fmt: skip

REFUSED = {
    "ernie4_5_vl_moe": "text_moe",
    "jetmoe": "self_attention",
    "nllb-moe": "expert_0",
    "switch_transformers": "expert_0",
}
"""Families that cannot be sliced, and what stands in the name that the error quotes. docs/families.md says why."""

GROUPS: dict[int, tuple[int, ...]] = {2: (3, 0), 0: (1, 2)}
"""The groups' experts, the same in every layer, not sorted."""

model_of = cache(build)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(bits(left), bits(right))


def written(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def published(folder: Path, store: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[int, int], str | None]:
    """Publish and read back: each unit's tensors, the layers with their number of experts, and the orientation."""
    publish(folder, store, block=1, version="a", groups=1)
    cache = SnapshotCache(store)
    assert cache.refresh()
    assert cache.current is not None
    layers = dict(cache.current.layers)
    publish(folder, store, block=2, version="b", experts={g: dict.fromkeys(layers, rows) for g, rows in GROUPS.items()})
    assert cache.refresh()
    units = {label: load_bytes(unit.payload.read()) for label, unit in cache.current.units.items()}
    orientation = cache.current.orientation
    cache.close()
    return units, layers, orientation


def put_back(target: dict[str, torch.Tensor], unit: dict[str, torch.Tensor], rows: tuple[int, ...]) -> None:
    """Put a slice's tensors where they came from: whole ones by name, rows of fused ones by original index."""
    for name, tensor in unit.items():
        if tensor.shape == target[name].shape:
            target[name] = tensor
        else:
            target[name][list(rows)] = tensor


def load_with(folder: Path, tensors: dict[str, torch.Tensor], kind: Any, place: Path) -> dict[str, torch.Tensor]:
    """What transformers holds after loading the checkpoint in `folder` with these tensors instead of its own."""
    place.mkdir()
    (place / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    found: dict[str, torch.Tensor] = kind.from_pretrained(place, dtype=torch.bfloat16).state_dict()
    return found


def check(folder: Path, place: Path, model: Any) -> str | None:
    units, layers, orientation = published(folder, place / "store")
    source = written(folder)
    assert set(layers.values()) == {EXPERTS}
    assert units["full"].keys() == source.keys()
    assert all(same(units["full"][name], source[name]) for name in source)
    whole = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    put_back(whole, units["shared"], ())
    one = {name: tensor.clone() for name, tensor in whole.items()}
    for group, rows in GROUPS.items():
        assert units[f"partial/{group}"]
        put_back(whole, units[f"partial/{group}"], rows)
    assert all(same(whole[name], source[name]) for name in source)
    put_back(one, units["partial/2"], GROUPS[2])
    wanted = load_with(folder, source, type(model), place / "whole")
    loaded = load_with(folder, one, type(model), place / "one")
    assert loaded.keys() == wanted.keys()
    mine, others = list(GROUPS[2]), list(GROUPS[0])
    sliced = 0
    for name, tensor in wanted.items():
        if same(loaded[name], tensor):
            continue
        sliced += 1
        assert "experts" in name.split("."), name
        assert same(loaded[name][mine], tensor[mine]), name
        assert not loaded[name][others].any(), name
        assert tensor[others].any()
    assert sliced >= 2 * len(layers)
    return orientation


@pytest.mark.parametrize("original", [True, False], ids=["original format", "own format"])
@pytest.mark.parametrize("family", (*USUAL, *MORE) if LONG else USUAL)
def test_a_checkpoint_of_transformers(tmp_path: Path, family: str, original: bool) -> None:
    model = model_of(family)
    folder = tmp_path / "in"
    # Sharded in one of the two formats, in one file in the other.
    model.save_pretrained(folder, save_original_format=original, max_shard_size="4KB" if original else "5GB")
    orientation = check(folder, tmp_path, model)
    assert orientation == ("native" if family == "qwen3_vl_moe" else None)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_sliced_is_refused_by_name(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path / "in", save_original_format=False)
    with pytest.raises(BadCheckpoint, match=re.escape(REFUSED[family])):
        publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(not LONG, reason="reads the source of every model of transformers")
def test_every_family_of_transformers_is_in_a_list() -> None:
    """A release with new families is noticed: each must be tried, or stand in docs/families.md with a reason."""
    listed = Path("docs/families.md").read_text(encoding="utf-8")
    models = Path(transformers.__file__).parent / "models"
    for folder in sorted(models.iterdir()):
        text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))
        if re.search(r"class \w+Experts\(|self\.experts = ", text):
            assert f"`{folder.name}`" in listed, f"the family {folder.name} is not in docs/families.md"


def test_the_hubs_transposed_layout(tmp_path: Path) -> None:
    model = model_of("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    hub = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in written(tmp_path / "own").items()
    }
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(hub, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((tmp_path / "own/config.json").read_text())
    assert check(folder, tmp_path, model) == "transposed"
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["hidden_size"] != 2 * config["text_config"]["moe_intermediate_size"]
