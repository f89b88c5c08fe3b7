"""The bytes' way in and out of one connection: a non-blocking socket, plain here, TLS in `tls.py`.

Every call does what can be done at once. Being unable to is an ordinary result, not an error: `recv` says None,
`send` says 0, `sendfile` says None. A connection that is gone is an OSError from any of them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from typing import Protocol

__all__ = ["Link", "PlainLink", "close", "unsent"]


class Link(Protocol):
    """What the connection and the sender need of a transport."""

    secure: bool
    short_is_empty: bool
    """Whether `recv` returns less than it was asked for only when nothing more has come."""
    short_is_full: bool
    """Whether `sendfile` sends less than it was asked only for want of room, so that trying again is in vain."""

    def recv(self, size: int) -> bytes | None:
        """Up to `size` bytes; b"" when the peer sends no more; None when nothing has come."""

    def send(self, data: bytes | memoryview, more: bool) -> int:
        """Take some of `data`, 0 when there is no room. `more`: hold a last small packet back, more follows."""

    def sendfile(self, fd: int, offset: int, count: int) -> int | None:
        """Send from a file: bytes sent, 0 at the end of the file, None when there is no room."""

    def flush(self) -> bool:
        """Whether all that was taken is with the kernel."""

    def unsent(self) -> int:
        """Bytes with the kernel that the peer has not acknowledged."""

    def finish(self) -> None:
        """Say to the peer that no more will be sent."""

    def close(self, *, reset: bool) -> None:
        """Give the socket up. `reset`: at once, with whatever the kernel still holds for it."""


class PlainLink:
    """TCP as it is."""

    __slots__ = ("_fd", "_socket")

    secure = False
    short_is_empty = True
    short_is_full = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._fd = sock.fileno()

    def recv(self, size: int) -> bytes | None:
        try:
            return self._socket.recv(size)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: bytes | memoryview, more: bool) -> int:
        try:
            return self._socket.send(data, socket.MSG_MORE if more else 0)
        except (BlockingIOError, InterruptedError):
            return 0

    def sendfile(self, fd: int, offset: int, count: int) -> int | None:
        try:
            return os.sendfile(self._fd, fd, offset, count)
        except (BlockingIOError, InterruptedError):
            return None

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def unsent(self) -> int:
        return unsent(self._fd)

    def close(self, *, reset: bool) -> None:
        close(self._socket, reset=reset)


def unsent(fd: int) -> int:
    """Bytes in a TCP socket's send queue, sent and unacknowledged or not sent yet (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)


def close(sock: socket.socket, *, reset: bool) -> None:
    """Close a socket; with `reset` by RST, so that the kernel does not go on serving a peer that reads nothing."""
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
