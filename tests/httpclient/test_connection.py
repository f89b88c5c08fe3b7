"""One connection against scripted servers: framing, limits, time-outs, what can follow on it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from bzstream.httpclient import Connection, ConnectionLost, ProtocolViolation, Stalled
from tests.httpclient.conftest import Serve, answering, read_request

Connect = Callable[..., Connection]


def whole_body(connection: Connection, size: int = 100) -> bytes:
    found, view = b"", memoryview(bytearray(size))
    while count := connection.read_into(view):
        found += view[:count]
    return found


@pytest.mark.parametrize(
    ("answer", "body", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: x, Close\r\n\r\nhello", b"hello", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more", b"hello", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\nmore", b"", False),
        (b"HTTP/1.1 103 Hint\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", True),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_bodies(answer: bytes, body: bytes, reusable: bool, size: int, serve: Serve, connect: Connect) -> None:
    connection = connect(serve(answering(answer)))
    connection.exchange("GET", "/")
    assert whole_body(connection, size) == body
    assert connection.read_into(memoryview(bytearray(1))) == 0
    assert connection.reusable is reusable


def test_a_body_without_framing_ends_with_the_connection(serve: Serve, connect: Connect) -> None:
    connection = connect(serve(answering(b"HTTP/1.1 200 OK\r\n\r\nhello", hold=False)))
    assert connection.exchange("GET", "/").status == 200
    assert connection.remaining is None
    assert whole_body(connection) == b"hello"
    assert not connection.reusable


def test_the_next_request_goes_over_the_same_connection(serve: Serve, connect: Connect) -> None:
    large = bytes(range(256)) * 1000
    pieces = [large[at : at + 5000] for at in range(0, len(large), 5000)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    connection = connect(
        serve(
            answering(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nContent-Length: 256000\r\n\r\n" + large,
                b"HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\nyes",
            )
        )
    )
    for size in (7777, 100_000):
        connection.exchange("GET", "/")
        assert whole_body(connection, size) == large
    assert connection.exchange("GET", "/").status == 404
    assert connection.read_document(3) == b"yes"
    assert connection.requests == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello0\r\n\r\n", ProtocolViolation),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ProtocolViolation),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 2000, ProtocolViolation),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + bytes(200), ProtocolViolation),
        (b"HTTP/1.1 200 OK\r\nX:" + b" " * 16_300 + b"\0\r\n\r\n", ProtocolViolation),
    ],
)
def test_what_ends_an_exchange(answer: bytes, error: type[Exception], serve: Serve, connect: Connect) -> None:
    connection = connect(serve(answering(answer, hold=False)))

    def whole() -> bytes:
        connection.exchange("GET", "/")
        return connection.read_document(100)

    with pytest.raises(error):
        whole()


def test_single_bytes_as_chunks_are_refused_for_little_work(serve: Serve, connect: Connect) -> None:
    connection = connect(
        serve(answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 200_000, hold=False))
    )
    connection.exchange("GET", "/")
    began = time.thread_time()
    with pytest.raises(ProtocolViolation, match="more framing than content"):
        whole_body(connection)
    assert time.thread_time() - began < 1.0


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
def test_silence_is_a_stall(begin: bytes, serve: Serve, connect: Connect) -> None:
    connection = connect(serve(answering(begin)), stall_s=0.2)

    def whole() -> bytes:
        connection.exchange("GET", "/")
        return connection.read_document(100)

    with pytest.raises(Stalled):
        whole()


def test_a_head_that_drips_is_a_stall(serve: Serve, connect: Connect) -> None:
    over = threading.Event()

    def drip(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not over.wait(0.02):
            sock.sendall(b"a")

    connection = connect(serve(drip), stall_s=0.3)
    with pytest.raises(Stalled, match="too slow"):
        connection.exchange("GET", "/")
    over.set()


def test_a_wait_can_be_given_up(serve: Serve, connect: Connect) -> None:
    class GivenUp(Exception):
        pass

    calls = []

    def on_wait() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise GivenUp

    connection = connect(serve(answering(b"")), stall_s=60, slice_s=0.02, on_wait=on_wait)
    with pytest.raises(GivenUp):
        connection.exchange("GET", "/")


def test_an_interrupt_from_another_thread_ends_a_read(serve: Serve, connect: Connect) -> None:
    connection = connect(serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")), stall_s=60)
    connection.exchange("GET", "/")
    threading.Timer(0.1, connection.interrupt).start()
    with pytest.raises(ConnectionLost):
        whole_body(connection)


def test_a_post_carries_its_body_and_length(serve: Serve, connect: Connect) -> None:
    seen: list[bytes] = []

    def script(sock: socket.socket) -> None:
        data = b""
        while not data.endswith(b"{}"):
            data += sock.recv(65536)
        seen.append(data)
        sock.sendall(b"HTTP/1.1 202 OK\r\nContent-Length: 0\r\n\r\n")

    connection = connect(serve(script))
    assert connection.exchange("POST", "/a?b", [("X-Y", "z")], b"{}").status == 202
    assert seen[0].startswith(b"POST /a?b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nContent-Length: 2\r\n\r\n{}" in seen[0]
