"""What one hostile client costs the others: processor time of heads and bodies, and places of connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.http import HttpError
from bzstream.http.io.limits import EXTRA_PER_CALLER, ConnectionLimits
from bzstream.http.protocol.request_parser import find_head, parse_head
from tests.http.corpus import HEADS
from tests.http.support import AUTH, Client, Running, wait_until
from tests.seeds import LONG, seeds

HEAD = 16 * 1024
MOST_S = 0.005
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
Serve = Callable[..., Running]


def cpu_of_head(head: bytes) -> float:
    """Thread CPU seconds to read a head, or to refuse it; the least of some tries."""
    least = 1.0
    for _ in range(3):
        begun = time.thread_time()
        with suppress(HttpError):
            if (end := find_head(head, 0)) > 0:
                parse_head(head[:end], 100)
        least = min(least, time.thread_time() - begun)
        if least < MOST_S:
            break
    return least


@pytest.mark.parametrize("name", HEADS)
def test_no_head_costs_5_ms(name: str) -> None:
    assert cpu_of_head(HEADS[name]) < MOST_S


units = st.one_of(
    st.sampled_from([b" ", b"\t", b"\0", b"\x0b", b"\x0c", b"\r", b"\n", b"\r\n", b"a", b":", b",", b'"', b"%", b"#"]),
    st.binary(min_size=1, max_size=4),
)
runs = st.tuples(units, st.sampled_from([1, 2, 100, HEAD]))
lines = st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"GET http://", b"GET / HTTP/1.1\r\nHost: a\r\nA:", b"a"])
ends = st.sampled_from([b"", b"\r\n\r\n", b" HTTP/1.1\r\nHost: a\r\n\r\n"])


@settings(max_examples=seeds(100, 3000), deadline=None)
@given(
    lines, st.lists(runs, min_size=1, max_size=4), st.sampled_from([b"", b"\r\n\r\n", b" HTTP/1.1\r\nHost: a\r\n\r\n"])
)
def test_no_pattern_of_bytes_costs_5_ms(start: bytes, pattern: list[tuple[bytes, int]], end: bytes) -> None:
    middle = b"".join((unit * count)[: HEAD // len(pattern)] for unit, count in pattern)
    assert cpu_of_head(start + middle[: HEAD - len(start) - len(end)] + end) < MOST_S


def server_cpu(server: Running) -> float:
    """Thread CPU seconds of the server's loop."""
    found: list[float] = []
    server.call(lambda: found.append(time.thread_time()))
    return found[0]


def chunked(target: str, method: str, chunk: bytes, count: int) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n"
    return head.encode() + chunk * count + b"0\r\n\r\n"


@pytest.mark.parametrize("chunk", [b"1\r\nx\r\n", b"1;" + b"e" * 14_000 + b"\r\nx\r\n"], ids=["tiny", "extended"])
@pytest.mark.parametrize(("method", "target"), [("GET", "/health"), ("POST", "/echo")])
def test_a_body_of_chunks_costs_what_its_limit_is_worth(serve: Serve, chunk: bytes, method: str, target: str) -> None:
    server = serve(linger_s=0.2)
    body = chunked(target, method, chunk, 65_536 if len(chunk) < 10 else 30)
    begun = server_cpu(server)
    with server.connect() as client:
        with suppress(ConnectionError):  # the server stops reading at its limit
            client.send(body)
        assert client.read().status == 413
        assert client.ends()
    assert server_cpu(server) - begun < 0.15, "h11 took 2 s for the one, and read every byte of the other"


def test_empty_lines_without_end_are_refused(serve: Serve) -> None:
    server = serve(linger_s=0.2)
    begun = server_cpu(server)
    with server.connect() as client:
        with suppress(ConnectionError):
            for _ in range(200):
                client.send(b"\r\n" * 8000)
        assert client.read().status == 400
    assert server_cpu(server) - begun < 0.15


@dataclass(eq=False)
class Held:
    """A connection as far as its limits go."""

    caller_slot: str | None = None
    extra_of: str | None = None
    closed: bool = field(default=False)


class Worker:
    """A server as far as its limits go."""

    def __init__(self, most: int, most_per_caller: int) -> None:
        self.limits: ConnectionLimits[Held] = ConnectionLimits(most, most_per_caller)
        self.held: list[Held] = []

    def accept(self, caller: str | None) -> Held | None:
        if (other := self.limits.connection_to_close(caller, len(self.held))) is not None:
            self.close(other)
        if not self.limits.has_room(caller, len(self.held)):
            return None
        self.held.append(Held())
        self.limits.add(self.held[-1], caller)
        return self.held[-1]

    def close(self, connection: Held) -> None:
        connection.closed = True
        self.held.remove(connection)
        self.limits.remove(connection)


