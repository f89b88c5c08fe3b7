"""The first half of the demo: publish, download, what is refused, submit. Needs no torch.

Every step runs the real thing: `bzstream publish` and `bzstream serve` as processes, `bzstream pull` as the miner and
as the peer validator, `bzstream submit`. The demo checks what they did by its own means (hashes of files, rows of
tensors, status codes).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from bzstream.demo.checkpoint import write_checkpoint
from bzstream.demo.running_node import Response, RunningNode
from bzstream.demo.stage import DemoFailed, Stage
from bzstream.tensorfile import read_head

__all__ = ["BLOCK", "download", "prepare", "same_rows", "show_refusals", "submit"]

BLOCK, VERSION, GROUPS = 12345, "step_1000", 4
SUBMIT_BLOCK = 12530
"""BLOCK is in the train phase, SUBMIT_BLOCK in the submit phase of the same cycle."""


def prepare(stage: Stage) -> Path:
    """Write a checkpoint and publish it; the checkpoint's folder."""
    stage.say("A small Qwen3-VL-MoE checkpoint, in the format and with the names that transformers writes")
    checkpoint = stage.folder / "checkpoint"
    size, shards = write_checkpoint(checkpoint)
    stage.done(f"{size / 1e6:.0f} MB in {shards} shards")
    stage.say(f"bzstream publish: {GROUPS} expert groups, the shared tensors, the full model")
    began = time.monotonic()
    stage.bzstream(
        *("publish", str(checkpoint), "--store", str(stage.store)),
        *("--block", str(BLOCK), "--version", VERSION, "--groups", str(GROUPS)),
    )
    stage.done(f"snapshot {VERSION} of block {BLOCK} in {time.monotonic() - began:.2f} s")
    return checkpoint


def download(stage: Stage, node: RunningNode, checkpoint: Path) -> None:
    """Pull as a miner and as a validator; compare every file's hash with what the node says of the unit."""
    from rich.table import Table

    stage.say("bzstream pull: a miner gets its group and the shared tensors, a peer validator the full model")
    table = Table("unit", "bytes", "GB/s", "SHA-256", box=None, padding=(0, 2), header_style="dim")
    out = stage.folder / "pulled"
    as_miner = ("--group", "0", "--shared", "--hotkey", stage.miner.ss58_address)
    for token, arguments in ((stage.token, as_miner), (stage.validator_token, ("--full",))):
        report = json.loads(stage.bzstream("pull", node.url, *arguments, "--out", str(out), "--json", token=token))
        for unit in report["units"]:
            digest = _check_hash(stage, node, Path(unit["path"]), token)
            speed = unit["size"] / max(unit["seconds"], 1e-9) / 1e9
            table.add_row(unit["label"], f"{unit['size']:,}", f"{speed:.2f}", f"{digest[:16]}… as published")
    stage.console.print(table)
    tensors = same_rows(checkpoint, out / "group-0.safetensors")
    stage.done(f"group 0: all {tensors} tensors equal the source's rows bit for bit")


def show_refusals(stage: Stage, node: RunningNode) -> None:
    """Ask for what a node must refuse."""
    miner = {**_miner(stage), "X-Expert-Group": "0"}
    stage.say("What is refused")
    for what, path, headers, expected in (
        ("no token", "/model/partial", {}, 401),
        ("a group that does not exist", "/model/partial", {**miner, "X-Expert-Group": "999"}, 404),
        ("the full model for a miner", "/model/full", miner, 403),
    ):
        _expect(stage, what, expected, node.get(path, headers))


def submit(stage: Stage, node: RunningNode) -> None:
    """Submit too early, then in time, then again, then with somebody else's signature."""
    fields: dict[str, object] = {
        "hotkey": stage.miner.ss58_address,
        "expert_group": 0,
        "checkpoint_url": "https://miner.example/checkpoint.safetensors",
        "block_number": BLOCK,
    }
    other: dict[str, object] = {**fields, "checkpoint_url": "https://miner.example/another.safetensors"}
    headers = {**_miner(stage), "Content-Type": "application/json"}

    def post(body: dict[str, object], signature: str) -> Response:
        return node.request("POST", "/submit", headers, json.dumps({**body, "signature": signature}).encode())

    stage.say("bzstream submit")
    _expect(stage, "in the train phase", 423, post(fields, stage.miner.sign_fields(fields)))
    node.write_chain(SUBMIT_BLOCK)
    node.wait_until(lambda: node.health()["phase"] == "submit", "the submit phase begins")
    stage.bzstream(
        *("submit", node.url, "--key", str(stage.key_file("miner")), "--group", "0"),
        *("--checkpoint-url", str(fields["checkpoint_url"]), "--block", str(BLOCK)),
    )
    stage.done("in the submit phase, by the command: accepted and on disk")
    _expect(stage, "another one for the same block", 409, post(other, stage.miner.sign_fields(other)))
    _expect(stage, "with a signature that is not the hotkey's", 400, post(fields, stage.validator.sign_fields(fields)))


def _miner(stage: Stage) -> dict[str, str]:
    return {"Authorization": f"Bearer {stage.token}", "X-Hotkey": stage.miner.ss58_address}


def _expect(stage: Stage, what: str, expected: int, response: Response) -> None:
    if response.status != expected:
        raise DemoFailed(f"{what}: expected {expected}, the node answered {response.status} {response.body[:200]!r}")
    stage.done(f"{what}: {response.status} {response.json['code']}")


def _check_hash(stage: Stage, node: RunningNode, file: Path, token: str) -> str:
    """Hash a pulled file and compare with what the node says of the unit; the hex digest."""
    unit, _, group = file.stem.partition("-")
    path = {"group": "/model/partial?format=safetensors", "shared": "/model/shared?format=safetensors"}.get(
        unit, "/model/full"
    )
    headers = {"Authorization": f"Bearer {token}"}
    if unit != "model":
        headers["X-Hotkey"] = stage.miner.ss58_address
    if group:
        headers["X-Expert-Group"] = group
    announced = node.request("HEAD", path, headers).headers["X-Content-Hash"]
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if announced != f"sha256:{digest}":
        raise DemoFailed(f"{file.name} has SHA-256 {digest}, the node says {announced}")
    return digest


def same_rows(checkpoint: Path, slice_file: Path) -> int:
    """Compare each tensor of a slice with the source's rows; how many tensors there are. Raises DemoFailed."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    with slice_file.open("rb") as cut:
        head = read_head(cut.fileno())
        experts = json.loads(head.metadata["experts"])
        for tensor in head.tensors:
            with (checkpoint / index[tensor.name]).open("rb") as source:
                source_head = read_head(source.fileno())
                whole = next(t for t in source_head.tensors if t.name == tensor.name)
                row = (whole.end - whole.start) // whole.shape[0]
                layer = tensor.name.split(".layers.")[1].split(".")[0]
                starts = [source_head.data_start + whole.start + original * row for original in experts[layer]]
                rows = b"".join(os.pread(source.fileno(), row, start) for start in starts)
            if rows != os.pread(cut.fileno(), tensor.end - tensor.start, head.data_start + tensor.start):
                raise DemoFailed(f"{tensor.name} of the slice differs from the source")
    return len(head.tensors)
