"""The node that the benches drive: a store of equal slices, `bzstream serve` as a process, and what it costs.

Everything is real: published by `publish_state_dict`, served by the supervisor with its worker and chain role, every
miner with a token bound to a hotkey of its own, so that the server takes it for a caller of its own.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from bzstream.chain.keys import encode_hotkey
from bzstream.model import publish_state_dict

__all__ = ["Cost", "Miner", "Node", "free_port", "miners", "publish_slices", "serve", "write_chain"]

VERSION, BLOCK = "bench", 12345
START_S, STOP_S = 60.0, 15.0


@dataclass(frozen=True, slots=True)
class Miner:
    """A caller: its token and the hotkey that the token is bound to."""

    token: str
    hotkey: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What a node's processes have used since they started. `cpu`: seconds, `memory`: bytes resident at most."""

    cpu: float
    memory: int


def miners(count: int) -> list[Miner]:
    """Callers with made-up hotkeys, always the same ones, and fresh tokens."""
    keys = (hashlib.sha256(f"bench miner {number}".encode()).digest() for number in range(count))
    return [Miner(secrets.token_hex(24), encode_hotkey(key)) for key in keys]


def publish_slices(store: Path, *, groups: int, slice_bytes: int) -> None:
    """Publish a model of one layer, whose `groups` experts are a group each and have about `slice_bytes`, of noise."""
    hidden = 1024
    inner = max(8, slice_bytes // (3 * hidden * 2))
    noise = np.random.default_rng(0)
    at = "model.language_model.layers.0"
    shapes = {
        f"{at}.mlp.experts.gate_up_proj": (groups, 2 * inner, hidden),
        f"{at}.mlp.experts.down_proj": (groups, hidden, inner),
        f"{at}.mlp.gate.weight": (groups, hidden),
    }
    text = {"model_type": "qwen3_vl_moe_text", "num_experts": groups, "hidden_size": hidden}
    publish_state_dict(
        {name: noise.integers(0, 1 << 16, shape, dtype=np.uint16) for name, shape in shapes.items()},
        {"model_type": "qwen3_vl_moe", "text_config": {**text, "moe_intermediate_size": inner}},
        store,
        block=BLOCK,
        version=VERSION,
        groups=groups,
    )


class Node:
    """A running `bzstream serve` on loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, store: Path, tls: Path | None = None) -> None:
        """`tls`: the certificate to trust when the node speaks HTTPS."""
        self.process = process
        self.port = port
        self.store = store
        self._trusted = ssl.create_default_context(cafile=str(tls)) if tls else None

    def head(self, path: str, headers: Mapping[str, str]) -> http.client.HTTPMessage:
        """The header fields of a HEAD request. Raises RuntimeError when the status is not 200."""
        connection = self._connect()
        try:
            connection.request("HEAD", path, headers=dict(headers))
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"the node answered {answer.status} to HEAD {path}")
            return answer.headers
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str]) -> dict[str, object]:
        """The JSON of an answer. Raises OSError while nobody listens, RuntimeError when the status is not 200."""
        connection = self._connect()
        try:
            connection.request("GET", path, headers=dict(headers))
            answer = connection.getresponse()
            found: dict[str, object] = json.loads(answer.read())
            if answer.status != 200:
                raise RuntimeError(f"the node answered {answer.status} to GET {path}: {found}")
            return found
        finally:
            connection.close()

    def health(self) -> dict[str, object]:
        """What /health says. Raises OSError while nobody listens."""
        return self.get("/health", {})

    def _connect(self) -> http.client.HTTPConnection:
        if self._trusted is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self._trusted)

    def cost(self) -> Cost:
        """CPU time and peak memory of the supervisor and its children together."""
        cpu, memory = 0.0, 0
        supervisor = psutil.Process(self.process.pid)
        for process in (supervisor, *supervisor.children(recursive=True)):
            with process.oneshot():
                times = process.cpu_times()
                cpu += times.user + times.system
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            memory += int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return Cost(cpu, memory)


def write_chain(folder: Path, block: int) -> Path:
    """Put the simulated chain of the nodes whose store lies in `folder` at `block`, where it stays; its file."""
    chain, new = folder / "chain.json", folder / "chain.json.new"
    new.write_text(json.dumps({"block": block, "block_seconds": 0, "validators": [], "miners": None}))
    new.replace(chain)
    return chain


@contextmanager
def serve(
    store: Path,
    *arguments: str,
    callers: list[Miner] | None = None,
    environment: Mapping[str, str] | None = None,
    block: int = BLOCK,
    evaluator: bool = False,
    tls: tuple[Path, Path] | None = None,
) -> Iterator[Node]:
    """Serve a store until the block ends. `environment` adds BZ_* variables, `arguments` flags of `serve`.

    `tls`: certificate and key. Several nodes may serve one store side by side, each with its own tokens and ledger.
    """
    place, port = store.parent, free_port()
    tokens, log = place / f"tokens-{port}.toml", place / f"node-{port}.log"
    tokens.touch(mode=0o600)
    tokens.write_text("".join(f'"{who.token}" = "{who.hotkey}"\n' for who in callers or []), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "bzstream", "serve", "--store", str(store), "--port", str(port)),
        *("--chain-file", str(write_chain(place, block)), "--ledger", str(place / f"ledger-{port}.sqlite")),
        *(() if evaluator else ("--no-evaluator",)),
        *(("--tls-cert", str(tls[0]), "--tls-key", str(tls[1])) if tls else ()),
        *arguments,
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BZ_")}
    own = {"BZ_AUTH_TOKEN": secrets.token_hex(32), "BZ_TOKENS_FILE": str(tokens), "BZ_LOG_LEVEL": "error"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**clean, **own, **(environment or {})}, stdout=output, stderr=output)
    node = Node(process, port, store, tls[0] if tls else None)
    try:
        _wait_until_healthy(node, log)
        yield node
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(node: Node, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and node.process.poll() is None:
        try:
            if node.health()["status"] == "healthy":
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise RuntimeError(f"the node did not become healthy; it said: {said[-1:]}")
