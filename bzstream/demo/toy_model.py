"""A mixture-of-experts model small enough to train while somebody watches, for `demo` and the tests.

A Qwen3-VL-MoE of some 0.4M parameters learns English bytes from the standard library's own documentation
(`pydoc_data.topics`) in a few seconds on one core. It has everything that the real one has: fused experts, a router, a
vision tower that text never touches, tied to nothing, in several shards. `improve` then trains one group's experts on,
which is what a miner does; `forge` makes the files that a cheat would send.

Needs torch and transformers; nothing here is imported before a function is called.
"""

from __future__ import annotations

import json
import pickle
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bzstream.errors import BzstreamError

__all__ = ["ToyError", "corpus", "forge_copy", "forge_nan", "forge_pickle_bomb", "improve", "train_toy"]

CONFIG: Mapping[str, Any] = {
    "text_config": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16,
        "num_experts_per_tok": 2, "max_position_embeddings": 512, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                            "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    },
    "image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Bytes are tokens; hidden size and twice the experts' width differ, so that no transposed slice can pass unnoticed."""


class ToyError(BzstreamError):
    """The toy model needs libraries that are not installed."""


def _torch() -> Any:
    try:
        import torch
        import transformers
    except ImportError:
        raise ToyError("this needs torch and transformers; install bzstream[validator]") from None
    transformers.utils.logging.disable_progress_bar()
    return torch


def corpus() -> bytes:
    """Half a megabyte of English, the same on every machine with this Python."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()


def train_toy(folder: Path, *, seconds: float = 5.0, steps: int | None = None, seed: int = 0) -> float:
    """Train the toy and save it into `folder` as transformers does, in several shards; its last training loss.

    Stops after `steps`, if given, else after `seconds`. Raises ToyError without torch or transformers.
    """
    torch = _torch()
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(seed)
    config = Qwen3VLMoeConfig(**CONFIG)
    model = Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=torch.float32)
    loss = _train(model, [p for n, p in model.named_parameters() if "visual" not in n], seconds, steps, seed, rate=3e-3)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, max_shard_size="300KB")
    return loss


def improve(
    checkpoint: Path, slice_file: Path, out: Path, *, seconds: float = 3.0, steps: int | None = None, seed: int = 1
) -> float:
    """Train only the experts of the slice in `slice_file` (as `pull` wrote it) and write them to `out`.

    `checkpoint`: the folder that `train_toy` saved. `out` ends in `.safetensors` or `.pt`. Gives the last loss.
    """
    torch = _torch()
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import Qwen3VLMoeForConditionalGeneration

    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with safe_open(slice_file, "pt") as file:
        rows = {int(layer): indices for layer, indices in json.loads(file.metadata()["experts"]).items()}
        published = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    parameters = dict(model.named_parameters())
    mine = {name: rows[int(name.split(".layers.")[1].split(".")[0])] for name in published}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in mine)
        if name in mine:
            keep = torch.zeros(parameter.shape[0], *[1] * (parameter.dim() - 1))
            keep[mine[name]] = 1
            parameter.register_hook(lambda gradient, keep=keep: gradient * keep)
    loss = _train(model, [parameters[name] for name in mine], seconds, steps, seed, rate=1e-3)
    tensors = {}
    for name, before in published.items():
        own = parameters[name].detach()[mine[name]]
        own = own if own.shape == before.shape else own.transpose(1, 2)
        tensors[name] = own.to(before.dtype).contiguous()
    if out.suffix == ".pt":
        torch.save(tensors, out)
    else:
        save_file(tensors, out)
    return loss


def _train(model: Any, parameters: list[Any], seconds: float, steps: int | None, seed: int, *, rate: float) -> float:
    torch = _torch()
    data = torch.frombuffer(bytearray(corpus()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    until = time.monotonic() + seconds
    step, loss = 0, float("nan")
    while step < steps if steps is not None else time.monotonic() < until:
        starts = torch.randint(0, len(data) - 129, (8,), generator=generator).tolist()
        tokens = torch.stack([data[s : s + 128].long() for s in starts])
        logits = model(input_ids=tokens, use_cache=False).logits
        found = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256).float(), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss = float(found.detach())
        step += 1
    return loss


def forge_copy(original: Path, out: Path, *, noise: float = 0.0) -> None:
    """Another miner's file, word for word or with a little noise on every weight (relative to its size)."""
    torch = _torch()
    from safetensors.torch import load_file, save_file

    tensors = torch.load(original, weights_only=True) if original.suffix == ".pt" else load_file(original)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        wide = tensor.float()
        shake = torch.randn(wide.shape, generator=generator) * noise
        tensors[name] = (wide * (1 + shake)).to(tensor.dtype)
    save_file(tensors, out)


def forge_nan(original: Path, out: Path) -> None:
    """A file whose every weight is fine but one."""
    _torch()
    from safetensors.torch import load_file, save_file

    tensors = load_file(original)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, out)


class _Bomb:
    """Unpickled by a trusting reader, it writes a file that says so."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.evidence)!r}, 'w').write('the reader ran my code')",)


def forge_pickle_bomb(out: Path, evidence: Path) -> None:
    """A `.pt` file that runs code in whoever unpickles it: it would create the file `evidence`."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weights": _Bomb(evidence)}, protocol=2))
        archive.writestr("archive/version", b"3\n")
