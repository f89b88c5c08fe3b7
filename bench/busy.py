"""What a scoring evaluator takes from the http worker: `python -m bench.busy [--quick] [--json FILE]`

The whole node with its evaluator role: a small model is published, miners hand in submissions over HTTP, the round's
seed appears on the chain, and the evaluator scores them, one after the other, on one thread of the CPU. Meanwhile eight
connections download and /health is asked 200 times a second. Beside it, by turns, the same with the evaluator stopped
(SIGSTOP): everything is the same to the byte but that it computes nothing. What the evaluator used is a row of its own;
on two cores, with a client that needs one, it takes from both, and how much is for the scheduler to say.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.command import command
from bench.evaluate import make
from bench.latency import discard, probe, result
from bench.node import miners, serve
from bench.peers.servers import Target
from bench.rows import row_of
from bench.serve import SLICE, UNLIMITED, fields_of
from bzstream.demo.running_node import RunningNode, clean_environment, free_port
from bzstream.util.statistics import quantile

__all__ = ["measure"]

SUBMIT_BLOCK, SEED_BLOCK = 12530, 12600
"""A block of the submit phase, and the first after it: from then on the evaluator may score."""
DOWNLOADS = 8
GROUP = 1
WINDOWS, WINDOW_TOKENS = 512, 512
"""Of each submission: far more than a window of this bench needs, so that the evaluator never runs out of work."""
PATIENCE_S = 90.0
FINAL = frozenset({"scored", "rejected", "failed"})
VOCABULARY = 1024


def submit(node: RunningNode, folder: Path, url: str, count: int) -> list[str]:
    """Hand in `count` differing submissions of as many miners by the command; their ids."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    published = load_file(node.store / "current" / f"group-{GROUP}.safetensors")
    ids = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        file, key = folder / "miners" / f"{number}.safetensors", folder / f"key-{number}"
        file.parent.mkdir(exist_ok=True)
        changed = {
            name: (tensor.float() * (1 + 0.02 * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
            for name, tensor in published.items()
        }
        save_file(changed, file)
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(32), encoding="ascii")
        command = [sys.executable, "-m", "bzstream", "submit", node.url, "--key", str(key)]
        options = ["--group", str(GROUP), "--checkpoint-url", f"{url}/{file.name}", "--json"]
        done = subprocess.run(
            [*command, *options],
            env={**clean_environment(), "BZ_AUTH_TOKEN": node.token},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"a submission was refused: {done.stderr.strip()}")
        ids.append(json.loads(done.stdout.splitlines()[0])["submission_id"])
    return ids


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """The miners' own web server, a process of its own: the URL of `folder`, which it serves."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def states(node: RunningNode, ids: list[str]) -> list[str]:
    """What has become of each submission so far."""
    return [
        str(node.get(f"/submissions/{one}", {"Authorization": f"Bearer {node.token}"}).json["status"]) for one in ids
    ]


def wait_for_scoring(node: RunningNode, ids: list[str]) -> None:
    """Until one is being scored. Raises RuntimeError when none ever is."""
    deadline = time.monotonic() + PATIENCE_S
    while "evaluating" not in (found := states(node, ids)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing is scored after {PATIENCE_S:.0f} s: the submissions are {found}")
        time.sleep(0.1)


def evaluator_of(node: RunningNode) -> psutil.Process:
    """The process of the evaluator role."""
    children = psutil.Process(node.process.pid).children()
    return next(child for child in children if "evaluator" in child.cmdline())


def window(target: Target, folder: Path, evaluator: psutil.Process, seconds: float) -> dict[str, float]:
    """GB/s, /health in ms, and the cores that the evaluator used."""
    before, began = evaluator.cpu_times(), time.monotonic()
    load = discard(target, folder, DOWNLOADS, seconds, *target.headers, ranged=False)
    health = probe(target, folder, seconds)
    moved = result(load)
    after, took = evaluator.cpu_times(), time.monotonic() - began
    used = after.user + after.system - before.user - before.system
    return {"gb_s": moved["bytes"] / moved["seconds"] / 1e9, "cores": max(0.0, used / took), **health}


def measure(quick: bool) -> dict[str, Any]:
    """Rows and notes."""
    seconds, rounds, submissions = (0.5, 1, 1) if quick else (4.0, 3, 3)
    (miner,) = miners(1)
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        make(folder, quick=True, device="cpu")
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, 1 << 20, dtype=np.uint16)
        np.save(folder / "tokens.npy", tokens)
        settings = {
            **UNLIMITED,
            "BZ_EVALUATION_DATA": str(folder / "tokens.npy"),
            "BZ_EVALUATION_WINDOWS": str(WINDOWS),
            "BZ_EVALUATION_WINDOW_TOKENS": str(WINDOW_TOKENS),
            "BZ_SUBMIT_ALLOW_HTTP": "true",
            "BZ_SUBMIT_ALLOW_PRIVATE_URLS": "true",
            "OMP_NUM_THREADS": "1",
        }
        url = stack.enter_context(file_server(folder / "miners"))
        node = stack.enter_context(
            serve(folder / "store", callers=[miner], environment=settings, block=SUBMIT_BLOCK, evaluator=True)
        )
        ids = submit(node, folder, url, submissions)
        node.write_chain(SEED_BLOCK)
        wait_for_scoring(node, ids)
        evaluator = evaluator_of(node)
        size = (folder / "store" / "current" / "group-0.safetensors").stat().st_size
        target = Target("127.0.0.1", node.port, SLICE, size, node.process.pid, fields_of(miner))
        taken: dict[str, list[dict[str, float]]] = {"idle": [], "busy": []}
        try:
            for turn in range(rounds):
                for what in ("idle", "busy") if turn % 2 == 0 else ("busy", "idle"):
                    evaluator.send_signal(signal.SIGSTOP if what == "idle" else signal.SIGCONT)
                    time.sleep(0.2)
                    taken[what].append(window(target, folder, evaluator, seconds))
        finally:
            evaluator.send_signal(signal.SIGCONT)
        if FINAL.issuperset(found := states(node, ids)):
            raise RuntimeError(f"the evaluator ran out of work: the submissions are {found}")
    rows = []
    beside = f"beside {DOWNLOADS} downloads"
    for label, member, unit in (
        (f"/health p50 {beside}", "p50", "ms"),
        (f"/health p99 {beside}", "p99", "ms"),
        ("downloads", "gb_s", "GB/s"),
        ("the evaluator used", "cores", "cores"),
    ):
        values = {what: [one[member] for one in windows] for what, windows in taken.items()}
        pairs = [busy / idle for busy, idle in zip(values["busy"], values["idle"], strict=True) if idle]
        ratio = quantile(pairs, 0.5) if pairs and member != "cores" else None
        rows += [
            row_of(label, unit, values["idle"], subject="evaluator idle"),
            row_of(label, unit, values["busy"], subject="evaluator busy", peer="idle" if ratio else "", ratio=ratio),
        ]
    model = f"{WINDOWS} windows of {WINDOW_TOKENS} tokens for each submission"
    return {"rows": rows, "notes": f"A model of 0.3 GB, {model}, one thread; the evaluator was stopped to be idle."}


def main() -> None:
    command("busy", __doc__, measure)


if __name__ == "__main__":
    main()
