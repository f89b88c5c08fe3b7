"""A real node for tests: a published checkpoint, `bzstream serve` as a process, and a plain client of its sockets."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bzstream.chain.keys import Key

TOKEN = "test-" + "0123456789abcdef" * 2
VERSION, BLOCK, GROUPS = "step_1000", 12345, 4
DEADLINE_S = 30.0


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Node:
    """A running `bzstream serve` and what a test needs to talk to it."""

    place: Path
    port: int
    process: subprocess.Popen[bytes]
    validator: Key
    validator_token: str
    token: str = TOKEN
    hotkey: str = field(default_factory=lambda: Key.from_seed(b"\x01" * 32).ss58_address)
    trusted: str | None = None
    """The certificate (PEM, for `localhost`) of a node that speaks TLS."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self.trusted is None else f"https://localhost:{self.port}"

    @property
    def store(self) -> Path:
        return self.place / "store"

    def headers(self, group: int | None = None, token: str | None = None) -> dict[str, str]:
        """What an honest miner sends."""
        sent = {"Authorization": f"Bearer {token or self.token}", "X-Hotkey": self.hotkey}
        return sent if group is None else {**sent, "X-Expert-Group": str(group)}

    def as_validator(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.validator_token}"}

    def connect(self) -> socket.socket:
        """A connection to the node, the TLS handshake made."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        if self.trusted is None:
            return plain
        try:
            context = ssl.create_default_context(cadata=self.trusted)
            return context.wrap_socket(plain, server_hostname="localhost")
        except OSError:
            plain.close()
            raise

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.sock = self.connect()
            connection.request(method, path, body=body, headers=dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/health").json
        return found

    def write_chain(self, block: int = BLOCK, **more: object) -> None:
        write_chain(self.place, self.validator.ss58_address, block, **more)

    def log(self) -> str:
        return (self.place / "node.log").read_text(encoding="utf-8", errors="replace")


def write_chain(place: Path, validator: str, block: int = BLOCK, **more: object) -> None:
    """Replace the chain file atomically."""
    state = {"block": block, "block_seconds": 0, "validators": [validator], "miners": None, **more}
    new = place / "chain.json.new"
    new.write_text(json.dumps(state), encoding="utf-8")
    new.replace(place / "chain.json")


def eventually(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait until `condition()` is true, asking it again and again; its value. Fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    """A free port of 127.0.0.1 that stays so until a node has it: the kernel gives none of these to a client."""
    begin = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = 10_000 + secrets.randbelow(begin - 10_000) if begin > 10_000 else 0
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])


@contextmanager
def running_node(
    place: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
    trusted: str | None = None,
) -> Iterator[Node]:
    """Serve `place`/store until the block ends. `environment` adds BZ_* variables; `trusted` as in Node."""
    validator, validator_token, port = Key.from_seed(b"\x02" * 32), secrets.token_hex(24), free_port()
    tokens = place / "tokens.toml"
    tokens.touch(mode=0o600)
    tokens.write_text(f'"{validator_token}" = "{validator.ss58_address}"\n', encoding="utf-8")
    write_chain(place, validator.ss58_address)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BZ_")}
    command = [
        *(sys.executable, "-m", "bzstream", "serve", "--store", str(place / "store"), "--port", str(port)),
        *("--chain-file", str(place / "chain.json"), "--no-evaluator", *arguments),
    ]
    with (place / "node.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**clean, "BZ_AUTH_TOKEN": TOKEN, "BZ_TOKENS_FILE": str(tokens), **(environment or {})},
            stderr=output,
        )
    node = Node(place, port, process, validator, validator_token, trusted=trusted)
    try:
        if wait:
            eventually(lambda: process.poll() is not None or _healthy(node), "the node is healthy")
            assert process.poll() is None, node.log()
        yield node
    finally:
        process.terminate()
        process.wait(timeout=DEADLINE_S)


def _healthy(node: Node) -> bool:
    try:
        return bool(node.health()["status"] == "healthy")
    except OSError:
        return False
