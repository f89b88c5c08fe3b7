"""A real node: `bzstream serve` as a process on loopback, and a plain client of its socket.

The demo, the benches and the tests start nodes with it, from any thread. It waits for what the node says of itself, in
/health and in its log, never for a time.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bzstream.errors import BzstreamError

__all__ = ["NodeFailed", "Response", "RunningNode", "clean_environment", "free_port", "running_node", "write_chain"]

BLOCK = 12345
"""A block of the train phase."""
START_S, STOP_S, REQUEST_S = 180.0, 90.0, 60.0
"""Far beyond what a node takes: a machine may have twenty other things to do, and one that died is noticed at once."""
POLL_S = 0.02


class NodeFailed(BzstreamError):
    """The node ended, or did not do in time what it should."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RunningNode:
    """A running `bzstream serve`."""

    folder: Path
    """Where its chain file and tokens lie."""
    log_file: Path
    store: Path
    port: int
    token: str
    """The shared token."""
    validators: tuple[str, ...] = ()
    """Hotkeys that the chain lists as validators."""
    trusted: str | None = None
    """The certificate (PEM, for `localhost`) of a node that speaks TLS."""
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    inherit: tuple[int, ...] = ()
    """Descriptors that its process gets."""
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the same command once more, as a node's successor is; from now on that is `process`."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=dict(self.environment), stdout=log, stderr=log, pass_fds=self.inherit
            )
        return self.process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self.trusted is None else f"https://localhost:{self.port}"

    def connect(self) -> socket.socket:
        """A connection to the node, the TLS handshake made."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=REQUEST_S)
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
    ) -> Response:
        """One request over a connection of its own. Raises OSError while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        try:
            connection.sock = self.connect()
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        return self.request("GET", path, headers)

    def health(self) -> dict[str, Any]:
        """What /health says. Raises OSError while nobody listens."""
        found: dict[str, Any] = self.get("/health").json
        return found

    def write_chain(self, block: int = BLOCK, **more: object) -> None:
        """Put the simulated chain at `block`; `more` are other members of its file."""
        write_chain(self.folder, block, **{"validators": self.validators, **more})

    @property
    def tokens_file(self) -> Path:
        return Path(self.environment["BZ_TOKENS_FILE"])

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = START_S) -> None:
        """Wait until `condition()` holds; while nobody listens it does not. Raises NodeFailed, with the log's end."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(POLL_S)
        ended = f"the node ended with {self.process.returncode}" if self.process.poll() is not None else "it runs"
        last = self.log().strip().splitlines()[-1:] or ["it logged nothing"]
        raise NodeFailed(f"not within {seconds:.0f} s: {what}; {ended}; its log ends with: {last[0]}")

    def wait_until_healthy(self) -> None:
        self.wait_until(lambda: self.health()["status"] == "healthy", "the node is healthy")


@contextmanager
def running_node(
    folder: Path,
    *arguments: str,
    store: Path | None = None,
    token: str | None = None,
    bound_tokens: Mapping[str, str] | None = None,
    validators: Sequence[str] = (),
    block: int = BLOCK,
    environment: Mapping[str, str] | None = None,
    evaluator: bool = False,
    trusted: str | None = None,
    command: Sequence[str] = (sys.executable, "-m", "bzstream"),
    inherit: tuple[int, ...] = (),
    wait: bool = True,
) -> Iterator[RunningNode]:
    """Serve `store` (default: `folder`/store) until the block ends, on a free port, with a simulated chain.

    `arguments`: further flags of `serve`, which win over those given here. `bound_tokens`: token -> hotkey.
    `environment`: variables beside a clean environment. `trusted`: as in RunningNode, for a node whose arguments name
    a certificate. `wait`: until it is healthy. Several nodes may live in one folder. Raises NodeFailed.
    """
    port, token = free_port(), token or secrets.token_hex(24)
    chain = write_chain(folder, block, validators=validators)
    tokens = folder / f"tokens-{port}.toml"
    tokens.touch(mode=0o600)
    tokens.write_text("".join(f'"{t}" = "{hotkey}"\n' for t, hotkey in (bound_tokens or {}).items()), encoding="utf-8")
    own = {"BZ_AUTH_TOKEN": token, "BZ_TOKENS_FILE": str(tokens)}
    store = store or folder / "store"
    words = ["serve", "--store", str(store), "--port", str(port), "--chain-file", str(chain)]
    if not evaluator:
        words.append("--no-evaluator")
    node = RunningNode(
        folder,
        folder / f"node-{port}.log",
        store,
        port,
        token,
        tuple(validators),
        trusted,
        (*command, *words, *arguments),
        {**clean_environment(), **own, **(environment or {})},
        inherit,
    )
    node.start()
    try:
        if wait:
            node.wait_until_healthy()
        yield node
    finally:
        node.process.terminate()
        try:
            node.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait()
            raise NodeFailed(f"the node did not end within {STOP_S:.0f} s of SIGTERM: {node.log()[-500:]}") from None


def write_chain(folder: Path, block: int = BLOCK, **more: object) -> Path:
    """Replace the chain file of the nodes in `folder` atomically; its path. `more`: other members, as `validators`."""
    chain, new = folder / "chain.json", folder / "chain.json.new"
    state = {"block": block, "block_seconds": 0, "validators": [], "miners": None, **more}
    new.write_text(json.dumps(state), encoding="utf-8")
    new.replace(chain)
    return chain


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of bzstream, for a command that is to run with its defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("BZ_", "BZSTREAM_"))}


def free_port() -> int:
    """A free port of 127.0.0.1 that stays free until a node has it: the kernel gives none of these to a client."""
    begin = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = 10_000 + secrets.randbelow(begin - 10_000) if begin > 10_000 else 0
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
