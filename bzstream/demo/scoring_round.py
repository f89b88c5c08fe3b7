"""The second half of the demo: one round of training and scoring, with an honest miner and three cheats.

A small Qwen3-VL-MoE is trained for seconds and published. A miner pulls its group, trains it on and submits. One cheat
submits a copy of those weights, one weights with a NaN, one a pickle that would run code. The round ends, its seed
appears on the chain, and the evaluator scores.
"""

from __future__ import annotations

import functools
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bzstream.demo.running_node import RunningNode
from bzstream.demo.stage import DemoFailed, Stage
from bzstream.demo.toy_model import corpus, forge_copy, forge_nan, forge_pickle_bomb, improve, train_toy

__all__ = ["play_round"]

SUBMIT_BLOCK, SEED_BLOCK = 12530, 12600
"""A block of the submit phase, and the first block after it, whose hash is the round's seed."""
SCORED_S = 600.0
TRAINING_STEPS, MINER_STEPS = 60, 35
"""Enough to tell English from noise, and a trained group from an untrained one; some 10 s together on one core."""

SETTINGS = {
    "BZ_EVALUATION_WINDOWS": "64",
    "BZ_EVALUATION_WINDOW_TOKENS": "128",
    "BZ_EVALUATION_BATCH": "16",
    # The miners of this demo serve their checkpoints from this very machine.
    "BZ_SUBMIT_ALLOW_HTTP": "true",
    "BZ_SUBMIT_ALLOW_PRIVATE_URLS": "true",
}

EXPECTED_OUTCOMES = {
    "honest": ("trained its group", "scored", None),
    "copycat": ("copied the honest one", "rejected", "duplicate_weights"),
    "poisoner": ("slipped in a NaN", "rejected", "non_finite"),
    "bomber": ("sent a pickle bomb", "rejected", "unsafe_pickle"),
}
"""Miner -> what it did, the status and the reason that its submission must end with."""


def play_round(stage: Stage) -> None:
    """Play the round. Raises DemoFailed at the first outcome that is not as expected."""
    stage.say("A round of training and scoring: a small Qwen3-VL-MoE learns English from Python's own documentation")
    import torch

    torch.set_num_threads(1)  # so small a model is slower on two threads than on one
    checkpoint = stage.folder / "checkpoint"
    began = time.monotonic()
    loss = train_toy(checkpoint, steps=TRAINING_STEPS)
    stage.done(f"trained for {time.monotonic() - began:.0f} s to a training loss of {loss:.2f} a byte")
    stage.bzstream(
        *("publish", str(checkpoint), "--store", str(stage.folder / "store")),
        *("--block", "12345", "--version", "step_1", "--groups", "4"),
    )
    (stage.folder / "english.txt").write_bytes(corpus())
    settings = {**SETTINGS, "BZ_EVALUATION_DATA": str(stage.folder / "english.txt")}
    with stage.node(SUBMIT_BLOCK, evaluator=True, **settings) as node:
        files = _train_and_forge(stage, node, checkpoint)
        with _file_server(stage.folder / "miners") as url:
            submissions = {who: _submit(stage, node, who, file, f"{url}/{file.name}") for who, file in files.items()}
            node.write_chain(SEED_BLOCK)
            stage.done("the submit phase is over, the round's seed is on the chain")
            _report(stage, node, submissions)
    if (stage.folder / "evidence").exists():
        raise DemoFailed("the pickle bomb went off: the evaluator ran a miner's code")


def _train_and_forge(stage: Stage, node: RunningNode, checkpoint: Path) -> dict[str, Path]:
    """Miner -> the file that it submits."""
    stage.bzstream(
        *("pull", node.url, "--group", "0", "--hotkey", stage.key("honest").ss58_address),
        *("--out", str(stage.folder / "pulled")),
    )
    folder = stage.folder / "miners"
    folder.mkdir(exist_ok=True)
    files = {who: folder / f"{who}.{'pt' if who == 'bomber' else 'safetensors'}" for who in EXPECTED_OUTCOMES}
    loss = improve(checkpoint, stage.folder / "pulled" / "group-0.safetensors", files["honest"], steps=MINER_STEPS)
    stage.done(f"the honest miner pulled group 0 and trained it on, to a training loss of {loss:.2f}")
    forge_copy(files["honest"], files["copycat"])
    forge_nan(files["honest"], files["poisoner"])
    forge_pickle_bomb(files["bomber"], stage.folder / "evidence")
    return files


def _submit(stage: Stage, node: RunningNode, who: str, file: Path, url: str) -> str:
    """Submit by the command; the submission's id."""
    stage.key(who)
    answer = stage.bzstream(
        *("submit", node.url, "--key", str(stage.key_file(who)), "--group", "0", "--checkpoint-url", url),
        *("--checkpoint", str(file), "--json"),
    )
    submission_id: str = json.loads(answer.splitlines()[0])["submission_id"]
    return submission_id


def _report(stage: Stage, node: RunningNode, submissions: dict[str, str]) -> None:
    from rich.table import Table

    table = Table("miner", "what it did", "outcome", "score", box=None, padding=(0, 2), header_style="dim")
    for who, submission_id in submissions.items():
        did, status, reason = EXPECTED_OUTCOMES[who]
        found = _wait_until_final(node, submission_id)
        if (found["status"], found["reason"]) != (status, reason):
            raise DemoFailed(f"the {who} should be {status} {reason or ''}, but is {found['status']} {found['reason']}")
        if who == "honest" and not found["score"] > 0:
            raise DemoFailed(f"the honest miner's score is {found['score']}; it should be above 0")
        losses = f"loss {found['baseline_loss']:.4f} → {found['loss']:.4f}" if status == "scored" else reason
        table.add_row(who, did, f"{status}: {losses}", f"{found['score']:.4f}")
    stage.console.print(table)


def _wait_until_final(node: RunningNode, submission_id: str) -> dict[str, Any]:
    """The submission's state once it is final."""
    found: dict[str, Any] = {}

    def final() -> bool:
        headers = {"Authorization": f"Bearer {node.token}"}
        found.update(node.get(f"/submissions/{submission_id}", headers).json)
        return found["status"] in ("scored", "rejected", "failed")

    node.wait_until(final, "the submission is scored or refused", SCORED_S)
    return found


@contextmanager
def _file_server(folder: Path) -> Iterator[str]:
    """The miners' own web server: the URL of `folder`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