def test_a_caller_holds_its_places_and_a_few_to_be_told() -> None:
    worker = Worker(1000, 64)
    crowd = [worker.accept("a") for _ in range(500)]
    assert len(worker.held) == 64 + EXTRA_PER_CALLER
    assert all(one is not None and not one.closed for one in crowd[:64]), "those that came first are not touched"
    assert crowd[-1] in worker.held, "the latest is held, so that it can prove another caller"
    assert worker.accept("b") is not None
    for one in list(worker.held):
        worker.close(one)
    assert worker.limits.counts_nobody


def test_who_proves_another_caller_leaves_the_crowd() -> None:
    worker = Worker(1000, 2)
    first, _, extra = (worker.accept("a") for _ in range(3))
    assert first is not None
    assert extra is not None
    assert not worker.limits.take_slot(extra, "a")
    assert worker.limits.take_slot(extra, "key")
    assert extra.extra_of is None
    assert worker.limits.take_slot(first, "key")
    assert not worker.limits.take_slot(Held(), "key"), "a caller's places are one count, wherever it comes from"
    assert worker.accept("a") is not None


def test_when_the_worker_is_full_who_waited_longest_gives_way() -> None:
    worker = Worker(3, 64)
    first, second, third = (worker.accept(caller) for caller in "abc")
    assert first is not None
    assert second is not None
    assert third is not None
    worker.limits.mark_busy(first)
    worker.limits.mark_waiting(second)
    assert worker.accept("d") is not None
    assert third.closed, "the second has moved since, the first is at work"
    worker.limits.mark_waiting(first)
    assert worker.accept("e") is not None
    assert second.closed
    assert not first.closed


def test_when_nobody_waits_some_are_held_to_be_told() -> None:
    worker = Worker(2, 1000)
    for _ in range(600):
        if (one := worker.accept("a")) is not None:
            worker.limits.mark_busy(one)
    assert len(worker.held) == 2 + 256


@pytest.fixture
def crowd() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect_from(address: str, port: int) -> Client:
    return Client(port, source=address)


@pytest.mark.parametrize("talks", [False, True], ids=["silent", "one health check each"])
def test_the_crowd_of_one_address_keeps_no_other_waiting(serve: Serve, crowd: ExitStack, talks: bool) -> None:
    count, most = (10_400, 10_000) if LONG else (700, 300)
    server = serve(max_connections=most)
    for _ in range(count):
        with suppress(ConnectionError):
            client = crowd.enter_context(connect_from("127.0.0.2", server.port))
            if talks:
                client.send(HEALTH)
                client.read()
    wait_until(lambda: server.server.connections <= 64 + EXTRA_PER_CALLER)
    waits = []
    for _ in range(5):
        begun = time.monotonic()
        with connect_from("127.0.0.3", server.port) as other:
            other.send(HEALTH)
            assert other.read().status == 200
        waits.append(time.monotonic() - begun)
    assert min(waits) < 0.1, waits


def test_idle_connections_of_many_addresses_give_way(serve: Serve, crowd: ExitStack) -> None:
    server = serve(max_connections=50)
    first = crowd.enter_context(connect_from("127.0.1.1", server.port))
    first.send(HEALTH)
    assert first.read().status == 200
    for number in range(100):
        client = crowd.enter_context(connect_from(f"127.0.1.{2 + number % 50}", server.port))
        client.send(HEALTH)
        assert client.read().status == 200, "each finds a place"
    wait_until(lambda: server.server.connections == 50)
    assert first.ends()


def test_behind_a_trusted_proxy_a_place_is_held_for_a_request_only(serve: Serve, crowd: ExitStack) -> None:
    server = serve(trusted_proxies=("127.0.0.0/8",), max_connections_per_caller=2)
    request = f"GET /peer HTTP/1.1\r\nHost: x\r\n{AUTH}X-Forwarded-For: 9.9.9.9\r\n\r\n"
    pool = [crowd.enter_context(server.connect()) for _ in range(6)]
    for client in pool:
        client.send(request)
        assert client.read().status == 200
    download = request.replace("/peer", "/file")
    slow = [crowd.enter_context(server.connect(receive_buffer=4096)) for _ in range(2)]
    for number, client in enumerate(slow):
        client.send(download)
        wait_until(lambda number=number: server.server.downloads == number + 1)  # type: ignore[misc]
    pool[0].send(request)
    assert pool[0].read().status == 429
    assert slow[0].read().body == server.application.content
    pool[1].send(request)
    assert pool[1].read().status == 200


def test_a_connection_over_the_limit_is_bounded_however_it_behaves(serve: Serve, crowd: ExitStack) -> None:
    """Also when all of them have been answered and keep their connections open."""
    server = serve(max_connections_per_caller=4)
    for _ in range(100):
        client = crowd.enter_context(server.connect())
        client.send(HEALTH)
        with suppress(ConnectionError, AssertionError):
            client.read()
    wait_until(lambda: server.server.connections <= 4 + EXTRA_PER_CALLER)
