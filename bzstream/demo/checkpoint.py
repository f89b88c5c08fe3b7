"""Qwen3-VL-30B-A3B in small, made of noise: the format is real, the weights are not.

Names, shapes and dtypes are those of transformers' Qwen3-VL-MoE (fused experts, [experts, 2*intermediate, hidden] and
[experts, hidden, intermediate]), sharded with an index as `save_pretrained` writes them, without torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bzstream.tensorfile import arrange, build_head, tensor_bytes

__all__ = ["CONFIG", "write_checkpoint"]

CONFIG = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "vocab_size": 8192,
    },
    "vision_config": {"model_type": "qwen3_vl_moe", "depth": 0, "hidden_size": 256},
}
"""The keys that tell the layout; about 100 MB of bf16."""


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    text = CONFIG["text_config"]
    assert isinstance(text, dict)
    hidden, inner, experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    head, queries, keys = text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.language_model.embed_tokens.weight": (text["vocab_size"], hidden),
        "model.language_model.norm.weight": (hidden,),
        "lm_head.weight": (text["vocab_size"], hidden),
        "model.visual.patch_embed.proj.weight": (256, 3, 2, 16, 16),
        "model.visual.patch_embed.proj.bias": (256,),
    }
    for layer in range(text["num_hidden_layers"]):
        at = f"model.language_model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (queries * head, hidden),
            f"{at}.self_attn.k_proj.weight": (keys * head, hidden),
            f"{at}.self_attn.v_proj.weight": (keys * head, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, queries * head),
            f"{at}.self_attn.q_norm.weight": (head,),
            f"{at}.self_attn.k_norm.weight": (head,),
            f"{at}.mlp.gate.weight": (experts, hidden),
            f"{at}.mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
            f"{at}.mlp.experts.down_proj": (experts, hidden, inner),
        }
    return found


def write_checkpoint(folder: Path, shards: int = 4) -> tuple[int, int]:
    """Write the checkpoint into `folder`: (bytes of tensors, number of shards). Deterministic.

    The weights are bf16: noise of N(0, 0.02^2), cut from float32 to its upper half.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    generator = np.random.default_rng(0)
    everything = sorted(shapes().items())
    total = sum(tensor_bytes("BF16", shape) for _, shape in everything)
    parts: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in everything:
        if filled >= total / shards * len(parts):
            parts.append([])
        parts[-1].append((name, "BF16", shape))
        filled += tensor_bytes("BF16", shape)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = arrange(part)
        with (folder / file).open("wb") as stream:
            stream.write(build_head(tensors, {"format": "pt"}, align=8))
            for tensor in tensors:
                noise = generator.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)
                stream.write((noise.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                weight_map[tensor.name] = file
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total, len(parts)
