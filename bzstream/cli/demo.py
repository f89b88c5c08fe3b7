"""`bzstream demo`: the whole loop on one machine, from nothing, with the same commands that people use.

Every step runs the real thing: `bzstream publish` and `bzstream serve` as processes, `bzstream pull` as the miner and
as the peer validator, `bzstream submit`. The demo checks what they did by its own means (hashes of files, rows of
tensors, status codes) and ends with exit status 1 at the first thing that is not as promised.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bzstream.cli._stage import Stage

__all__ = ["demo", "same_rows"]

BLOCK, VERSION, GROUPS = 12345, "step_1000", 4
SUBMIT_BLOCK = 12530
"""A block of the train phase, and one of the same cycle's submit phase."""


def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Keep the node running and print commands to try.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Work here and leave everything there.")] = None,
) -> None:
    """Publish a small model, serve it, download it, check every hash, submit, and see what is refused."""
    from bzstream.cli._stage import Stage

    with tempfile.TemporaryDirectory(prefix="bzstream-demo-") as temporary:
        started = time.monotonic()
        stage = Stage((folder or Path(temporary)).absolute())
        checkpoint = _write(stage)
        _publish(stage, checkpoint)
        stage.say("bzstream serve")
        stage.chain(BLOCK)
        with stage.node("--no-evaluator"):
            _download(stage, checkpoint)
            _refusals(stage)
            _submissions(stage)
            _round(stage)
            stage.console.print(f"\n[bold green]Everything held.[/] {time.monotonic() - started:.1f} s in all.")
            if serve:
                ending = {signal.SIGINT, signal.SIGTERM}
                signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # sigwait needs them blocked (POSIX)
                _invite(stage)
                signal.sigwait(ending)


def _write(stage: Stage) -> Path:
    from bzstream.cli._checkpoint import write_checkpoint

    stage.say("A small Qwen3-VL-MoE checkpoint, in the format and with the names that transformers writes")
    folder = stage.place / "checkpoint"
    size, shards = write_checkpoint(folder)
    stage.done(f"{size / 1e6:.0f} MB in {shards} shards")
    return folder


def _publish(stage: Stage, checkpoint: Path) -> None:
    stage.say(f"bzstream publish: {GROUPS} expert groups, the shared tensors, the full model")
    began = time.monotonic()
    stage.bzstream(
        *("publish", str(checkpoint), "--store", str(stage.place / "store")),
        *("--block", str(BLOCK), "--version", VERSION, "--groups", str(GROUPS)),
    )
    stage.done(f"snapshot {VERSION} of block {BLOCK} in {time.monotonic() - began:.2f} s")


def _download(stage: Stage, checkpoint: Path) -> None:
    """Pull as a miner and as a validator; every file's hash against what the node says of the unit."""
    from rich.table import Table

    stage.say("bzstream pull: a miner gets its group and the shared tensors, a peer validator the full model")
    table = Table("unit", "bytes", "GB/s", "SHA-256", box=None, padding=(0, 2), header_style="dim")
    out = stage.place / "pulled"
    for token, arguments in (
        (stage.token, ["--group", "0", "--shared", "--hotkey", stage.miner.ss58_address]),
        (stage.validator_token, ["--full"]),
    ):
        report = json.loads(
            stage.bzstream("pull", stage.url, *arguments, "--out", str(out), "--json", BZ_AUTH_TOKEN=token)
        )
        for unit in report["units"]:
            digest = _check_hash(stage, Path(unit["path"]), token)
            speed = unit["size"] / max(unit["seconds"], 1e-9) / 1e9
            table.add_row(unit["label"], f"{unit['size']:,}", f"{speed:.2f}", f"{digest[:16]}… as published")
    stage.console.print(table)
    tensors = same_rows(checkpoint, out / "group-0.safetensors")
    stage.done(f"group 0: all {tensors} tensors equal the source's rows bit for bit")


def _refusals(stage: Stage) -> None:
    miner = {**_miner(stage), "X-Expert-Group": "0"}
    stage.say("What is refused")
    for what, path, headers, expected in (
        ("no token", "/model/partial", {}, 401),
        ("a group that does not exist", "/model/partial", {**miner, "X-Expert-Group": "999"}, 404),
        ("the full model for a miner", "/model/full", miner, 403),
    ):
        _expect(stage, what, expected, stage.request("GET", path, headers))


