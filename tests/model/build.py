"""Small checkpoints in every layout, made of random bytes, and what a correct store must hold of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3

from bzstream.model import SnapshotCache
from bzstream.payload import Payload
from bzstream.tensorfile import arrange, build_head, parse_head, tensor_bytes

Spec = tuple[str, tuple[int, ...]]
"""dtype, shape"""


def fused(
    layers: int = 2, experts: int = 4, hidden: int = 8, inner: int = 6, *, biases: bool = False, dtype: str = "BF16"
) -> dict[str, Spec]:
    """Qwen3-VL-MoE as transformers 5 holds it; with biases, the names of gpt-oss."""
    found: dict[str, Spec] = {
        "model.language_model.embed_tokens.weight": (dtype, (16, hidden)),
        "model.visual.blocks.0.mlp.linear_fc1.weight": (dtype, (4, 4)),
        "lm_head.weight": (dtype, (16, hidden)),
    }
    for layer in range(layers):
        at = f"model.language_model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (dtype, (hidden,)),
            f"{at}.mlp.gate.weight": (dtype, (experts, hidden)),
            f"{at}.mlp.experts.gate_up_proj": (dtype, (experts, 2 * inner, hidden)),
            f"{at}.mlp.experts.down_proj": (dtype, (experts, hidden, inner)),
        }
        if biases:
            found |= {
                f"{at}.mlp.experts.gate_up_proj_bias": (dtype, (experts, 2 * inner)),
                f"{at}.mlp.experts.down_proj_bias": (dtype, (experts, hidden)),
            }
    return found


def separate(
    layers: int = 2, experts: int = 4, hidden: int = 8, inner: int = 6, *, block: str = "mlp", dtype: str = "BF16"
) -> dict[str, Spec]:
    """Qwen3-MoE and DeepSeek, or with block "block_sparse_moe" Mixtral."""
    parts = ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, Spec] = {
        "model.embed_tokens.weight": (dtype, (16, hidden)),
        "model.norm.weight": (dtype, (hidden,)),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found[f"{at}.{block}.gate.weight"] = dtype, (experts, hidden)
        found[f"{at}.mlp.shared_experts.up_proj.weight"] = dtype, (inner, hidden)
        for expert in range(experts):
            for part in parts:
                shape = (hidden, inner) if part in ("down_proj", "w2") else (inner, hidden)
                found[f"{at}.{block}.experts.{expert}.{part}.weight"] = dtype, shape
    return found


def contents(specs: Mapping[str, Spec], seed: int = 0) -> dict[str, bytes]:
    """Random bytes for each tensor; a tensor's bytes depend on its name and the seed alone."""
    return {
        name: np.random.default_rng([seed, *name.encode()]).bytes(tensor_bytes(*spec)) for name, spec in specs.items()
    }


def write_file(path: Path, specs: Mapping[str, Spec], data: Mapping[str, bytes]) -> None:
    tensors = arrange((name, *spec) for name, spec in specs.items())
    path.write_bytes(build_head(tensors, {"format": "pt"}, align=8) + b"".join(data[t.name] for t in tensors))


def write_checkpoint(
    folder: Path,
    specs: Mapping[str, Spec],
    data: Mapping[str, bytes] | None = None,
    *,
    shards: int = 0,
    config: object = None,
) -> dict[str, bytes]:
    """Write a checkpoint folder, single-file or in shards; its tensors' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = contents(specs) if data is None else data
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    if not shards:
        write_file(folder / "model.safetensors", specs, data)
        return dict(data)
    names = sorted(specs)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        own = names[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_file(folder / file, {name: specs[name] for name in own}, data)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(map(len, data.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return dict(data)


SPLIT = {0: {0: (0, 1), 1: (0, 1)}, 1: {0: (2, 3), 1: (2, 3)}}
"""--groups 2 of two layers with four experts."""


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything under a folder: files with content, links with target."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


class Signer:
    """Signs nothing, and remembers what it was asked to."""

    ss58_address = "5Hotkey"

    def __init__(self) -> None:
        self.signed: list[dict[str, object]] = []

    def sign_fields(self, fields: Mapping[str, object]) -> str:
        self.signed.append(dict(fields))
        return f"signature of {fields['unit']}"


def tensors_of(payload: Payload) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes) of a unit, through the strict parser."""
    raw = payload.read()
    head = parse_head(raw, len(raw), max_head=1 << 26)
    assert head.data_start % 4096 == 0
    return {t.name: (t.dtype, t.shape, raw[head.data_start + t.start : head.data_start + t.end]) for t in head.tensors}


def check_store(
    store: Path,
    specs: Mapping[str, Spec],
    data: Mapping[str, bytes],
    experts: Mapping[int, Mapping[int, tuple[int, ...]]],
) -> None:
    """Every unit of the store's current snapshot is exactly what specs, bytes and map ask for, worked out naively."""
    cache = SnapshotCache(store)
    assert cache.refresh()
    try:
        snapshot = cache.current
        assert snapshot is not None
        assert cache.damaged == []
        for unit in snapshot.units.values():
            raw = unit.payload.read()
            assert len(raw) == unit.size == len(unit.payload)
            assert unit.content_hash == "sha256:" + hashlib.sha256(raw).hexdigest()
            step = 8 * 1024 * 1024
            assert list(unit.chunks) == [blake3(raw[n : n + step]).hexdigest() for n in range(0, len(raw), step)]
        assert tensors_of(snapshot.full.payload) == {name: (*spec, data[name]) for name, spec in specs.items()}
        belongs = {name: _place(name) for name in specs}
        shared = {name: (*specs[name], data[name]) for name, place in belongs.items() if place is None}
        assert tensors_of(snapshot.shared.payload) == shared
        assert snapshot.groups == tuple(sorted(experts))
        for group, layers in experts.items():
            wanted: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
            for name, place in belongs.items():
                if place is None:
                    continue
                layer, expert = place
                dtype, shape = specs[name]
                if expert is not None:
                    if expert in layers[layer]:
                        wanted[name] = dtype, shape, data[name]
                    continue
                row = len(data[name]) // shape[0]
                rows = b"".join(data[name][row * index : row * (index + 1)] for index in layers[layer])
                wanted[name] = dtype, (len(layers[layer]), *shape[1:]), rows
            partial = snapshot.partial(group)
            assert partial is not None
            assert tensors_of(partial.payload) == wanted
            assert {layer: tuple(rows) for layer, rows in partial.experts.items()} == dict(layers)
    finally:
        cache.close()


def _place(name: str) -> tuple[int, int | None] | None:
    """Layer and expert by the plainest reading of a test's own names."""
    parts = name.split(".")
    if "experts" not in parts or "mtp" in parts:
        return None
    at = parts.index("experts")
    layer = int(parts[parts.index("layers") + 1])
    return layer, int(parts[at + 1]) if parts[at + 1].isdigit() else None
