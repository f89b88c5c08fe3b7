"""Cutting a request off at a chosen await: the real API over real sockets, server and client on one event loop.

A handler's task is wrapped so that every suspension is counted. At the chosen one the *ending* begins (the client is
gone, the server closes) and takes its first step before the handler takes its next. Whatever ended, `Rig.assert_clean`
says what may be left of it: nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import ssl
import stat
import struct
import termios
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bzstream.api.access import AccessFiles
from bzstream.api.app import Api
from bzstream.api.state import WorkerState
from bzstream.chain.state import ChainState
from bzstream.config import AuthSettings, HttpSettings, Settings
from bzstream.http import Server
from bzstream.http.io.transports import unacknowledged
from bzstream.http.send.sender import Sender
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import AsyncLedger
from tests.api.desk import Desk
from tests.http.certificates import FIRST_CERT, FIRST_KEY
from tests.http.support import Recorder
from tests.nodes import TOKEN

__all__ = ["AUTH", "ENDINGS", "Peer", "Rig", "begin", "open_state", "until"]

AUTH = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\n"
ENDINGS = ("reset", "close", "server")
_RESET = struct.pack("ii", 1, 0)
_DEADLINE_S = 20.0
_BUFFER = 16 * 1024
"""Of the sockets: small, so that a download waits for its reader often."""


async def until(condition: Callable[[], bool], what: str) -> None:
    """Give the loop turns until the condition holds."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {_DEADLINE_S} s: {what}"
        await asyncio.sleep(0)


class Suspensions(Coroutine[Any, Any, Any]):
    """A coroutine that runs another and begins `ending` at its suspension number `at` (0: before its first step)."""

    def __init__(self, inner: Coroutine[Any, Any, Any], at: int, ending: Callable[[], None]) -> None:
        self._inner = inner
        self._left = at
        self._ending = ending
        self.reached = False
        self.cancelled = False
        self._count()

    def _count(self) -> None:
        if not self._left:
            self.reached = True
            self._ending()
        self._left -= 1

    def send(self, value: Any) -> Any:
        waited_for = self._inner.send(value)
        self._count()
        return waited_for

    def throw(self, *error: Any) -> Any:
        self.cancelled = True
        waited_for = self._inner.throw(*error)
        self._count()
        return waited_for

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise AssertionError("only a task runs this")


class Cut:
    """What became of the task that was to be cut off."""

    def __init__(self) -> None:
        self.task: Suspensions | None = None

    @property
    def reached(self) -> bool:
        """Whether the task came to the suspension at which the ending begins."""
        return self.task is not None and self.task.reached

    @property
    def cancelled(self) -> bool:
        return self.task is not None and self.task.cancelled


