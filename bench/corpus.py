"""Versions of one small model as real training makes them, for `bench.coding`.

    python -m bench.corpus FOLDER [--quick]

How far weights shrink hangs on how they came to be, so noise with a guessed spread would prove little. A Qwen3-VL-MoE
with 9.4M expert parameters learns English bytes (the standard library's documentation) for 300 steps of AdamW and is
rounded to bf16: that is the version `start`. Miners go on from that rounding, each with a new optimizer, as a miner
does who has just fetched it: 10 and 50 steps at four learning rates, the data in another order for each. `outer` is
the round's result: the mean change of four miners after 50 steps at 1e-4, times 0.7 (the outer learning rate of
DiLoCo, arXiv:2311.08105), added to `start` and rounded again.

Each version is one file as a node serves it: a safetensors head, padded to 4096 bytes, and the expert tensors in bf16.
It takes three to six minutes on one core.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bzstream.tensorfile import arrange, build_head

__all__ = ["RATES", "make_corpus"]

RATES = ("1e-5", "1e-4", "3e-4", "1e-3")
"""Learning rates, as they appear in file names."""

FIRST_STEPS, FIRST_RATE = 300, 1e-3
SNAPSHOTS = (10, 50)
MINERS, OUTER_RATE, OUTER_FROM = 4, 0.7, "1e-4"
BATCH, WINDOW = 8, 128

CONFIG: Mapping[str, Any] = {
    "text_config": {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 192,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16,
        "num_experts_per_tok": 2, "max_position_embeddings": 512, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8],
                            "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 256,
        "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    },
    "image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
    "tie_word_embeddings": False,
}  # fmt: skip


def make_corpus(folder: Path, quick: bool = False) -> dict[str, Path]:
    """Train, unless `folder` already has the versions; the file of each version by its name. Needs torch."""
    scale, rates, miners = (10, RATES[:2], 2) if quick else (1, RATES, MINERS)
    names = ["start", "outer", *(f"{rate}-after-{steps}" for rate in rates for steps in SNAPSHOTS)]
    files = {name: folder / f"{name}.safetensors" for name in names}
    if all(file.exists() for file in files.values()):
        return files
    import torch
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3VLMoeConfig(**CONFIG)
    model = Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.train()
    for _ in _train(model, FIRST_RATE, FIRST_STEPS // scale, seed=0):
        pass
    start = {name: value.bfloat16() for name, value in model.state_dict().items()}
    _write(files["start"], start)
    change: dict[str, Any] = {name: torch.zeros(value.shape) for name, value in start.items()}
    runs = [(rate, seed) for seed, rate in enumerate(rates, 1)]
    runs += [(OUTER_FROM, len(rates) + miner) for miner in range(1, miners)]
    for number, (rate, seed) in enumerate(runs):
        model.load_state_dict(start)
        for step in _train(model, float(rate), SNAPSHOTS[-1] // scale, seed=seed):
            if step * scale in SNAPSHOTS and number < len(rates):
                _write(files[f"{rate}-after-{step * scale}"], model.state_dict())
        if rate == OUTER_FROM:
            for name, value in model.state_dict().items():
                change[name] += (value - start[name].float()) / miners
    _write(files["outer"], {name: value.float() + OUTER_RATE * change[name] for name, value in start.items()})
    return files


def _train(model: Any, rate: float, steps: int, *, seed: int) -> Iterator[int]:
    """AdamW on windows of English bytes; yields the number of steps done after each."""
    from pydoc_data import topics

    import torch

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    parameters = [value for name, value in model.named_parameters() if "visual" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(data) - WINDOW - 1, (BATCH,), generator=generator).tolist()
        tokens = torch.stack([data[at : at + WINDOW].long() for at in starts])
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield step


def _write(file: Path, state: Mapping[str, Any]) -> None:
    """The expert tensors of `state`, rounded to bf16, as one unit file."""
    import torch

    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items() if ".mlp.experts." in name}
    order = arrange((name, "BF16", tuple(value.shape)) for name, value in tensors.items())
    new = file.with_suffix(".new")
    with new.open("wb") as out:
        out.write(build_head(order, {"format": "pt"}))
        for tensor in order:
            out.write(tensors[tensor.name].view(torch.uint8).numpy().data)
    os.replace(new, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, half of the rates and miners")
    options = parser.parse_args()
    for name, file in make_corpus(options.folder, options.quick).items():
        print(f"{name:<20} {file.stat().st_size:>12,} bytes")


if __name__ == "__main__":
    main()
