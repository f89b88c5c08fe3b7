"""What is done per quantum and per chunk: a sender's turn, the page-cache probe, the hashes."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from pytest_benchmark.fixture import BenchmarkFixture

from bzstream.http.io.transports import PlainTransport
from bzstream.http.send.page_cache import PageCacheProbe
from bzstream.http.send.transfer import Transfer, TransferState
from bzstream.model.digest import CHUNK, ChunkHasher
from bzstream.payload import Extent, Payload, UnitFile

FILE = 64 << 20
QUANTUM = 256 << 10
"""Less than the setting's: what a socket pair takes at once without a reader on another core."""


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[UnitFile]:
    path = tmp_path / "unit"
    path.write_bytes(os.urandom(1 << 20) * (FILE >> 20))
    file = UnitFile(path)
    yield file
    file.release()


class Nobody:
    """The owner of a transfer that nobody waits for."""

    def transfer_done(self) -> None: ...

    def transfer_failed(self, error: Exception) -> None: ...


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection over loopback with room for a quantum; the first end does not block."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as reader,
        listener.accept()[0] as sender,
    ):
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * QUANTUM)
        sender.setblocking(False)
        reader.settimeout(10)
        yield sender, reader


def test_turn_of_256_kib(
    benchmark: BenchmarkFixture, unit: UnitFile, pair: tuple[socket.socket, socket.socket]
) -> None:
    """One turn of the sender, probe, sendfile and bookkeeping, and the reader's copy, in one thread."""
    sender, reader = pair
    probe, body = PageCacheProbe({}), Payload((Extent(unit, 0, FILE),))
    transfers: list[Transfer] = []

    def fresh() -> Transfer:
        transfers.append(Transfer(Nobody(), PlainTransport(sender), sender.fileno(), "miner", b"", body, 0.0))
        return transfers[-1]

    current, waste = fresh(), bytearray(QUANTUM)

    def turn() -> None:
        nonlocal current
        before = current.taken
        state = current.advance(QUANTUM, probe, time.monotonic())
        left = current.taken - before
        while left:
            left -= reader.recv_into(waste, min(left, QUANTUM))
        if state is TransferState.OVER:
            current.close()
            current = fresh()

    benchmark.extra_info["bytes"] = QUANTUM
    benchmark(turn)
    current.close()


def test_probe_2_mib_in_the_page_cache(benchmark: BenchmarkFixture, unit: UnitFile) -> None:
    probe = PageCacheProbe({})
    assert benchmark(probe.is_cached, unit, 8 << 20, 2 << 20)


def test_find_a_part_among_12000(benchmark: BenchmarkFixture, unit: UnitFile) -> None:
    """The full Qwen3-VL-30B-A3B is one payload of some 12,000 extents."""
    payload = Payload(tuple(Extent(unit, n * 4096, 4096) for n in range(12_000)))
    assert benchmark(payload.at, 11_000 * 4096 + 5)


def test_blake3_of_a_chunk(benchmark: BenchmarkFixture) -> None:
    data = memoryview(os.urandom(CHUNK))

    def digest() -> tuple[str, ...]:
        chunks = ChunkHasher()
        chunks.update(data)
        return chunks.finish()

    benchmark.extra_info["bytes"] = CHUNK
    assert benchmark(digest) == (blake3(data).hexdigest(),)


def test_sha256_of_a_chunk(benchmark: BenchmarkFixture) -> None:
    data = os.urandom(CHUNK)
    benchmark.extra_info["bytes"] = CHUNK
    assert benchmark(lambda: hashlib.sha256(data).digest())
