"""`bzstream demo`: the whole loop on one machine, from nothing, with the same commands that people use.

Every step runs the real thing: `bzstream publish` and `bzstream serve` as processes, `bzstream pull` as the miner and
as the peer validator. The demo checks what they did by its own means (hashes of files, rows of tensors, status codes)
and ends with exit status 1 at the first thing that is not as promised.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bzstream.errors import BzstreamError

__all__ = ["demo"]

BLOCK, VERSION, GROUPS = 12345, "step_1000", 4
START_S = 30.0


class DemoFailed(BzstreamError):
    """Something in the loop is not as promised."""


def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Keep the node running and print commands to try.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Work here and leave everything there.")] = None,
) -> None:
    """Publish a small model, serve it, download it, check every hash and see what is refused."""
    with tempfile.TemporaryDirectory(prefix="bzstream-demo-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        _Demo(place.absolute()).play(serve)


class _Demo:
    def __init__(self, place: Path) -> None:
        from rich.console import Console

        self.place = place
        self.console = Console(highlight=False)
        self.token, self.validator_token = secrets.token_hex(24), secrets.token_hex(24)
        self.keys = place / "keys"
        self.keys.mkdir(exist_ok=True)
        self.miner, self.validator = self._key("miner"), self._key("validator")
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def play(self, keep: bool) -> None:
        """The loop; raises DemoFailed at the first broken promise."""
        started = time.monotonic()
        self.say("A small Qwen3-VL-MoE checkpoint, in the format and with the names that transformers writes")
        checkpoint = self.write_checkpoint()
        self.say(f"bzstream publish, {GROUPS} expert groups")
        self.publish(checkpoint)
        self.say("bzstream serve")
        with self.node():
            self.say("bzstream pull: a miner fetches its group and the shared tensors, a peer validator the full model")
            self.download(checkpoint)
            self.say("What is refused")
            self.refusals()
            self.console.print(f"\n[bold green]Everything held.[/] {time.monotonic() - started:.1f} s in all.")
            if keep:
                self.invite()
                signal.sigwait({signal.SIGINT, signal.SIGTERM})

    # ------------------------------------------------------------------------------------------------------ the steps

    def write_checkpoint(self) -> Path:
        from bzstream.cli._checkpoint import write_checkpoint

        folder = self.place / "checkpoint"
        size, shards = write_checkpoint(folder)
        self.done(f"{size / 1e6:.0f} MB in {shards} shards")
        return folder

    def publish(self, checkpoint: Path) -> None:
        began = time.monotonic()
        self.bzstream(
            "publish", str(checkpoint), "--store", str(self.place / "store"),
            "--block", str(BLOCK), "--version", VERSION, "--groups", str(GROUPS),
        )  # fmt: skip
        self.done(f"snapshot {VERSION} at block {BLOCK} in {time.monotonic() - began:.2f} s")

    @contextmanager
    def node(self) -> Iterator[None]:
        """A running node: simulated chain with this validator on it, a token of the validator's own."""
        self.chain(BLOCK)
        tokens = self.place / "tokens.toml"
        tokens.touch(mode=0o600)
        tokens.write_text(f'"{self.validator_token}" = "{self.validator}"\n', encoding="utf-8")
        command = [
            sys.executable, "-m", "bzstream", "serve", "--store", str(self.place / "store"), "--port", str(self.port),
            "--chain-file", str(self.place / "chain.json"), "--no-evaluator",
        ]  # fmt: skip
        with open(self.place / "node.log", "wb") as output:
            process = subprocess.Popen(command, env=self.environment(BZ_TOKENS_FILE=str(tokens)), stderr=output)
        try:
            self.wait_until_healthy(process)
            yield
        finally:
            process.terminate()
            process.wait()

    def download(self, checkpoint: Path) -> None:
        for token, arguments, names in (
            (self.token, ["--group", "0", "--shared", "--hotkey", self.miner], ["group-0", "shared"]),
            (self.validator_token, ["--full"], ["model"]),
        ):
            began = time.monotonic()
            out = self.place / "pulled"
            self.bzstream("pull", self.url, *arguments, "--out", str(out), BZ_AUTH_TOKEN=token)
            seconds = time.monotonic() - began
            total = 0
            for name in names:
                total += self.check_file(out / f"{name}.safetensors", name, token)
            self.done(
                f"{' and '.join(names)}: {total / 1e6:.0f} MB, SHA-256 as published, {seconds:.2f} s with start-up"
            )
        rows = _same_rows(checkpoint, self.place / "pulled" / "group-0.safetensors")
        self.done(f"group 0: all {rows} tensors equal the source's rows bit for bit")

    def refusals(self) -> None:
        miner = {"Authorization": f"Bearer {self.token}", "X-Hotkey": self.miner, "X-Expert-Group": "0"}
        for what, path, headers, expected in (
            ("no token", "/model/partial", {}, 401),
            ("a group that does not exist", "/model/partial", {**miner, "X-Expert-Group": "999"}, 404),
            ("the full model for a miner", "/model/full", miner, 403),
        ):
            status, _, body = self.request("GET", path, headers)
            if status != expected:
                raise DemoFailed(f"{what}: expected {expected}, the node answered {status}")
            self.done(f"{what}: {status} {json.loads(body)['code']}")

    def invite(self) -> None:
        """Commands that work when pasted."""
        header = f"-H 'Authorization: Bearer {self.token}' -H 'X-Hotkey: {self.miner}'"
        self.say("The node keeps running; Ctrl-C ends it. Try:")
        for command in (
            f"curl -s {self.url}/health",
            f"curl -s {header} {self.url}/model",
            f"curl -s {header} -H 'X-Expert-Group: 0' '{self.url}/model/partial?format=safetensors' | sha256sum",
            f"curl -s {header} -H 'X-Expert-Group: 0' {self.url}/model/partial/manifest",
            f"BZ_AUTH_TOKEN={self.token} {shlex.quote(sys.executable)} -m bzstream pull {self.url} --group 1 --shared "
            f"--hotkey {self.miner} --out my-group",
        ):
            self.console.print(f"  {command}", soft_wrap=True)

    # ------------------------------------------------------------------------------------------------------- the means

    def say(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/]")

    def done(self, text: str) -> None:
        self.console.print(f"  [green]✓[/] {text}", soft_wrap=True)

    def _key(self, name: str) -> str:
        """Write a fresh ed25519 seed file; its hotkey."""
        from bzstream.chain.keys import load_key

        file = self.keys / name
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32), encoding="ascii")
        return load_key(str(file)).hotkey

    def chain(self, block: int) -> None:
        """Put the simulated chain at `block`."""
        state = {"block": block, "block_seconds": 0, "validators": [self.validator], "miners": None}
        new = self.place / "chain.json.new"
        new.write_text(json.dumps(state), encoding="utf-8")
        new.replace(self.place / "chain.json")

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BZ_")}
        return {**clean, "BZ_AUTH_TOKEN": self.token, **more}

    def bzstream(self, *arguments: str, **environment: str) -> str:
        """Run one command of bzstream; its output. Raises DemoFailed with the command's own sentence."""
        result = subprocess.run(
            [sys.executable, "-m", "bzstream", *arguments],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise DemoFailed(f"`bzstream {arguments[0]}` failed: {result.stderr.strip()}")
        return result.stdout

    def request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                _, _, body = self.request("GET", "/health", {})
                health: dict[str, Any] = json.loads(body)
                if health["status"] == "healthy":
                    self.done(
                        f"{self.url} is {health['status']}, block {health['current_block']}, {health['phase']} phase"
                    )
                    return
            except OSError:
                pass
            time.sleep(0.05)
        log = (self.place / "node.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise DemoFailed(f"the node did not become healthy: {log[-1] if log else 'it said nothing'}")

    def check_file(self, file: Path, name: str, token: str) -> int:
        """Hash a pulled file and compare with what the node says of the unit; its size in bytes."""
        unit, _, group = name.partition("-")
        path = {"group": "/model/partial?format=safetensors", "shared": "/model/shared?format=safetensors"}.get(
            unit, "/model/full"
        )
        headers = {"Authorization": f"Bearer {token}"}
        if unit != "model":
            headers["X-Hotkey"] = self.miner
        if group:
            headers["X-Expert-Group"] = group
        _, answered, _ = self.request("HEAD", path, headers)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if answered["X-Content-Hash"] != f"sha256:{digest}":
            raise DemoFailed(f"{file.name} has SHA-256 {digest}, the node says {answered['X-Content-Hash']}")
        return file.stat().st_size


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _same_rows(checkpoint: Path, slice_file: Path) -> int:
    """How many tensors of a slice there are, each of them compared with the rows of the source it was cut from."""
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
