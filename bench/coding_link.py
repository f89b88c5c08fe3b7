"""What coded chunks bring a pull: over a link of 100 Mbit/s, and on loopback, where they must not cost anything.

    python -m bench.coding_link [--quick] [--json FILE] [--corpus FOLDER]

The slice is made of two versions of `bench.corpus` (real training; the second is the first after an outer step), its
layers repeated to 90 MB, and coded before. Over the link (network namespaces, 20 ms round trip, no loss) one pull of
each kind is made in turn: `--coding off`; `auto` into an empty folder; and `auto` into a folder that has the version
before, which then comes as a difference. bzstream is run as the command, and the clock runs until the file is durable.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.alone import HOTKEY
from bench.command import command
from bench.corpus import make_corpus
from bench.native import MissingPeer
from bench.pull import environment, node
from bench.rows import row_of
from bench.wan import wide_area
from bzstream.model import publish_state_dict
from bzstream.model.encode_units import encode_current
from bzstream.model.store import Store
from bzstream.tensorfile import parse_head
from bzstream.util.statistics import quantile

__all__ = ["measure"]

ROUND_TRIP_MS, BITS = 20.0, 1e8
REPEATED = 5
ROUNDS = 3
PLAIN, FRESH, NEXT = "plain", "coded, first version", "coded, next version"
CONFIG = {
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "model_type": "qwen3_vl_moe_text", "num_experts": 16, "hidden_size": 256, "moe_intermediate_size": 192,
    },
}  # fmt: skip


def measure(quick: bool = False, corpus: Path | None = None) -> dict[str, Any]:
    """The rows, and why the link is missing where it is."""
    missing: list[str] = []
    notes = ""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as temporary:
        work = Path(temporary)
        versions = make_corpus(corpus or work / "corpus", quick)
        for name in ("start", "outer"):
            tensors = repeated(versions[name])
            publish_state_dict(tensors, CONFIG, work / "store", block=0, version=name, groups=1)
            encode_current(Store(work / "store"), bases=1)
        rounds = 1 if quick else ROUNDS
        try:
            with (
                wide_area(round_trip_ms=ROUND_TRIP_MS, loss=0.0, bits_per_second=BITS) as link,
                node(work, link.address, link.server) as (url, _),
            ):
                notes = f"the link: {link.how}"
                rows += over_link(work, url, list(link.client), rounds)
        except MissingPeer as error:
            missing.append(str(error))
        with node(work) as (url, _):
            rows += on_loopback(work, url, rounds if quick else 3 * rounds)
    return {"rows": rows, "missing": missing, "notes": notes}


def repeated(file: Path) -> dict[str, Any]:
    """The tensors of a version, its layers several times over."""
    raw = file.read_bytes()
    head = parse_head(raw, len(raw))
    found = {}
    for tensor in head.tensors:
        data = np.frombuffer(raw[head.data_start + tensor.start : head.data_start + tensor.end], np.int16)
        # As bfloat16, which numpy lacks: other elements of two bytes are coded byte by byte.
        value = torch.from_numpy(data.copy()).view(torch.bfloat16).reshape(tensor.shape)
        before, layer, after = tensor.name.partition(".layers.")[0], *tensor.name.split(".layers.")[1].split(".", 1)
        for turn in range(REPEATED):
            found[f"{before}.layers.{int(layer) + 4 * turn}.{after}"] = value
    return found


def pull(work: Path, url: str, before: list[str], version: str, coding: str, earlier: Path | None = None) -> float:
    """Seconds of one pull. `earlier`: a file that the folder has already."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if earlier is not None:
        shutil.copyfile(earlier, out / "group-0.safetensors")
    os.sync()
    words = ["--group", "0", "--hotkey", HOTKEY, "--out", str(out), "--version", version, "--coding", coding, "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        [*before, sys.executable, "-m", "bzstream", "pull", url, *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"the pull failed: {done.stderr[-300:]}")
    published = work / "store" / "snapshots" / version / "group-0.safetensors"
    if subprocess.run(["cmp", "-s", str(published), str(out / "group-0.safetensors")], check=False).returncode:
        raise RuntimeError("the pull wrote other bytes than were published")
    if coding == "auto" and before and not json.loads(done.stdout)["units"][0]["gained"]:
        raise RuntimeError("nothing came coded over the slow link")
    return seconds


def in_turns(rounds: int, subjects: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            found[name].append(subject())
    return found


def over_link(work: Path, url: str, before: list[str], rounds: int) -> list[dict[str, Any]]:
    earlier = work / "store" / "snapshots" / "start" / "group-0.safetensors"
    found = in_turns(
        rounds,
        {
            PLAIN: lambda: pull(work, url, before, "outer", "off"),
            FRESH: lambda: pull(work, url, before, "outer", "auto"),
            NEXT: lambda: pull(work, url, before, "outer", "auto", earlier),
        },
    )
    plain = quantile(found[PLAIN], 0.5)
    rows = [row_of("pull over 100 Mbit/s", "s", found[PLAIN], subject=PLAIN)]
    for name, target in ((FRESH, "<= 0.70"), (NEXT, "<= 0.42")):
        ratio = quantile(found[name], 0.5) / plain
        rows.append(
            row_of("pull over 100 Mbit/s", "s", found[name], subject=name, peer=PLAIN, ratio=ratio, target=target)
        )
    return rows


def on_loopback(work: Path, url: str, rounds: int) -> list[dict[str, Any]]:
    """`auto` has the spread of the plain pulls to lose."""
    found = in_turns(
        rounds,
        {
            PLAIN: lambda: pull(work, url, [], "outer", "off"),
            "auto": lambda: pull(work, url, [], "outer", "auto"),
        },
    )
    plain = quantile(found[PLAIN], 0.5)
    spread = max(found[PLAIN]) / plain
    return [
        row_of("pull on loopback", "s", found[PLAIN], subject=PLAIN),
        row_of(
            "pull on loopback",
            "s",
            found["auto"],
            subject="auto",
            peer=PLAIN,
            ratio=quantile(found["auto"], 0.5) / plain,
            target=f"<= {max(spread, 1.0):.2f}",
        ),
    ]


def main() -> None:
    command(
        "coding_link",
        __doc__,
        measure,
        lambda parser: parser.add_argument(
            "--corpus", type=Path, metavar="FOLDER", help="where trained versions are kept for the next run"
        ),
    )


if __name__ == "__main__":
    main()
