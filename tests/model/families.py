"""Tiny random models of the mixture-of-experts families that the installed transformers knows, from its own configs.

`build(family)` shrinks a family's default config, fills a model of it with random numbers and returns it. A family is
the `model_type` of its config; the model is the one that transformers would load for text generation.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

__all__ = ["EXPERTS", "bits", "build"]

EXPERTS = 4

SMALL = {
    "hidden_size": 16, "d_model": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "ffn_dim": 24, "d_ff": 24,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12, "expert_ffn_hidden_size": 12, "ffn_hidden_size": 24,
    "dense_intermediate_size": 24, "shared_intermediate_size": 24, "moe_latent_size": 16, "moe_hidden_size": 16,
    "num_hidden_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "n_layers": 2, "depth": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_heads": 2, "n_heads": 2, "head_dim": 8, "d_kv": 8, "v_head_dim": 8,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "zero_expert_num": 0, "num_experts_per_tok": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "num_dense_layers": 0,
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    "image_size": 28, "patch_size": 14, "out_hidden_size": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64, "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 8,
    "mamba_d_state": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "global_head_dim": 8,
    "num_global_key_value_heads": 2,
}  # fmt: skip
"""Sizes by the names that configs give them; a config's own value stays where it is smaller."""

MORE: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "diffusion_gemma": {"text_config": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 12}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [12, 12], "mlp_layer_types": ["sparse", "sparse"], "hidden_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 8]}, "head_dim": 32,
        }
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "text_config": {
            "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 12,
        }
    },
    "gemma4_text": {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 12},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 8},
    "inkling2": {"vision_config": {"text_hidden_size": 16}},
    "laguna": {"num_attention_heads_per_layer": [2, 2]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mixtral": {"intermediate_size": 12},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1]}},
    "nemotron_h": {"layers_block_type": ["full_attention", "moe"]},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "linear_attention"]}},
}  # fmt: skip
"""What a family's default config lacks or has no room for in two layers."""

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "moe_layer_freq")
"""Settings that hold one value a layer; the last ones are kept, as first layers are often dense."""

CLASSES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)  # fmt: skip


def build(family: str, seed: int = 0) -> Any:
    """A model of the family in bfloat16, every number that is stored in a checkpoint random."""
    kind = transformers.CONFIG_MAPPING[family]
    settings = small(kind().to_dict())
    for name, value in MORE.get(family, {}).items():
        settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
    config = kind.from_dict(settings)
    classes = [getattr(transformers, name)[kind] for name in CLASSES if kind in getattr(transformers, name)]
    chosen = classes[0][0] if isinstance(classes[0], (tuple, list)) else classes[0]
    torch.manual_seed(seed)
    model = chosen(config)
    stored = model.state_dict(keep_vars=True).values()  # not what is computed, such as rotary frequencies
    for tensor in (*model.parameters(), *stored):
        if tensor.is_floating_point():
            # Biases and norms too: zeros would hide a row in the wrong place.
            tensor.data = tensor.data.bfloat16().normal_()
    return model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: equal for NaN and for zeros of the same sign alone."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary with its sizes cut, in nested configs too."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("per_layer_config", "transformers_version"):
            continue
        if isinstance(value, dict):
            found[name] = small(value) if name.endswith("_config") else value
        elif type(value) is int and name in SMALL:
            found[name] = min(value, SMALL[name])
        elif isinstance(value, list) and name in LISTS:
            found[name] = value[-SMALL["num_hidden_layers"] :]
        else:
            found[name] = value
    return found