@asynccontextmanager
async def begin(at: int, ending: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[Cut]:
    """The next task that is made has `ending` begun at its suspension `at`.

    The ending is a task of its own: made inside the handler's step, it is run before the handler's next one.
    """
    loop = asyncio.get_running_loop()
    cut = Cut()
    endings: list[asyncio.Task[None]] = []

    def factory(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        loop.set_task_factory(None)
        cut.task = Suspensions(coroutine, at, lambda: endings.append(loop.create_task(ending())))
        return asyncio.Task(cut.task, loop=loop, **options)

    loop.set_task_factory(factory)  # type: ignore[arg-type]
    try:
        yield cut
    finally:
        loop.set_task_factory(None)
        await asyncio.gather(*endings)


@asynccontextmanager
async def open_state(store: Path, place: Path, **auth: Any) -> AsyncIterator[WorkerState]:
    """What a worker knows in the submit phase, with a ledger of its own. When the block ends, no file may be held."""
    ledger = AsyncLedger.open(place / "ledger.sqlite")
    chosen = Settings(auth=AuthSettings(token=TOKEN, trust_claimed_hotkey=True, **auth))
    state = WorkerState(
        settings=chosen,
        snapshots=SnapshotCache(store),
        access=AccessFiles(chosen.auth, warn=print),
        ledger=ledger,
        loopback=True,
        chain=ChainState(Desk.NOW, time.time(), frozen=True),
    )
    state.snapshots.refresh()
    units = [unit for version in state.snapshots.versions() for unit in version.units.values()]
    files = {file for unit in units for file in unit.payload.files}
    try:
        yield state
    finally:
        state.snapshots.close()
        ledger.close()
    assert [file.path.name for file in files if file.fd >= 0] == [], "files are let go"


def descriptors() -> int:
    """Open ones but the ledger's, which keeps its own count of connections and opens them when they are wanted."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile: the listing's own
            found += "ledger.sqlite" not in os.readlink(f"/proc/self/fd/{name}")
    return found


class Rig:
    """A server of the API, and what it may not leave behind. Use `async with`."""

    def __init__(
        self,
        state: WorkerState,
        *,
        tls: Path | None = None,
        make_sender: Callable[..., Sender] = Sender,
        **settings: Any,
    ) -> None:
        """`tls`: a folder to put a certificate into. One caller has few connections: none may keep its place."""
        self.api = Api(state)
        settings = {"max_connections_per_caller": 4} | settings
        if tls is not None:
            (tls / "cert.pem").write_text(FIRST_CERT)
            (tls / "key.pem").write_text(FIRST_KEY)
            settings |= {"tls_cert": str(tls / "cert.pem"), "tls_key": str(tls / "key.pem")}
        self.tls = tls is not None
        self.observer = Recorder()
        self.strays: list[dict[str, Any]] = []
        self._settings = HttpSettings(**settings)
        self._make_sender = make_sender

    async def __aenter__(self) -> Rig:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.strays.append(context))
        self._descriptors = descriptors()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.port: int = listener.getsockname()[1]
        self.server = Server(self._settings, self.api, self.observer, make_sender=self._make_sender)
        self.server.start([listener])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()
        await self.assert_clean()
        assert descriptors() == self._descriptors

    async def heard(self, peer: Peer) -> None:
        """Wait until the server has taken all that its client has sent."""

        def taken() -> bool:
            fd = peer.at_the_server()
            waiting = fd is None or fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) != bytes(4)
            return not (waiting or peer.unacknowledged())

        await until(taken, "the server has taken what was sent")

    def connect(self) -> Peer:
        return Peer(self.port, tls=self.tls)

    def ending(self, peer: Peer, how: str) -> Callable[[], Coroutine[Any, Any, None]]:
        """One of ENDINGS: the server closes, or the client is gone."""

        return self.server.close if how == "server" else lambda: self._vanish(peer, reset=how == "reset")

    async def _vanish(self, peer: Peer, *, reset: bool) -> None:
        """Of a reset the server has heard before anything else happens."""
        peer.close(reset=reset)
        deadline = time.monotonic() + _DEADLINE_S
        while reset and self.server.connections:
            self.server.turn()
            assert time.monotonic() < deadline, "a reset closes the connection"

    async def idle(self) -> None:
        """Wait until every request has ended; connections may be open yet."""
        me = asyncio.current_task()
        await until(lambda: not self.server.downloads and asyncio.all_tasks() == {me}, "requests end")

    async def assert_clean(self) -> None:
        """Once everything under way has ended, nothing is left: no task, transfer, place of a caller or error."""
        server, me = self.server, asyncio.current_task()
        await until(lambda: server.connections == server.downloads == 0, "connections and downloads end")
        await until(lambda: asyncio.all_tasks() == {me}, "tasks end")
        assert server.limits.counts_nobody
        assert len(server.timers) == 0
        assert self.observer.errors == []
        assert self.observer.damaged == []
        assert not self.strays, self.strays


class Peer:
    """A client on the server's own loop: plain or TLS, gone whenever it likes."""

    def __init__(self, port: int, *, tls: bool) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.connect(("127.0.0.1", port))
        self._socket.setblocking(False)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if tls:
            context = ssl.create_default_context(cadata=FIRST_CERT)
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self.received = bytearray()
        self.ended = False

    async def handshake(self) -> bytes:
        """Shake hands but for the last flight, which is returned unsent."""
        assert self._tls is not None
        while True:
            try:
                self._tls.do_handshake()
                return self._outgoing.read()
            except ssl.SSLWantReadError:
                self.push(self._outgoing.read())
                await until(self._fed, "the server's flight")

    def hello(self) -> bytes:
        """The first flight of the handshake, unsent."""
        assert self._tls is not None
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    def sealed(self, data: bytes) -> bytes:
        """What `data` is on the wire."""
        if self._tls is None:
            return data
        self._tls.write(data)
        return self._outgoing.read()

    async def send(self, data: bytes) -> None:
        """Send a request, after shaking hands."""
        last = await self.handshake() if self._tls is not None else b""
        self.push(last + self.sealed(data))

    def push(self, wire: bytes) -> None:
        """Put bytes on the wire; there is always room for the few that these tests send."""
        while wire:
            wire = wire[self._socket.send(wire) :]

    def at_the_server(self) -> int | None:
        """The descriptor of the connection's other end, which lies in this process; None before it is accepted."""
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # the listing's own descriptor, listening sockets
                if stat.S_ISSOCK(os.fstat(fd).st_mode) and _peer_of(fd) == self._socket.getsockname():
                    return fd
        return None

    def unacknowledged(self) -> int:
        """Bytes that were sent and have not arrived."""
        return unacknowledged(self._socket.fileno())

    def take(self) -> bool:
        """Receive what has come; whether that was anything."""
        if self._tls is None:
            data = self._some()
            self.received += data
            return bool(data) or self.ended
        took = self._fed()
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError, ssl.SSLEOFError):
            while piece := self._tls.read(1 << 16):
                self.received += piece
        return took

    def _fed(self) -> bool:
        data = self._some()
        self._incoming.write(data)
        if self.ended:
            self._incoming.write_eof()
        return bool(data) or self.ended

    def _some(self) -> bytes:
        try:
            data = self._socket.recv(_BUFFER)
        except BlockingIOError:
            return b""
        except ConnectionError:
            data = b""
        self.ended = not data
        return data

    def body(self) -> bytes:
        """What has come of the answer's body."""
        return bytes(self.received.partition(b"\r\n\r\n")[2])

    def close(self, *, reset: bool = False) -> None:
        if reset and self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._socket.close()


def _peer_of(fd: int) -> object:
    """The address at the other end of a socket that stays another's."""
    borrowed = socket.socket(fileno=fd)
    try:
        return borrowed.getpeername()
    finally:
        borrowed.detach()
