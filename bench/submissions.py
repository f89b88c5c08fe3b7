"""Durable submissions beside FastAPI + SQLite, on this disk and on one whose every fsync takes 10 ms longer.

    python -m bench.submissions [--quick] [--json FILE] [--folder DIR]

64 keep-alive connections send signed submissions of as many hotkeys, each waiting for its answer; only a 202 counts,
and afterwards every one of them is looked up in the ledger. Both servers have one worker, the same token and the same
checks (see bench/peers/fastapi_sqlite.py), and take turns, each turn with a new ledger; the median turn counts. Then a
flood of badly signed submissions over 64 connections, while one asks for /health 100 times a second.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nacl.signing
import uvloop

from bench.command import command
from bench.rows import ratio_of, row_of
from bzstream.chain.keys import canonical_json, encode_hotkey
from bzstream.demo.checkpoint import write_checkpoint
from bzstream.demo.running_node import free_port, running_node
from bzstream.util.statistics import quantile

__all__ = ["measure"]

CONNECTIONS = 64
BLOCK = 12540
SLOW_MS = 10
BZSTREAM = (sys.executable, "-m", "bzstream")
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Load:
    """What a load saw."""

    accepted: int
    seconds: float
    latencies: list[float]
    """Seconds, sorted."""
    statuses: dict[int, int]

    @property
    def rate(self) -> float:
        return self.accepted / self.seconds


def signed_bodies(count: int) -> list[bytes]:
    """Submissions of `count` hotkeys, one each."""
    bodies = []
    for _ in range(count):
        key = nacl.signing.SigningKey(secrets.token_bytes(32))
        fields = {
            "hotkey": encode_hotkey(key.verify_key.encode()),
            "expert_group": 0,
            "checkpoint_url": "https://miner-server.example.com/checkpoint_500_12345.pt",
            "block_number": BLOCK,
        }
        signature = base64.urlsafe_b64encode(key.sign(canonical_json(fields)).signature).decode()
        bodies.append(json.dumps({**fields, "signature": signature}).encode())
    return bodies


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request under way; reads what both servers send: a Content-Length body."""

    def __init__(self) -> None:
        self._buffer = b""
        self._waiting: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """Send a request; the future gives the answer's status."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if found:
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            if len(body) >= length:
                self._buffer = body[length:]
                if self._waiting is not None:
                    self._waiting.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionError("the server closed the connection"))

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


async def _connect(port: int) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    return connection


def _request(method: str, path: str, token: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def _load(port: int, requests: Iterator[bytes], seconds: float) -> Load:
    """Send requests over all connections until they run out or the time is over."""
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    began = time.perf_counter()

    async def one() -> None:
        connection = await _connect(port)
        for request in requests:
            sent = time.perf_counter()
            if sent - began > seconds:
                break
            status = await connection.ask(request)
            latencies.append(time.perf_counter() - sent)
            statuses[status] = statuses.get(status, 0) + 1
        connection.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return Load(statuses.get(202, 0), time.perf_counter() - began, sorted(latencies), statuses)


async def _flood(port: int, bad: bytes, token: str, seconds: float) -> tuple[Load, list[float]]:
    """A flood of one bad request, and the sorted latencies of /health meanwhile."""

    def forever() -> Iterator[bytes]:
        while True:
            yield bad

    flood = asyncio.create_task(_load(port, forever(), seconds))
    probe = await _connect(port)
    asked: list[float] = []
    while not flood.done():
        sent = time.perf_counter()
        await probe.ask(_request("GET", "/health", token))
        asked.append(time.perf_counter() - sent)
        await asyncio.sleep(0.01)
    probe.close()
    return await flood, sorted(asked)


@contextmanager
def _server(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    """A running server, once its /health speaks of the submit phase."""
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _is_open(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[2]} did not start")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_open(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError:
        return False
    return b'"submit"' in answer


class _Bench:
    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.token = secrets.token_hex(32)
        self.turns = 0
        write_checkpoint(folder / "checkpoint")
        publish = ["publish", str(folder / "checkpoint"), "--store", str(folder / "store")]
        options = ["--block", "12345", "--version", "bench", "--groups", "4"]
        subprocess.run([*BZSTREAM, *publish, *options], check=True, stdout=subprocess.DEVNULL)
        self.shim = folder / "slow_fsync.so"
        source = str(PEERS / "slow_fsync.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(self.shim), source, "-ldl"], check=True)

    @contextmanager
    def start(self, name: str, *, slow: bool) -> Iterator[tuple[int, Path]]:
        """A server with a new ledger: its port and the ledger's file."""
        self.turns += 1
        port, ledger = free_port(), self.folder / f"ledger-{self.turns}.sqlite"
        environment = {"LD_PRELOAD": str(self.shim), "SLOW_FSYNC_MS": str(SLOW_MS)} if slow else {}
        if name == "bzstream":
            # All connections come from one address, and one more asks for /health.
            environment |= {"BZ_LOG_LEVEL": "error", "BZ_HTTP_MAX_CONNECTIONS_PER_CALLER": str(2 * CONNECTIONS)}
            with running_node(
                self.folder, "--ledger", str(ledger), token=self.token, block=BLOCK, environment=environment
            ) as node:
                yield node.port, ledger
            return
        command = [sys.executable, "-m", "uvicorn", "bench.peers.fastapi_sqlite:app", "--port", str(port)]
        command += ["--log-level", "error", "--no-access-log"]
        with _server(command, port, {**environment, "BZ_AUTH_TOKEN": self.token, "BENCH_LEDGER": str(ledger)}):
            yield port, ledger

    def turn(self, name: str, bodies: list[bytes], *, slow: bool) -> Load:
        """One turn; checks that everything that was answered 202 is in the ledger."""
        with self.start(name, slow=slow) as (port, ledger):
            requests = iter([_request("POST", "/submit", self.token, body) for body in bodies])
            load = uvloop.run(_load(port, requests, self.seconds))
        with sqlite3.connect(ledger) as connection:
            (held,) = connection.execute("SELECT count(*) FROM submissions").fetchone()
        connection.close()
        if set(load.statuses) != {202} or held != load.accepted:
            raise RuntimeError(f"{name} answered {load.statuses} and holds {held}")
        return load


