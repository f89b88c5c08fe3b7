"""A real node for tests: `RunningNode` with the keys, tokens and header fields that tests send."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bzstream.chain.keys import Key
from bzstream.demo import running_node as demo
from bzstream.demo.running_node import Response as Answer
from bzstream.demo.running_node import RunningNode, clean_environment, free_port

__all__ = [
    "BLOCK", "GROUPS", "TOKEN", "VERSION", "Answer", "Node", "answers", "child_processes", "eventually", "free_port",
    "refused", "run_manual", "running_node", "write_chain",
]  # fmt: skip

TOKEN = "test-" + "0123456789abcdef" * 2
VERSION, BLOCK, GROUPS = "step_1000", 12345, 4
DEADLINE_S = 120.0
"""A machine at load 20 takes tens of seconds for what takes one alone; a test that fails may take its time."""


@dataclass
class Node(RunningNode):
    """A running node and what a test needs to talk to it."""

    validator: Key = field(kw_only=True)
    """The validator on the chain, whose token is `validator_token`."""
    validator_token: str = field(kw_only=True)
    hotkey: str = field(default_factory=lambda: Key.from_seed(b"\x01" * 32).ss58_address, kw_only=True)
    """A miner's."""

    def headers(self, group: int | None = None, token: str | None = None) -> dict[str, str]:
        """What an honest miner sends."""
        sent = {"Authorization": f"Bearer {token or self.token}", "X-Hotkey": self.hotkey}
        return sent if group is None else {**sent, "X-Expert-Group": str(group)}

    def as_validator(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.validator_token}"}


def write_chain(folder: Path, validator: str, block: int = BLOCK, **more: object) -> None:
    """Replace the chain file atomically."""
    demo.write_chain(folder, block, validators=[validator], **more)


def run_manual(script: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a manual's shell commands in a folder, as a user does whose PATH holds the commands of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**clean_environment(), "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def eventually(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait until `condition()` is true, asking it again and again; its value. Fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return value


def child_processes(parent: int, role: str = "") -> list[int]:
    """Living children of a process, by the role in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(status[1]) == parent and status[0] != "Z" and (not role or role.encode() in command):
            found.append(int(entry.name))
    return found


def answers(node: Node) -> bool:
    try:
        return node.get("/health").status == 200
    except OSError:
        return False


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


@contextmanager
def running_node(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
    **options: Any,
) -> Iterator[Node]:
    """Serve `folder`/store until the block ends; the parameters are those of `bzstream.demo.running_node`."""
    validator, validator_token = Key.from_seed(b"\x02" * 32), secrets.token_hex(24)
    with demo.running_node(
        folder,
        *arguments,
        token=TOKEN,
        bound_tokens={validator_token: validator.ss58_address},
        validators=[validator.ss58_address],
        environment=environment,
        wait=wait,
        **options,
    ) as running:
        values = {name: value for name, value in vars(running).items() if name != "process"}
        node = Node(**values, validator=validator, validator_token=validator_token)
        node.process = running.process
        try:
            yield node
        finally:
            running.process = node.process  # a successor's, perhaps
