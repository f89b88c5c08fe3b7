"""Many thousand mutated requests: whatever comes, the answer is one that the contract knows.

The connection is driven through a transport made of memory: the whole server but for the kernel's sockets, so that a
request costs a tenth of a millisecond. The seed is fixed: a failure shows itself again.
"""

from __future__ import annotations

import asyncio
import random
import re
import select
from pathlib import Path

import uvloop

from bzstream.config import HttpSettings
from bzstream.http import Server
from bzstream.http.io.connection import ConnectionState
from bzstream.payload import UnitFile
from tests.http.support import AUTH, Recorder, TinyApplication, no_descriptor_leak
from tests.http.transport import MemoryTransport
from tests.seeds import LONG, seeds

REQUESTS = seeds(15_000, 100_000)
ALLOWED = {100, 200, 204, 206, 304, 400, 401, 403, 404, 405, 412, 413, 416, 417, 431, 505}
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\nDate: |HTTP/1\.1 (100) Continue\r\n\r\n")

_H = "Host: x\r\n" + AUTH
SEEDS = [
    text.encode()
    for text in (
        f"GET /file HTTP/1.1\r\n{_H}Range: bytes=0-9,4090-4100,-5\r\n\r\n",
        f"GET /file HTTP/1.1\r\n{_H}If-None-Match: \"tag\", W/\"b\"\r\n\r\n",
        f"GET /file HTTP/1.1\r\n{_H}If-Modified-Since: Tue, 14 Nov 2023 22:13:20 GMT\r\n\r\n",
        f"HEAD /file HTTP/1.1\r\n{_H}If-Range: \"tag\"\r\nRange: bytes=5-\r\nConnection: close\r\n\r\n",
        f"GET /items/a%2fb?x=1&y=%C3%A9 HTTP/1.1\r\n{_H}Accept: */*\r\n\r\n",
        f"POST /echo HTTP/1.1\r\n{_H}Content-Length: 11\r\nExpect: 100-continue\r\n\r\nhello world",
        f"POST /echo HTTP/1.1\r\n{_H}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\n\r\n",
        "GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        f"GET http://host:80/health?q HTTP/1.1\r\n{_H}Upgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        f"OPTIONS * HTTP/1.1\r\n{_H}X-Forwarded-For: 1.2.3.4, [::1]:80\r\nX-Hotkey: 5F\r\n\r\n",
        f"GET /file HTTP/1.1\r\n{_H}Range: bytes=99999999-\r\n\r\n",
        f"DELETE /forbidden HTTP/1.1\r\n{_H}\r\n",
    )
]  # fmt: skip
TOKENS = [
    token.encode("latin-1")
    for token in (
        "\r\n", "\n", "\r", "\0", " ", "\t", ":", ",", ";", "\r\n\r\n", "\r\n ", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0",
        "Content-Length: 5\r\n", "Content-Length: 99999999999999999999\r\n", "Content-Length: -1\r\n",
        "Transfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip\r\n", "Expect: x\r\n", "Range: bytes=0-\r\n",
        "Range: bytes=-0\r\n", "Host: y\r\n", "Connection: close\r\n", "0\r\n\r\n", "ffffffffffffffff\r\n", "%00",
        "%ff", "A: " + "x" * 17_000 + "\r\n", "\xff", "bytes=", "9" * 30, "-", "*", '"', "?", "#", "/", "//", "..",
        "A: b\r\n" * 99,
    )
]  # fmt: skip


def mutate(rng: random.Random) -> bytes:
    """One to four changes to a seed, or to two of them in a row."""
    data = bytearray(rng.choice(SEEDS))
    if rng.random() < 0.2:
        data += rng.choice(SEEDS)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                del data[at : at + rng.randint(1, 10)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 60)]
            case 4 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case _:
                del data[at:]
    return bytes(data)


async def fuzz(application: TinyApplication, observer: Recorder, count: int) -> dict[int, int]:
    rng, seen = random.Random(20_260_101), dict.fromkeys(ALLOWED, 0)
    server = Server(HttpSettings(max_connections_per_caller=1_000_000, head_timeout_s=1000), application, observer)
    server.start([])
    for number in range(count):
        data = mutate(rng)
        cut = rng.randrange(len(data) + 1) if rng.random() < 0.5 else 0
        transport = MemoryTransport([piece for piece in (data[:cut], data[cut:]) if piece], eof=rng.random() < 0.7)
        connection = server.attach(transport, -1 - number, "127.0.0.1")
        connection.on_events(select.EPOLLIN)
        while connection.state is ConnectionState.SENDING or server.has_work:
            await asyncio.sleep(0)
        connection.close()
        assert transport.closed
        for status in STATUS.findall(bytes(transport.sent)):
            code = int(status[0] or status[1])
            assert code in ALLOWED, (code, data)
            seen[code] += 1
    assert server.connections == server.downloads == 0
    assert server.limits.counts_nobody
    await server.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return seen


def test_mutated_requests(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    path.write_bytes(bytes(9000))
    file = UnitFile(path)
    observer = Recorder()
    uvloop.run(asyncio.sleep(0))  # uvloop opens a pipe for signals once in a process
    with no_descriptor_leak():
        seen = uvloop.run(fuzz(TinyApplication(file), observer, REQUESTS))
    assert observer.errors == []
    assert sum(seen.values()) > REQUESTS / 2, "most requests get an answer; the others were cut short in the head"
    rare = {code for code, times in seen.items() if not times}
    assert rare <= ({403, 412} if LONG else {100, 403, 412}), f"the mutations never led to {rare}: {seen}"
    assert file.references == 1
    file.release()
