"""Publishing beside `cp` and `sha256sum`: speed, memory, bytes written, and what a small change costs.

    python -m bench.publish [--quick] [--json FILE] [--folder DIR]

`cp` copies the same files and syncs; `sha256sum` hashes them, one process a core, and syncs. bzstream does more than
both together (it slices, hashes everything twice, once as units and once as the full model, and syncs) and is measured
against the slower of the two. The three take turns, each from a warm page cache, and the median of the turns counts.
Memory is the peak resident size of the publishing process, at two sizes of model.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import command
from bench.rows import row_of
from bzstream.tensorfile import arrange, build_head, tensor_bytes

__all__ = ["measure"]

LAYER_EXPERTS, HIDDEN, INNER, GROUPS = 32, 2048, 768, 8
"""Of Qwen3-VL-30B-A3B, with fewer experts: one layer is 302 MB of bf16."""

LAYER_BYTES = LAYER_EXPERTS * 3 * HIDDEN * INNER * 2


def write_model(folder: Path, layers: int) -> int:
    """A sharded checkpoint of noise, one shard a layer; its size in bytes."""
    folder.mkdir(parents=True)
    text = {"num_experts": LAYER_EXPERTS, "hidden_size": HIDDEN, "moe_intermediate_size": INNER}
    config = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", **text}}
    (folder / "config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(layers):
        at = f"model.language_model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.mlp.experts.gate_up_proj": (LAYER_EXPERTS, 2 * INNER, HIDDEN),
            f"{at}.mlp.experts.down_proj": (LAYER_EXPERTS, HIDDEN, INNER),
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate.weight": (LAYER_EXPERTS, HIDDEN),
            f"{at}.input_layernorm.weight": (HIDDEN,),
        }
        tensors = arrange((name, "BF16", shape) for name, shape in shapes.items())
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(build_head(tensors, {"format": "pt"}, align=8))
            for tensor in tensors:
                left = tensor_bytes("BF16", tensor.shape)
                total += left
                while left:
                    out.write(noise.bytes(min(left, 1 << 24)))
                    left -= min(left, 1 << 24)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def timed(command: list[str], folder: Path) -> float:
    """Seconds of a command and of the sync of what it wrote. The disk is quiet before."""
    os.sync()
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["sync", "-f", str(folder)], check=True)
    return time.perf_counter() - began


def measure_cp(source: Path, work: Path) -> float:
    target = work / "copy"
    seconds = timed(["cp", "-r", str(source), str(target)], work)
    shutil.rmtree(target)
    return seconds


def measure_sha256sum(source: Path, work: Path) -> float:
    cores = len(os.sched_getaffinity(0))
    files = [str(path) for path in sorted(source.glob("*.safetensors"))]
    return timed(["sh", "-c", f'printf "%s\\0" "$@" | xargs -0 -n 1 -P {cores} sha256sum', "sh", *files], work)


PROGRAM = """
import json, re, sys
from pathlib import Path
from bzstream.model import publish
report = publish(Path(sys.argv[1]), Path(sys.argv[2]), block=1, version=sys.argv[3], groups=int(sys.argv[4]))
status = Path("/proc/self/status").read_text()
print(json.dumps({"peak": int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024, **report.as_dict()}))
"""


def publish(source: Path, store: Path, version: str) -> tuple[float, dict[str, Any]]:
    """Seconds, with start of the interpreter and final sync, and the report with the process's peak memory."""
    os.sync()
    began = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, str(source), str(store), version, str(GROUPS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    subprocess.run(["sync", "-f", str(store)], check=True)
    return time.perf_counter() - began, json.loads(done.stdout)


def change_one_expert(source: Path) -> None:
    """Overwrite some bytes of expert 0, which belongs to group 0, in the first layer."""
    from bzstream.tensorfile import read_head

    with sorted(source.glob("*.safetensors"))[0].open("r+b") as file:
        head = read_head(file.fileno())
        tensor = next(tensor for tensor in head.tensors if tensor.name.endswith("gate_up_proj"))
        file.seek(head.data_start + tensor.start)
        file.write(os.urandom(4096))


def stored(store: Path) -> int:
    """Bytes of all files in the store, each inode once."""
    files = {(s := os.stat(path)).st_ino: s.st_size for path in store.rglob("*") if path.is_file()}
    return sum(files.values())


def measure(quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """Rows. `folder`: on the disk to measure."""
    sizes = (0.3e9,) if quick else (1.2e9, 4.6e9)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-", dir=folder) as name:
        work = Path(name)
        for size in sizes:
            layers = max(1, round(size / LAYER_BYTES))
            source = work / f"model-{layers}"
            total = write_model(source, layers)
            label = f"{total / 1e9:.1f} GB"
            turns: dict[str, list[float]] = {"cp": [], "sha256sum": [], "bzstream": []}
            for turn in range(1 if quick else 3):
                turns["cp"].append(measure_cp(source, work))
                turns["sha256sum"].append(measure_sha256sum(source, work))
                shutil.rmtree(work / "store", ignore_errors=True)
                seconds, report = publish(source, work / "store", f"turn-{turn}")
                turns["bzstream"].append(seconds)
            speed = {tool: total / 1e9 / statistics.median(times) for tool, times in turns.items()}
            slower = min(speed["cp"], speed["sha256sum"])
            rows += [row_of(f"{tool}, {label}", "GB/s", [value]) for tool, value in speed.items()]
            ratio = speed["bzstream"] / slower
            rows += [
                row_of(f"publish / slower of cp and sha256sum, {label}", "x", [ratio], target=">= 0.9"),
                row_of(f"peak memory, {label}", "MiB", [report["peak"] / 2**20], target="< 300"),
                row_of(f"bytes written / model, {label}", "x", [stored(work / "store") / total], target="<= 1.01"),
            ]
            change_one_expert(source)
            before = stored(work / "store")
            seconds, report = publish(source, work / "store", "changed")
            changed = [unit["unit"] for unit in report["units"] if unit["file"] and not unit["linked"]]
            grown = (stored(work / "store") - before) / total
            alone = changed == ["partial/0"]
            changes = row_of(f"one group of {GROUPS} changed: written, {label}", "x", [grown], target="only its file")
            rows.append({**changes, "met": alone})
            rows.append(row_of(f"one group of {GROUPS} changed, {label}", "GB/s", [total / 1e9 / seconds]))
            shutil.rmtree(work / "store")
            shutil.rmtree(source)
    return {"rows": rows}


def main() -> None:
    command(
        "publish",
        __doc__,
        measure,
        lambda parser: parser.add_argument("--folder", type=Path, help="where to work: the disk to measure"),
    )


if __name__ == "__main__":
    main()
