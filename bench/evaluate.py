"""From a submitted file to its loss: the resident model beside `deepcopy` and `load_state_dict`.

The usual way to score a submission copies the whole model, loads the submission's tensors into the copy, runs it and
throws it away. bzstream keeps one model and exchanges the submission's slice with it. Both get the same file, the same
model, the same windows, and end with the same loss, which is checked. What bzstream does beside (checking the file
in a process of its own, hashing its weights, the sketch that tells copies, restoring the baseline) is timed too.

    python -m bench.evaluate [--quick] [--device cuda:0] [--json FILE]

`--quick` takes a model of 0.3 GB instead of 2.2 GB. Peak memory is measured on the CPU, above what the process needs
without a model, each side in a process of its own. On a GPU the swap is compared with what the bus allows, and the
time between two submissions that the GPU does not score is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.command import command
from bench.rows import row_of

__all__ = ["measure"]

LARGE = {"hidden": 1024, "inner": 512, "layers": 11, "experts": 64}
SMALL = {"hidden": 512, "inner": 256, "layers": 6, "experts": 64}
GROUPS = 16
"""As in Qwen3-VL-30B-A3B: a slice is a sixteenth of the experts."""
WINDOWS, TOKENS = 1, 32
"""Short windows: the forward pass is the same on both sides and would only hide the difference."""
ROUNDS, QUICK_ROUNDS = 5, 2


def measure(quick: bool, device: str = "cpu") -> dict[str, Any]:
    """Rows."""
    place = Path(tempfile.mkdtemp(prefix="bzstream-bench-evaluate-"))
    try:
        _side("make", place, quick, device)
        ours = _side("resident", place, quick, device)
        theirs = _side("deepcopy", place, quick, device)
    finally:
        shutil.rmtree(place)
    assert abs(ours["loss"] - theirs["loss"]) <= 1e-3 * abs(theirs["loss"]), "the two sides do not score the same"
    gigabyte = 1e9
    model, piece = ours["model_bytes"], ours["slice_bytes"]
    rows = [
        _row("model", model / gigabyte, "GB", f"slice {piece / 1e6:.0f} MB, {WINDOWS} window of {TOKENS} tokens"),
        _row("deepcopy + load_state_dict, file to loss", theirs["file_to_loss"], "s"),
        _row("resident, file to loss", ours["file_to_loss"], "s", "checked, staged, put on, run"),
        _row("ratio", theirs["file_to_loss"] / ours["file_to_loss"], "x", target="" if quick else ">= 5"),
        _row("resident, everything", ours["everything"], "s", "and sketched and taken off: ready for the next"),
        *[_row(f"of it: {name}", value, "s") for name, value in ours["steps"].items()],
    ]
    if device == "cpu":
        limit = model + 3 * piece
        rows += [
            _row("deepcopy, peak memory", theirs["peak"] / gigabyte, "GB"),
            _row(
                "resident, peak memory",
                ours["peak"] / gigabyte,
                "GB",
                target="" if quick else f"< {limit / gigabyte:.2f}",
            ),
        ]
    else:
        rows += [
            _row("host to device, pinned", ours["bandwidth"] / gigabyte, "GB/s"),
            _row("slice / bandwidth", piece / ours["bandwidth"], "s", "what the bus alone would take"),
            _row("model not scoring between two submissions", ours["idle"], "s", "the next one was staged meanwhile"),
        ]
    return {"rows": rows}


def _row(name: str, value: float, unit: str, note: str = "", target: str = "") -> dict[str, Any]:
    more: dict[str, Any] = {"note": note} if note else {}
    return row_of(name, unit, [value], target=target, **more)


def _side(name: str, place: Path, quick: bool, device: str) -> dict[str, Any]:
    """Run one side in a process of its own, so that neither inherits the other's memory."""
    words = [sys.executable, "-m", "bench.evaluate", "--side", name, "--place", str(place), "--device", device]
    result = subprocess.run([*words, *["--quick"] * quick], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _config(quick: bool) -> Any:
    from transformers import Qwen3MoeConfig

    size = SMALL if quick else LARGE
    return Qwen3MoeConfig(
        hidden_size=size["hidden"], moe_intermediate_size=size["inner"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_experts=size["experts"], num_experts_per_tok=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, vocab_size=1024, dtype="bfloat16",
    )  # fmt: skip


def make(place: Path, quick: bool, device: str) -> dict[str, Any]:
    """A checkpoint of noise, published, and a submission for group 1."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from bzstream.model import publish

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM._from_config(_config(quick), dtype=torch.bfloat16)
    model.save_pretrained(place / "checkpoint", save_original_format=False, max_shard_size="500MB")
    del model
    publish(place / "checkpoint", place / "store", block=1, version="a", groups=GROUPS)
    shutil.rmtree(place / "checkpoint")
    tensors = load_file(place / "store" / "current" / "group-1.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, place / "submission.safetensors")
    return {}


def resident(place: Path, quick: bool, device: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from bzstream.evaluation.baseline import BaselineModel
    from bzstream.evaluation.reading.sandbox import Reader
    from bzstream.evaluation.scoring.module import prepare_torch
    from bzstream.evaluation.scoring.resident_model import ResidentModel
    from bzstream.model import open_snapshot

    prepare_torch()
    windows = np.arange(WINDOWS * TOKENS, dtype=np.int64).reshape(WINDOWS, TOKENS)
    published = BaselineModel(open_snapshot(place / "store" / "snapshots" / "a"))
    part, bound = published.group(1), published.value_bound(1)
    reader = Reader(memory=512 << 20, timeout=60)
    before = _start_peak()
    model = ResidentModel(published, device=device)
    model.window_losses(windows, batch=WINDOWS)
    fd = os.open(place / "submission.safetensors", os.O_RDONLY)
    size = os.fstat(fd).st_size
    times: dict[str, list[float]] = {}
    totals, wholes, loss = [], [], 0.0

    def timed(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        _synchronize(device)
        began = time.perf_counter()
        result = step(*arguments)
        _synchronize(device)
        times.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        reader.warm_up()
        time.sleep(1.0)  # the evaluator, too, has the next reading process started ahead
        began = time.perf_counter()
        locations = timed("check the file (own process)", reader.read, fd, size, part.specs, bound)
        staged = timed("stage and hash", model.stage, fd, locations, 1)
        swapped_in = model.swapped_in(staged)
        timed("put on", swapped_in.__enter__)
        loss = timed("run", lambda: model.window_losses(windows, batch=WINDOWS))[0]
        totals.append(time.perf_counter() - began)
        timed("take off", swapped_in.__exit__, None, None, None)
        timed("sketch", model.sketch, staged, "00" * 32)
        wholes.append(time.perf_counter() - began)
        staged.close()
    assert model.differing() == []
    steps = {name: statistics.median(values) for name, values in times.items()}
    found = {
        "file_to_loss": statistics.median(totals),
        "everything": statistics.median(wholes),
        "steps": steps,
        "loss": loss,
        "peak": _end_peak(before),
        "model_bytes": published.full.nbytes,
        "slice_bytes": part.nbytes,
        "idle": steps["put on"] + steps["take off"] + steps["sketch"],
    }
    if device != "cpu":
        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        there.copy_(host)
        timed("bus", lambda: there.copy_(host, non_blocking=True))
        found["bandwidth"] = (1 << 30) / times["bus"][0]
    reader.close()
    return found


def deepcopy(place: Path, quick: bool, device: str) -> dict[str, Any]:
    import copy

    import numpy as np
    import torch
    from safetensors.torch import load_file

    from bzstream.evaluation.baseline import BaselineModel
    from bzstream.evaluation.scoring.module import prepare_torch
    from bzstream.evaluation.scoring.resident_model import ResidentModel
    from bzstream.model import open_snapshot

    prepare_torch()
    windows = np.arange(WINDOWS * TOKENS, dtype=np.int64).reshape(WINDOWS, TOKENS)
    published = BaselineModel(open_snapshot(place / "store" / "snapshots" / "a"))
    rows = {layer: list(indices) for layer, indices in (published.group(1).rows or {}).items()}
    before = _start_peak()
    base = ResidentModel(published, device=device)  # loads the model; what follows is the usual way
    base.window_losses(windows, batch=WINDOWS)
    totals, loss = [], 0.0
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        began = time.perf_counter()
        submitted = load_file(place / "submission.safetensors")
        candidate = copy.deepcopy(base.module)
        state = candidate.state_dict()
        for name, tensor in submitted.items():
            state[name][rows[int(name.split(".")[2])]] = tensor.to(device)
        candidate.load_state_dict(state)
        with torch.inference_mode():
            tokens = torch.from_numpy(windows).to(device)
            logits = candidate(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            loss = float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        totals.append(time.perf_counter() - began)
        del candidate, state, submitted
    return {"file_to_loss": statistics.median(totals), "loss": loss, "peak": _end_peak(before)}


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def _start_peak() -> int:
    """Reset the kernel's high-water mark of this process's memory; bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _end_peak(before: int) -> int:
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", default="cpu")

    if "--side" not in sys.argv:
        command("evaluate", __doc__, measure, options)
        return
    parser = argparse.ArgumentParser()
    options(parser)
    parser.add_argument("--side", choices=["make", "resident", "deepcopy"])
    parser.add_argument("--place", type=Path)
    parser.add_argument("--quick", action="store_true")
    own = parser.parse_args()
    side = {"make": make, "resident": resident, "deepcopy": deepcopy}[own.side]
    print(json.dumps(side(own.place, own.quick, own.device)))


if __name__ == "__main__":
    main()