def _submissions(stage: Stage) -> None:
    """Submit too early, then in time, then again, then with somebody else's signature."""
    fields: dict[str, object] = {
        "hotkey": stage.miner.ss58_address,
        "expert_group": 0,
        "checkpoint_url": "https://miner.example/checkpoint.safetensors",
        "block_number": BLOCK,
    }
    signed = {**fields, "signature": stage.miner.sign_fields(fields)}
    forged = {**fields, "signature": stage.validator.sign_fields(fields)}
    headers = {**_miner(stage), "Content-Type": "application/json"}

    def post(body: dict[str, object]) -> tuple[int, object, bytes]:
        return stage.request("POST", "/submit", headers, json.dumps(body).encode())

    stage.say("bzstream submit")
    _expect(stage, "in the train phase", 423, post(signed))
    stage.chain(SUBMIT_BLOCK)
    stage.wait("phase=submit", "the submit phase")
    stage.bzstream(
        *("submit", stage.url, "--key", str(stage.key_file("miner")), "--group", "0"),
        *("--checkpoint-url", str(fields["checkpoint_url"]), "--block", str(BLOCK)),
    )
    stage.done("in the submit phase, by the command: accepted and on disk")
    other: dict[str, object] = {**fields, "checkpoint_url": "https://miner.example/another.safetensors"}
    again = {**other, "signature": stage.miner.sign_fields(other)}
    _expect(stage, "another one for the same block", 409, post(again))
    _expect(stage, "with a signature that is not the hotkey's", 400, post(forged))


def _round(stage: Stage) -> None:
    """Train and score, where the libraries for it are installed."""
    from bzstream.cli._stage import Stage

    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        stage.say("A round of training and scoring")
        stage.console.print(f"  left out: {' and '.join(missing)} not installed (bzstream\\[validator] brings them)")
        return
    from bzstream.cli._round import play_round

    play_round(Stage(stage.place / "round"))


def _invite(stage: Stage) -> None:
    """Commands that work when pasted."""
    header = f"-H 'Authorization: Bearer {stage.token}' -H 'X-Hotkey: {stage.miner.ss58_address}'"
    stage.say("The node keeps running; Ctrl-C ends it. Try:")
    for command in (
        f"curl -s {stage.url}/health",
        f"curl -s {header} {stage.url}/model",
        f"curl -s {header} -H 'X-Expert-Group: 0' '{stage.url}/model/partial?format=safetensors' | sha256sum",
        f"curl -s {header} -H 'X-Expert-Group: 0' {stage.url}/model/partial/manifest",
        f"BZ_AUTH_TOKEN={stage.token} {shlex.quote(sys.executable)} -m bzstream pull {stage.url} --group 1 --shared "
        f"--hotkey {stage.miner.ss58_address} --out my-group",
    ):
        stage.console.print(f"  {command}", soft_wrap=True)


def _miner(stage: Stage) -> dict[str, str]:
    return {"Authorization": f"Bearer {stage.token}", "X-Hotkey": stage.miner.ss58_address}


def _expect(stage: Stage, what: str, expected: int, answer: tuple[int, object, bytes]) -> None:
    from bzstream.cli._stage import DemoFailed

    status, _, body = answer
    if status != expected:
        raise DemoFailed(f"{what}: expected {expected}, the node answered {status} {body[:200]!r}")
    stage.done(f"{what}: {status} {json.loads(body)['code']}")


def _check_hash(stage: Stage, file: Path, token: str) -> str:
    """Hash a pulled file and compare with what the node says of the unit; the hex digest."""
    from bzstream.cli._stage import DemoFailed

    unit, _, group = file.stem.partition("-")
    path = {"group": "/model/partial?format=safetensors", "shared": "/model/shared?format=safetensors"}.get(
        unit, "/model/full"
    )
    headers = {"Authorization": f"Bearer {token}"}
    if unit != "model":
        headers["X-Hotkey"] = stage.miner.ss58_address
    if group:
        headers["X-Expert-Group"] = group
    _, answered, _ = stage.request("HEAD", path, headers)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if answered["X-Content-Hash"] != f"sha256:{digest}":
        raise DemoFailed(f"{file.name} has SHA-256 {digest}, the node says {answered['X-Content-Hash']}")
    return digest


def same_rows(checkpoint: Path, slice_file: Path) -> int:
    """How many tensors of a slice there are, each of them compared with the rows of the source it was cut from."""
    from bzstream.cli._stage import DemoFailed
    from bzstream.tensorfile import read_head

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
