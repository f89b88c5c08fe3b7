"""What the demo works with: a folder, keys, the commands of bzstream, and a node."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bzstream.chain.keys import Key, load_key
from bzstream.demo.running_node import RunningNode, clean_environment, running_node
from bzstream.errors import BzstreamError

__all__ = ["DemoFailed", "Stage"]


class DemoFailed(BzstreamError):
    """Something in the demo is not as promised."""


class Stage:
    """One folder, in which one node at a time runs."""

    def __init__(self, folder: Path) -> None:
        from rich.console import Console

        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = folder / "store"
        self.console = Console(highlight=False)
        self.token, self.validator_token = secrets.token_hex(24), secrets.token_hex(24)
        self.miner, self.validator = self.key("miner"), self.key("validator")

    def say(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/]", soft_wrap=True)

    def done(self, text: str) -> None:
        self.console.print(f"  [green]✓[/] {text}", soft_wrap=True)

    def key_file(self, name: str) -> Path:
        return self.folder / "keys" / name

    def key(self, name: str) -> Key:
        """The ed25519 key of this name, made at the first call."""
        file = self.key_file(name)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32), encoding="ascii")
        return load_key(str(file))

    def bzstream(self, *arguments: str, token: str | None = None) -> str:
        """Run one command of bzstream; its output. Raises DemoFailed with the command's own sentence."""
        result = subprocess.run(
            [sys.executable, "-m", "bzstream", *arguments],
            env={**clean_environment(), "BZ_AUTH_TOKEN": token or self.token},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["it said nothing"]
            raise DemoFailed(f"`bzstream {arguments[0]}` failed: {lines[-1]}")
        return result.stdout

    @contextmanager
    def node(self, block: int, *, evaluator: bool = False, **environment: str) -> Iterator[RunningNode]:
        """A running, healthy node on a simulated chain at `block`, with this validator on it and a token of its own."""
        with running_node(
            self.folder,
            token=self.token,
            bound_tokens={self.validator_token: self.validator.ss58_address},
            validators=[self.validator.ss58_address],
            block=block,
            environment=environment,
            evaluator=evaluator,
        ) as node:
            health = node.health()
            self.done(f"{node.url} is healthy: block {health['current_block']}, {health['phase']} phase")
            yield node
