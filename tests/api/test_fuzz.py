"""Mutated requests over real sockets against the real node: the endpoints, whose parser and connection alone
`tests/http/io/test_fuzz` drives a hundred thousand times.

There are 2,000 of them, in a long run 100,000. Nearly all of a request's time is the node's, so
several clients keep two workers busy. The seeds are fixed.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.api.desk import Desk, new_key, signed, troubles
from tests.http.io.test_fuzz import TOKENS
from tests.nodes import TOKEN, Node, child_processes, eventually, running_node
from tests.seeds import seeds

REQUESTS = seeds(2_000, 100_000)
WORKERS, CLIENTS = 2, 4
ALLOWED = {100, 200, 202, 204, 206, 304} | {400, 401, 403, 404, 405, 409, 412, 413, 416, 417, 423, 429, 431, 503, 505}
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n(?:Date: [^\r]+\r\nServer: bzstream|\r\n)")
HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
MORE = [text.encode() for text in (
    "X-Hotkey: 5F\r\n", "X-Expert-Group: 00\r\n", "X-Bittensor-Version: 1\r\n", "Authorization: Bearer x\r\n",
    "?version=step_1000", "?format=safetensors&", "&round=1", "%2e%2e/", '"expert_group":0,', "\\ud800", "1e3", "-0",
    '{"a":' * 500, "If-None-Match: *\r\n", "If-Range: \"", "Range: bytes=0-0,-1,5-\r\n",
    "\u0661\u00b2",
)]  # fmt: skip


def good_requests(node: Node) -> list[bytes]:
    """Requests that are good, to be made worse."""
    base = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\nX-Hotkey: {HOTKEY}\r\nX-Expert-Group: 0\r\n"
    bound = f"Host: x\r\nAuthorization: Bearer {node.validator_token}\r\n"
    body = json.dumps(signed(new_key(), Desk.NOW))
    texts = [
        f"GET /model/partial HTTP/1.1\r\n{base}\r\n",
        f"GET /model/partial?format=safetensors&version=step_1000 HTTP/1.1\r\n{base}Range: bytes=0-9,100-,-5\r\n\r\n",
        f"HEAD /model/shared HTTP/1.1\r\n{base}If-Modified-Since: Tue, 14 Nov 2023 22:13:20 GMT\r\n\r\n",
        f'GET /model/full HTTP/1.1\r\n{bound}If-None-Match: "a", W/"b"\r\n\r\n',
        f"GET /model/partial/manifest HTTP/1.1\r\n{base}\r\n",
        f"GET /model HTTP/1.1\r\n{base}X-Bittensor-Nonce: 1\r\n\r\n",
        f"GET /scores?round=12520 HTTP/1.1\r\n{base}\r\n",
        f"GET /submissions/550e8400-e29b-41d4-a716-446655440000 HTTP/1.1\r\n{base}\r\n",
        f"GET /model/shared HTTP/1.1\r\n{base}If-None-Match: *\r\n\r\n",
        f"GET /model/shared HTTP/1.1\r\n{base}Range: bytes=99999-\r\n\r\n",
        f'GET /model/shared HTTP/1.1\r\n{base}If-Match: "a"\r\n\r\n',
        f"POST /submit HTTP/1.1\r\n{base}Content-Length: {len(body)}\r\n\r\n{body}",
        f"POST /submit HTTP/1.1\r\n{base}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    return [text.encode() for text in texts]


def mutate(rng: random.Random, good: list[bytes]) -> bytes:
    """One to three changes to a request, or to two in a row; half of them leave the framing as it is."""
    data = bytearray(rng.choice(good))
    if rng.random() < 0.3:
        data += rng.choice(good)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 | 1 | 2 if at < len(data) and data[at] > 32:
                data[at] = rng.randrange(33, 127)
            case 3 if at < len(data):
                data[at] = rng.randrange(256)
            case 4:
                ends = [n for n in range(len(data)) if data[n : n + 2] == b"\r\n"]
                at = rng.choice(ends) + 2 if ends and rng.random() < 0.5 else at
                data[at:at] = rng.choice(TOKENS + MORE)
            case 5:
                del data[at : at + rng.randint(1, 10)]
            case _:
                data[at:at] = data[at : at + rng.randint(1, 60)]
    return bytes(data)


def talk(port: int, data: bytes, rng: random.Random) -> bytes:
    """Send it, say that no more comes, and read to the end; sometimes go away instead."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        try:
            client.sendall(data)
            if rng.random() < 0.05:
                return b""
            client.shutdown(socket.SHUT_WR)
            received = bytearray()
            while piece := client.recv(1 << 20):
                received += piece
        except ConnectionError:  # more input after the last answer than the server listens to
            return b""
        return bytes(received)


@pytest.fixture
def fuzzed(small_store: Path, tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "store").symlink_to(small_store)
    with running_node(tmp_path, "--ledger", str(tmp_path / "ledger.sqlite"), "--workers", str(WORKERS)) as node:
        desk = Desk(node)
        desk.go_to(Desk.NOW)
        yield desk


def descriptors(process: int) -> int:
    """Open descriptors but the ledger's, whose connections are opened when they are first wanted."""
    found = []
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:  # closed meanwhile
            continue
    return len([name for name in found if "ledger.sqlite" not in name])


def resident(process: int) -> int:
    """MiB."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


def fuzz(node: Node, seed: int, count: int) -> Counter[int]:
    """Send `count` mutated requests; how often each status was answered."""
    rng, good = random.Random(seed), good_requests(node)
    seen: Counter[int] = Counter()
    for _ in range(count):
        data = mutate(rng, good)
        received = talk(node.port, data, rng)
        statuses = [int(status) for status in STATUS.findall(received)]
        assert set(statuses) <= ALLOWED, (statuses, data)
        assert TOKEN.encode() not in received
        seen.update(statuses)
    return seen


@pytest.mark.slow
def test_mutated_requests(fuzzed: Desk) -> None:
    node, rng = fuzzed.node, random.Random(20_260_102)
    workers = child_processes(node.process.pid, "http")
    assert len(workers) == WORKERS
    good = good_requests(node)
    before = [descriptors(worker) for worker in workers]
    for _ in range(seeds(150, 500) * WORKERS):  # what is allocated once is allocated now
        talk(node.port, rng.choice(good), rng)
    memory = [resident(worker) for worker in workers]
    with ThreadPoolExecutor(CLIENTS) as pool:
        counts = [pool.submit(fuzz, node, 20_260_103 + client, REQUESTS // CLIENTS) for client in range(CLIENTS)]
        seen = sum((count.result() for count in counts), Counter[int]())
    assert sum(seen.values()) > REQUESTS * 0.8
    assert {200, 202, 206, 304, 400, 401, 403, 404, 405, 409, 412, 413, 416, 431, 505} <= set(seen), seen
    assert not seen[503], seen
    eventually(
        lambda: all(descriptors(worker) <= held for worker, held in zip(workers, before, strict=True)),
        "no descriptor is left open",
    )
    assert all(resident(worker) - taken < 24 for worker, taken in zip(workers, memory, strict=True))
    assert child_processes(node.process.pid, "http") == workers
    assert troubles(node) == []
    assert node.health()["status"] == "healthy"
