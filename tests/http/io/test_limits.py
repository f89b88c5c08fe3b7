"""Time-outs, connection limits, draining: what keeps a worker alive among the slow, the many and the hostile."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from bzstream.config import HttpSettings
from bzstream.http import Server
from bzstream.http.io.server import TURN_S
from bzstream.payload import UnitFile
from tests.http.support import (
    AUTH,
    Client,
    ManualClock,
    Recorder,
    Running,
    TinyApplication,
    no_descriptor_leak,
    wait_until,
)
from tests.http.transport import MemoryTransport

Serve = Callable[..., Running]
HEALTH = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
PEER = "GET /peer HTTP/1.1\r\nHost: x\r\n" + AUTH
WAIT = "GET /wait HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n"
FILE = "GET /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n"
BODY = "POST /echo HTTP/1.1\r\nHost: x\r\n" + AUTH + "Content-Length: 5\r\n\r\n"


def write_for_ever(client: Client) -> None:
    while True:
        client.send(b"x" * 50_000)


def test_a_head_that_comes_too_slowly(serve: Serve) -> None:
    clock = ManualClock()
    server = serve(head_timeout_s=8, idle_timeout_s=20, parts={"clock": clock})
    with server.connect() as client, server.connect() as silent:
        client.send("GET /h")
        server.heard(client)
        clock.advance(7)
        client.send("ea")
        server.heard(client)
        assert server.server.connections == 2
        clock.advance(2)
        answer = client.read()
        server.heard(client)
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert silent.ends(), "a connection that never sent a byte is closed without an answer"
        clock.advance(3)
        assert client.ends()
    with server.connect() as client:
        client.send(HEALTH)
        client.read()
        server.heard(client)
        clock.advance(7)
        client.send("GET /h")
        server.heard(client)
        clock.advance(7)
        assert server.server.connections == 1, "the time-out counts anew for each request"
        clock.advance(2)
        assert client.read().status == 408


def test_many_deadlines_that_expire_at_once_keep_nobody_waiting(unit_path: Path) -> None:
    """Whatever their number, a turn of the loop handles as many as it has time for, and one at least."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += TURN_S  # by this clock every call takes a whole turn
        return now

    async def main(application: TinyApplication) -> None:
        nonlocal now
        settings = HttpSettings(idle_timeout_s=500, head_timeout_s=500, linger_s=500)
        server = Server(settings, application, Recorder(), clock=clock)
        transports = [MemoryTransport([], eof=False) for _ in range(40)]
        for number, transport in enumerate(transports):
            server.attach(transport, -1 - number, "127.0.0.1")
        server.start([])
        now += 1000
        async with asyncio.timeout(10):
            while not server.has_work:
                await asyncio.sleep(0)  # the loop's own turns come one between two of these
        open_now = server.connections
        assert open_now > 30
        while server.connections:
            server.turn()
            open_now -= 1
            assert server.connections == open_now
        assert all(transport.closed for transport in transports)
        await server.close()

    file = UnitFile(unit_path)
    asyncio.run(main(TinyApplication(file)))
    file.release()


def test_a_body_that_comes_too_slowly(serve: Serve) -> None:
    clock = ManualClock()
    server = serve(body_timeout_s=10, parts={"clock": clock})
    with server.connect() as client:
        client.send(BODY + "hel")
        server.heard(client)
        clock.advance(9)
        client.send("l")
        server.heard(client)
        clock.advance(2)
        answer = client.read()
        server.heard(client)
        assert (answer.status, answer.code) == (408, "request_timeout")
        clock.advance(3)
        assert client.ends()


def test_an_idle_connection(serve: Serve) -> None:
    clock = ManualClock()
    server = serve(parts={"clock": clock})
    with server.connect() as client:
        for _ in range(3):
            client.send(HEALTH)
            assert client.read().status == 200
            server.heard(client)
            clock.advance(70)
        assert server.server.connections == 1
        clock.advance(6)
        assert client.ends()


def test_a_client_that_goes_on_writing_after_the_last_answer(serve: Serve) -> None:
    server = serve(linger_s=0.3, linger_bytes=100_000)
    with server.connect() as client:
        client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert client.read().status == 401
        with pytest.raises(ConnectionError):
            write_for_ever(client)
    with server.connect() as client:
        client.send("GET /health HTTP/1.0\r\n\r\n")
        assert client.read().status == 200
        wait_until(lambda: server.server.connections == 0)


def test_limits_of_size(serve: Serve) -> None:
    server = serve(max_head=300, max_fields=5, max_body=5)
    assert server.ask("GET /health HTTP/1.1\r\nHost: x\r\nA: " + "x" * 200 + "\r\n\r\n").status == 200
    assert server.ask("GET /health HTTP/1.1\r\nHost: x\r\nA: " + "x" * 300 + "\r\n\r\n").status == 431
    assert server.ask("GET /health HTTP/1.1\r\nHost: x\r\n" + "A: b\r\n" * 5 + "\r\n").status == 431
    assert server.ask(BODY + "hello").body == b"hello"
    assert server.ask(BODY.replace("5", "6") + "hello!").status == 413


def test_connections_of_one_caller(serve: Serve) -> None:
    server = serve(max_connections_per_caller=2, linger_s=0.2)
    with server.connect() as first, server.connect() as second, server.connect() as third:
        for client in (first, second):
            client.send(PEER + "\r\n")
            assert client.read().status == 200
        wait_until(lambda: server.server.connections == 3)
        third.send(HEALTH)
        assert third.read().status == 200, "health is always answered"
        third.send(PEER + "X-Hotkey: A\r\n\r\n")
        assert third.read().status == 200, "a proven hotkey counts for itself"
        third.send(PEER + "\r\n")
        answer = third.read()
        assert (answer.status, answer.code, answer.get("retry-after")) == (429, "too_many_connections", "1")
        assert third.ends()
        first.send(PEER + "\r\n")
        assert first.read().status == 200, "those that came before are not touched"
        second.socket.close()
        wait_until(lambda: server.server.connections == 1)
        assert server.ask(PEER + "\r\n").status == 200