def measure(quick: bool, folder: Path | None = None) -> dict[str, Any]:
    """Rows. `folder`: on the disk to measure."""
    turns, seconds = (1, 3.0) if quick else (3, 8.0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-", dir=folder) as work:
        bench = _Bench(Path(work), seconds)
        bodies = signed_bodies(int(seconds * 6000))
        for slow, label, least in ((False, "this disk", 2.0), (True, f"fsync + {SLOW_MS} ms", 10.0)):
            loads: dict[str, list[Load]] = {"bzstream": [], "FastAPI + SQLite": []}
            for _ in range(turns):
                for name, taken in loads.items():
                    taken.append(bench.turn(name, bodies, slow=slow))
            for name, taken in loads.items():
                p99 = [1000 * quantile(load.latencies, 0.99) for load in taken]
                target = "< 100" if slow and name == "bzstream" else ""
                rows += [
                    row_of(f"{name}, {label}", "202/s", [load.rate for load in taken], subject=name),
                    row_of(f"{name} p99, {label}", "ms", p99, subject=name, target=target),
                ]
            ours, theirs = ([load.rate for load in taken] for taken in loads.values())
            ratio = ratio_of(ours, theirs)
            rows.append(row_of(f"bzstream / FastAPI + SQLite, {label}", "x", [ratio], target=f">= {least:g}"))
        document = json.loads(bodies[0])
        document["block_number"] -= 1  # well formed, and not what was signed
        bad = _request("POST", "/submit", bench.token, json.dumps(document).encode())
        with bench.start("bzstream", slow=False) as (port, _):
            flood, health = uvloop.run(_flood(port, bad, bench.token, seconds))
        if set(flood.statuses) != {400}:
            raise RuntimeError(f"the flood was answered {flood.statuses}")
        rows.append(row_of("bad signatures refused", "400/s", [len(flood.latencies) / flood.seconds]))
        rows.append(row_of("/health p99 meanwhile", "ms", [1000 * quantile(health, 0.99)], target="< 20"))
    return {"rows": rows}


def main() -> None:
    command(
        "submissions",
        __doc__,
        measure,
        lambda parser: parser.add_argument("--folder", type=Path, help="where to work: the disk to measure"),
    )


if __name__ == "__main__":
    main()
