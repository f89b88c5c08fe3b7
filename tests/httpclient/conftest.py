"""Scripted servers on loopback, and the connections to them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from bzstream.httpclient import Connection, Origin

Script = Callable[[socket.socket], None]
"""What a server does with one connection."""
Serve = Callable[..., int]
"""Starts a server with a script (and an address family); its port."""


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(script: Script, host: str = "127.0.0.1") -> int:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family, backlog=64)
            stack.callback(listener.close)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)

            def handle(sock: socket.socket) -> None:
                with sock, suppress(OSError):
                    script(sock)

            def accept() -> None:
                with suppress(OSError):
                    while True:
                        threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

            threading.Thread(target=accept, daemon=True).start()
            return int(listener.getsockname()[1])

        yield start


@contextmanager
def silent_port(host: str, port: int = 0) -> Iterator[int]:
    """A port at which no connection is ever completed: the listener's queue is full, so that the kernel drops SYNs."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, port), family=family, backlog=0))
        for _ in range(3):
            caller = stack.enter_context(socket.socket(family))
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


def read_request(sock: socket.socket) -> bytes:
    """The bytes of one request without a body."""
    found = b""
    while not found.endswith(b"\r\n\r\n"):
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError
        found += piece
    return found


def answering(*answers: bytes, hold: bool = True) -> Script:
    """A server that sends these bytes, one after another, to each request; then waits for the client to go, or not."""

    def script(sock: socket.socket) -> None:
        for answer in answers:
            read_request(sock)
            sock.sendall(answer)
        if hold:
            sock.recv(1)

    return script


@pytest.fixture
def connect() -> Iterator[Callable[..., Connection]]:
    """A plain connection to a port of loopback."""
    with ExitStack() as stack:

        def start(port: int, **changes: object) -> Connection:
            sock = socket.create_connection(("127.0.0.1", port))
            arguments = {"stall_s": 1.0, **changes}
            connection = Connection(sock, Origin("http", "127.0.0.1", port), **arguments)  # type: ignore[arg-type]
            stack.callback(connection.close)
            return connection

        yield start
