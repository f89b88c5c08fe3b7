"""The stage that `bzstream demo` plays on: a folder, keys, a node as a process, and the means to check what it does."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bzstream.chain.keys import Key, load_key
from bzstream.errors import BzstreamError

__all__ = ["DemoFailed", "Stage"]

START_S = 60.0


class DemoFailed(BzstreamError):
    """Something in the loop is not as promised."""


class Stage:
    """One folder with one node."""

    def __init__(self, place: Path) -> None:
        from rich.console import Console

        self.place = place
        self.place.mkdir(parents=True, exist_ok=True)
        self.console = Console(highlight=False)
        self.token, self.validator_token = secrets.token_hex(24), secrets.token_hex(24)
        self.miner, self.validator = self.key("miner"), self.key("validator")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def say(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/]", soft_wrap=True)

    def done(self, text: str) -> None:
        self.console.print(f"  [green]✓[/] {text}", soft_wrap=True)

    def key_file(self, name: str) -> Path:
        return self.place / "keys" / name

    def key(self, name: str) -> Key:
        """The ed25519 key of this name, made when it is first asked for."""
        file = self.key_file(name)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32), encoding="ascii")
        return load_key(str(file))

    def chain(self, block: int) -> None:
        """Put the simulated chain at `block`."""
        state = {"block": block, "block_seconds": 0, "validators": [self.validator.ss58_address], "miners": None}
        new = self.place / "chain.json.new"
        new.write_text(json.dumps(state), encoding="utf-8")
        new.replace(self.place / "chain.json")

    def bzstream(self, *arguments: str, **environment: str) -> str:
        """Run one command of bzstream; its output. Raises DemoFailed with the command's own sentence."""
        result = subprocess.run(
            [sys.executable, "-m", "bzstream", *arguments],
            env=self._environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["it said nothing"]
            raise DemoFailed(f"`bzstream {arguments[0]}` failed: {lines[-1]}")
        return result.stdout

    def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request to the node: status, header fields, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.request("GET", "/health", {})[2])
        return found

    def wait(self, condition: str, what: str, seconds: float = START_S) -> dict[str, Any]:
        """Wait until a member of /health has a value, `"status=healthy"`; the health then."""
        member, _, value = condition.partition("=")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                health = self.health()
                if str(health[member]) == value:
                    return health
            except OSError:
                pass
            time.sleep(0.05)
        log = (self.place / "node.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise DemoFailed(f"{what} did not happen within {seconds:.0f} s; the node's log ends with: {log[-1:]}")

    @contextmanager
    def node(self, *arguments: str, **environment: str) -> Iterator[None]:
        """A running, healthy node: simulated chain with this validator on it, a token of the validator's own."""
        tokens = self.place / "tokens.toml"
        tokens.touch(mode=0o600)
        tokens.write_text(f'"{self.validator_token}" = "{self.validator.ss58_address}"\n', encoding="utf-8")
        command = [
            *(sys.executable, "-m", "bzstream", "serve", "--store", str(self.place / "store")),
            *("--port", str(self.port), "--chain-file", str(self.place / "chain.json"), *arguments),
        ]
        with open(self.place / "node.log", "wb") as output:
            self.process = subprocess.Popen(
                command, env=self._environment(BZ_TOKENS_FILE=str(tokens), **environment), stderr=output
            )
        try:
            health = self.wait("status=healthy", "the node's start")
            self.done(f"{self.url} is healthy: block {health['current_block']}, {health['phase']} phase")
            yield
        finally:
            self.process.terminate()
            self.process.wait()

    def _environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BZ_")}
        return {**clean, "BZ_AUTH_TOKEN": self.token, **more}
