"""A TCP proxy for tests that counts what crosses it and holds it to a pace, all connections together."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PIECE = 8192
"""Bytes that are passed on at once: small beside what a kill may cost, and large enough that a few thousand pieces a
second leave the processor to the client."""


class Proxy:
    """Listens on loopback, forwards to `target`; `down` counts the bytes that went towards the client.

    Socket buffers are small, so that little is under way when a client dies. `change` is applied to each piece on its
    way to the client; an empty result ends that connection.
    """

    def __init__(self, target: tuple[str, int], rate: float) -> None:
        self._target = target
        self.rate = rate
        self.change: Callable[[bytes], bytes] | None = None
        self.flowing = threading.Event()
        """Cleared, nothing more is passed on towards the client."""
        self.flowing.set()
        self._lock = threading.Lock()
        self._next = time.monotonic()
        self.down = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def unread(self) -> int:
        """Bytes that lie in the client's sockets and that its process has not received (rx_queue, proc(5))."""
        total = 0
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
            _, _, remote, _, queues, *_ = line.split()
            if int(remote.split(":")[1], 16) == self.port:
                total += int(queues.split(":")[1], 16)
        return total

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        # Towards a client that is gone nothing is sent any more, and so nothing counted.
        for sock in (server, client):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(PIECE):
                if self.change is not None and not (data := self.change(data)):
                    break
                self._pace(len(data))
                self.flowing.wait()
                client.sendall(data)
                with self._lock:
                    self.down += len(data)
        for sock in (client, server):
            # A close alone ends nothing while the other thread is in a read of it.
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _pace(self, count: int) -> None:
        """Wait for this piece's turn on the one link that all connections share."""
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now - 0.004) + count / self.rate
            wait = self._next - now
        if wait > 0:
            time.sleep(wait)
