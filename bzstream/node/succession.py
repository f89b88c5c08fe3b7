"""A node takes over from a running one, so that no client notices: `serve --take-over SOCKET` on both.

A node that was started so listens on the Unix socket. The next one connects to it and is given the listening sockets
(SCM_RIGHTS). From then on both accept connections. When its HTTP workers are ready the successor says so, and the
predecessor stops accepting, ends its chain and evaluator roles, reports that they have ended, and lives on until its
downloads are finished. Only then the successor starts these roles: two of them never run beside each other. A successor
that fails before it is ready changes nothing.

The socket lies in a folder that nobody else may enter (mode 0700), and each side checks that the other one is a process
of the same user (SO_PEERCRED). `Predecessor` is for the successor; `SuccessionSocket` is for the node that may be
succeeded. Both are for the supervisor's thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import struct
from pathlib import Path

from bzstream.node.errors import NodeError

__all__ = ["Predecessor", "SuccessionSocket", "inherited_from_systemd", "predecessor_at"]

_MAX_LISTENERS = 253
"""As many descriptors as Linux takes in one message (SCM_MAX_FD)."""
_TAKE, _ENDED = b"take\n", b"ended\n"
_ANSWER_S = 10.0


class Predecessor:
    """The running node, as its successor sees it."""

    def __init__(self, connection: socket.socket, listeners: list[socket.socket]) -> None:
        self.listeners = listeners
        self._connection = connection

    async def step_down(self) -> None:
        """Tell it that this node serves now; returns when its chain and evaluator roles have ended, or it has."""
        loop = asyncio.get_running_loop()
        self._connection.setblocking(False)
        try:
            await loop.sock_sendall(self._connection, _TAKE)
            await loop.sock_recv(self._connection, len(_ENDED))
        except ConnectionError:
            pass  # it was killed meanwhile
        finally:
            self.close()

    def close(self) -> None:
        self._connection.close()


def predecessor_at(path: Path) -> Predecessor | None:
    """The node that listens at `path`, with its sockets; None when there is none. Raises NodeError."""
    _check_folder(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_S)
    try:
        connection.connect(str(path))
        _check_peer(connection)
        data, descriptors, _, _ = socket.recv_fds(connection, 4096, _MAX_LISTENERS)
        if not data:
            raise NodeError(f"the node at {path} is being succeeded already; try again when that is done")
        return Predecessor(connection, [socket.socket(fileno=fd) for fd in descriptors])
    except (FileNotFoundError, ConnectionRefusedError):  # no node, or one that was killed
        connection.close()
        return None
    except (OSError, NodeError) as error:
        connection.close()
        if isinstance(error, NodeError):
            raise
        raise NodeError(f"cannot take over at {path}: {error.strerror or error}; check --take-over") from None


class SuccessionSocket:
    """Where a successor asks for this node's sockets. `take_place` once this node serves."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def take_place(self) -> None:
        """Listen at the path, in place of a predecessor or of what a killed node left there. Raises NodeError."""
        _check_folder(self._path)
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(str(new))
            self._socket.listen(1)
            new.replace(self._path)
        except OSError as error:
            raise NodeError(f"cannot listen for a successor at {self._path}: {error.strerror or error}") from None
        self._socket.setblocking(False)

    async def successor(self, listeners: list[socket.socket]) -> socket.socket:
        """Offer the sockets to whoever asks, until one is ready: its connection, to be given to `report_end`."""
        loop = asyncio.get_running_loop()
        if self._socket is None:  # `take_place` failed: nobody can ask
            await loop.create_future()
        assert self._socket is not None
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            try:
                _check_peer(connection)
                socket.send_fds(connection, [json.dumps({"version": 1}).encode()], [s.fileno() for s in listeners])
                if await loop.sock_recv(connection, len(_TAKE)) == _TAKE:
                    return connection
            except (OSError, NodeError):
                pass
            connection.close()  # it gave up

    @staticmethod
    async def report_end(connection: socket.socket) -> None:
        """Tell the successor that this node's chain and evaluator roles have ended."""
        try:
            await asyncio.get_running_loop().sock_sendall(connection, _ENDED)
        except ConnectionError:
            pass
        connection.close()

    def close(self, *, succeeded: bool) -> None:
        """Stop listening; the path is left to a successor that listens there now."""
        if self._socket is not None:
            self._socket.close()
            if not succeeded:
                self._path.unlink(missing_ok=True)


def inherited_from_systemd() -> list[socket.socket]:
    """The sockets that systemd opened for this process (sd_listen_fds(3)); none without socket activation."""
    count = int(os.environ.get("LISTEN_FDS", "0")) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for the children
        os.environ.pop(name, None)
    sockets = []
    for fd in range(3, 3 + count):
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
        if listener.type != socket.SOCK_STREAM or listener.family not in (socket.AF_INET, socket.AF_INET6):
            raise NodeError(
                "systemd passed a socket that is no TCP listener; use ListenStream= with an address or port"
            )
        sockets.append(listener)
    return sockets


def _check_folder(path: Path) -> None:
    try:
        status = path.parent.stat()
    except OSError as error:
        raise NodeError(f"--take-over {path}: {error.strerror}; make its folder, with mode 0700") from None
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise NodeError(f"--take-over {path}: its folder must belong to this user and have mode 0700")


def _check_peer(connection: socket.socket) -> None:
    """Raise NodeError unless the other side runs as the same user (unix(7), SO_PEERCRED: pid, uid, gid)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise NodeError("the node to take over from runs as another user")
