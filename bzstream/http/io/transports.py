"""Transports: the bytes' way in and out of one connection. A non-blocking socket, plain here, TLS in `tls.py`.

Every call does what can be done at once; `sendfile` alone can be told to wait a little for room. Being unable to is an
ordinary result, not an error: `recv` says None, `send` says 0, `sendfile` says None. A connection that is gone is an
OSError from any of them. `recv`, `close_write` and `close` are for the event loop's thread; the methods of `Outgoing`
are for the thread that sends: the event loop's for short responses, a sending thread for long ones.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from typing import Protocol

from bzstream.http.send.transfer import Outgoing

__all__ = ["ROOM_WAIT_S", "PlainTransport", "Transport", "close", "unacknowledged"]

ROOM_WAIT_S = 0.02
"""How long a `sendfile` that may wait for room does: a reader of 50 MB/s makes room for another MB in this time."""
_ROOM_WAIT = struct.pack("@ll", 0, int(ROOM_WAIT_S * 1e6))
"""The same as the timeval that SO_SNDTIMEO takes (socket(7))."""


class Transport(Outgoing, Protocol):
    """What a connection needs of a transport."""

    secure: bool
    short_recv_means_empty: bool
    """Whether `recv` returns less than it was asked for only when nothing more has come."""

    def recv(self, size: int) -> bytes | None:
        """Up to `size` bytes; b"" when the peer sends no more; None when nothing has come."""

    def unacknowledged(self) -> int:
        """Bytes with the kernel that the peer has not acknowledged."""

    def close_write(self) -> None:
        """Say to the peer that no more will be sent."""

    def close(self, *, reset: bool) -> None:
        """Give the socket up. `reset`: at once, with whatever the kernel still holds for it."""


class PlainTransport:
    """TCP as it is."""

    __slots__ = ("_fd", "_socket", "_waits")

    secure = False
    short_recv_means_empty = True
    short_send_means_full = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._fd = sock.fileno()
        self._waits: bool | None = None

    def recv(self, size: int) -> bytes | None:
        try:
            return self._socket.recv(size, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes | memoryview, more: bool) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | (socket.MSG_MORE if more else 0))
        except (BlockingIOError, InterruptedError):
            return 0

    def sendfile(self, fd: int, offset: int, count: int) -> int | None:
        try:
            return os.sendfile(self._fd, fd, offset, count)
        except (BlockingIOError, InterruptedError):
            return None

    def wait_for_room(self, wait: bool) -> None:
        if wait is self._waits:
            return
        if wait and self._waits is None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _ROOM_WAIT)
        if wait or self._waits:
            os.set_blocking(self._fd, wait)
            self._waits = wait

    def flush(self) -> bool:
        return True

    def close_write(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def unacknowledged(self) -> int:
        return unacknowledged(self._fd)

    def close(self, *, reset: bool) -> None:
        close(self._socket, reset=reset)


def unacknowledged(fd: int) -> int:
    """Bytes in a TCP socket's send queue, sent and unacknowledged or not sent yet (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)


def close(sock: socket.socket, *, reset: bool) -> None:
    """Close a socket; with `reset` by RST, so that the kernel does not go on serving a peer that reads nothing."""
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