def test_400_and_403_come_before_429_and_no_handler_runs_for_it(serve: Serve) -> None:
    server = serve(max_connections_per_caller=1)
    with server.connect() as first:
        first.send(PEER + "\r\n")
        assert first.read().status == 200
        for target, status in (("/forbidden", 403), ("/items/1?a=1&a=2", 400), ("/file", 429), ("/bug", 429)):
            assert server.ask(f"GET {target} HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n").status == status
        assert server.ask(BODY + "hello").status == 429, "what changes things is not begun"
        assert server.ask(PEER.replace("Bearer", "Basic") + "\r\n").status == 401
        assert server.ask(PEER.replace("/peer", "/unknown") + "\r\n").status == 404
        assert server.ask(WAIT).status == server.ask(WAIT.replace("GET", "POST")).status == 429
    assert server.observer.errors == [], "/bug did not run"
    assert not server.application.started.is_set(), "nor did /wait"


def test_a_full_worker(serve: Serve) -> None:
    server = serve(max_connections=2)
    with ExitStack() as stack:
        for number in range(2):
            client = stack.enter_context(server.connect(receive_buffer=4096))
            client.send(FILE)
            wait_until(lambda number=number: server.server.downloads == number + 1)  # type: ignore[misc]
        third = stack.enter_context(server.connect())
        third.send(PEER + "\r\n")
        answer = third.read()
        assert (answer.status, answer.code, answer.get("retry-after")) == (503, "server_full", "1")
        assert third.ends()
        assert server.ask(HEALTH).status == 200
    wait_until(lambda: server.server.connections == 0)
    assert server.ask(PEER + "\r\n").status == 200


def test_far_more_connections_than_a_worker_takes(serve: Serve) -> None:
    server = serve(max_connections=1)
    with no_descriptor_leak():
        clients = [server.connect() for _ in range(400)]
        wait_until(lambda: any(_closed(client) for client in clients))
        assert server.server.connections <= 1 + 256
        for client in clients:
            client.socket.close()
        wait_until(lambda: server.server.connections == 0)
    assert server.ask(PEER + "\r\n").status == 200


def _closed(client: Client) -> bool:
    client.socket.setblocking(False)
    try:
        return client.socket.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_draining(serve: Serve) -> None:
    server = serve(linger_s=0.2)
    with server.connect() as idle, server.connect(receive_buffer=4096) as download, server.connect() as late:
        for client in (idle, late):
            client.send(HEALTH)
            assert client.read().status == 200
        late.send("GET /peer HT")
        download.send(FILE)
        wait_until(lambda: server.server.downloads == 1)
        wait_until(lambda: server.server.connections == 3)
        drained = asyncio.run_coroutine_threadsafe(server.server.drain(20), server.loop)
        assert idle.ends()
        late.send("TP/1.1\r\nHost: x\r\n" + AUTH + "\r\n")
        answer = late.read()
        assert (answer.status, answer.code, answer.get("retry-after")) == (503, "draining", "1")
        assert late.ends()
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert not drained.done()
        assert download.read().body == server.application.content
        assert download.ends()
        assert drained.result(10) is True


def test_draining_has_an_end(serve: Serve) -> None:
    server = serve()
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: server.server.downloads == 1)
        assert asyncio.run_coroutine_threadsafe(server.server.drain(0.1), server.loop).result(10) is False


def test_behind_a_trusted_proxy(serve: Serve) -> None:
    server = serve(trusted_proxies=("127.0.0.0/8",), max_connections_per_caller=1)
    forwarded = PEER + "X-Forwarded-For: 1.1.1.1, 9.9.9.9\r\nX-Forwarded-Proto: https\r\n\r\n"
    with server.connect() as first, server.connect() as second:
        for client, peer in ((first, "9.9.9.9"), (second, "8.8.8.8")):
            client.send(forwarded.replace("9.9.9.9", peer))
            answer = client.read()
            assert answer.body == f'["{peer}","{peer}",true]'.encode()
        second.send(forwarded)
        assert second.read().status == 200, "a place is held for the request alone"


def test_idle_connections_are_cheap(serve: Serve) -> None:
    """The contract allows 24 KiB; a tenth of that is what one takes."""
    import tracemalloc

    server = serve(max_connections_per_caller=10_000)
    clients = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(HEALTH.encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            clients.append(client)
        server.call(lambda: None)
        used = (tracemalloc.get_traced_memory()[0] - before) / 500
    finally:
        tracemalloc.stop()
        for client in clients:
            client.close()
    assert used < 4096, used


def test_the_loop_of_the_standard_library_serves_too(serve: Serve) -> None:
    server = serve(parts={"uv": False})
    assert server.ask(FILE).body == server.application.content


class Exhausted(socket.socket):
    """A listener that cannot accept twice, then can."""

    refused = 0

    def accept(self) -> tuple[socket.socket, object]:
        if self.refused < 2:
            self.refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_descriptors_accepting_pauses_and_goes_on(serve: Serve) -> None:
    listener = Exhausted()
    listener.bind(("127.0.0.1", 0))
    server = serve(parts={"make_listener": lambda: listener})
    assert server.ask(HEALTH).status == 200
    assert listener.refused == 2
