"""The server of one worker: accepts connections, polls them, limits them, keeps time, and orders the work of the loop.

All sockets of the worker are in one epoll set of our own, edge-triggered, and that set is the only thing that the event
loop watches. A connection is registered once in its life, and there is no object in the loop for it. The server runs on
any asyncio loop that has `add_reader`; on uvloop for speed. Everything here is for the thread of that loop.

One turn: take the poller's events; let connections act on them, then on deadlines that expired, then resume those that
had more to do, for at most `TURN_S`; accept; if anything is left, ask for another turn and go back to the loop. Long
responses are not sent by the loop: `send/sender.py` sends them.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine

from bzstream.config import HttpSettings
from bzstream.http.io.connection import Connection
from bzstream.http.io.limits import RESERVE, ConnectionLimits
from bzstream.http.io.observer import Application, Observer
from bzstream.http.io.timers import TimerWheel
from bzstream.http.io.tls import Certificate, TlsTransport
from bzstream.http.io.transports import PlainTransport, Transport
from bzstream.http.protocol.messages import HttpError
from bzstream.http.protocol.peers import TrustedProxies, caller_of, plain_address
from bzstream.http.send.sender import Sender

__all__ = ["TURN_S", "Server", "raise_descriptor_limit"]

TURN_S = 0.004
"""Seconds that one turn spends on connections before it looks for new connections and events. Long enough for the
events of 100 requests, short enough that nobody notices a turn of others."""

_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_ACCEPTS = 16
"""Connections taken from one listener in a row."""
_BATCH = 256
"""Events fetched from the kernel at a time."""
_SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE_S = 0.2
"""Without descriptors or memory for another connection, accepting pauses for so long."""
_TICK_S = 0.01
_OTHER_DESCRIPTORS = 1024
"""Unit files of the snapshots, databases, pipes."""
OUTLIVED_IDLE_S = 5.0
"""A client that sends requests one after the other has sent its next one by then; others connect anew."""
_RETRY_AFTER = (("Retry-After", "1"),)


def raise_descriptor_limit(wanted: int) -> int:
    """Raise RLIMIT_NOFILE towards `wanted` descriptors as far as the hard limit lets; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


class Server:
    """Serves an application on listening sockets that it is given.

    `start` it on a running loop; `await drain()` to end politely; `await close()` to end now. Both give the sockets up.
    """

    def __init__(
        self,
        settings: HttpSettings,
        application: Application,
        observer: Observer,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_sender: Callable[[asyncio.AbstractEventLoop, Callable[[Exception], None]], Sender] = Sender,
    ) -> None:
        """Without `loop`: the running one. `make_sender` gets the loop and what to call should the sender fail.

        Raises ValueError for `trusted_proxies` that are no networks, TlsError for a certificate that cannot be used.
        """
        # What connections use.
        self.limits: ConnectionLimits[Connection] = ConnectionLimits(
            settings.max_connections, settings.max_connections_per_caller
        )
        self.settings = settings
        self.application = application
        self.observer = observer
        self.clock = clock
        self.proxies = TrustedProxies(settings.trusted_proxies)
        self.draining = False
        self._outlived = False
        self._certificate: Certificate | None = None
        if settings.tls_cert is not None or settings.tls_key is not None:
            self._certificate = Certificate(settings.tls_cert or "", settings.tls_key or "")
        shortest = min(
            settings.head_timeout_s,
            settings.body_timeout_s,
            settings.idle_timeout_s,
            settings.stall_timeout_s,
            settings.linger_s,
        )
        # Time-outs are kept to within an eighth, or a second.
        self.timers = TimerWheel(min(1.0, shortest / 8), clock())
        self._loop = loop or asyncio.get_running_loop()
        self.sender = make_sender(self._loop, self._fail)
        self.failure: asyncio.Future[object] = self._loop.create_future()
        """Ends, with the exception, should a bug leave the server unable to send: then it is to be replaced."""
        # The sockets.
        self._epoll = select.epoll()
        self._listeners: dict[int, socket.socket] = {}
        self._accepting_paused = False
        self._connections: dict[int, Connection] = {}
        # The turn.
        self._pending_events: deque[tuple[Connection, int]] = deque()
        self._resumed: deque[Connection] = deque()
        self._expired: deque[Connection] = deque()
        self._turn_due = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._emptied = asyncio.Event()
        self._closed = False

    # What an owner calls.

    def start(self, sockets: list[socket.socket]) -> None:
        """Serve on bound TCP sockets (listening is begun here); they belong to the server from now on."""
        raise_descriptor_limit(self.settings.max_connections + RESERVE + _OTHER_DESCRIPTORS)
        for listener in sockets:
            listener.setblocking(False)
            listener.listen(self.settings.backlog)
            self._listeners[listener.fileno()] = listener
        self._listen()
        self._loop.add_reader(self._epoll.fileno(), self._polled)
        self._tick(self.clock())

    @property
    def settings(self) -> HttpSettings:
        """The settings in force; they can be replaced while the server runs."""
        return self._settings

    @settings.setter
    def settings(self, settings: HttpSettings) -> None:
        self._settings = settings
        self.limits.most = settings.max_connections
        self.limits.most_per_caller = settings.max_connections_per_caller

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    @property
    def downloads(self) -> int:
        """Responses under way that did not fit a socket's buffer at once."""
        return len(self.sender.active)

    @property
    def has_work(self) -> bool:
        """Whether connections have more to do in a turn to come."""
        return bool(self._pending_events or self._expired or self._resumed)

    def attach(self, transport: Transport, fd: int, address: str) -> Connection:
        """Serve a connection; the caller tells it of its events. `address`: its peer."""
        proxied = address in self.proxies
        over_limit = len(self._connections) >= self.settings.max_connections
        connection = Connection(self, transport, fd, address, proxied=proxied, over_limit=over_limit)
        self._connections[fd] = connection
        self.limits.add(connection, None if proxied else caller_of(address))
        return connection

    async def drain(self, timeout_s: float | None = None, *, outlived: bool = False) -> bool:
        """Take no more connections or requests and wait until those under way are answered.

        Waits `timeout_s`, by default the setting `drain_s`; returns whether everything was finished by then. Requests
        that still come on open connections are answered 503, connections that wait for one are closed.
        `outlived`: others accept connections on the same sockets, so that nobody needs to be refused. Then a connection
        that waits for a request gets a last answer, and is closed when it has been silent for `OUTLIVED_IDLE_S`.
        """
        self.draining = True
        self._outlived = outlived
        timeout_s = self.settings.drain_s if timeout_s is None else timeout_s
        self._stop_listening()
        if outlived and not await self._wait_until_empty(min(timeout_s, OUTLIVED_IDLE_S)):
            timeout_s -= OUTLIVED_IDLE_S
        for connection in list(self._connections.values()):
            if connection.idle:
                connection.close()
        return await self._wait_until_empty(max(0.0, timeout_s))

    async def _wait_until_empty(self, timeout_s: float) -> bool:
        if self._connections:
            self._emptied.clear()
            try:
                await asyncio.wait_for(self._emptied.wait(), timeout_s)
            except TimeoutError:
                return False
        return True

    async def close(self) -> None:
        """End everything now, downloads included; waits only, and at most `drain_s`, for handlers of unsafe methods."""
        if self._closed:
            return
        self._closed = self.draining = True
        self._stop_listening()
        for connection in list(self._connections.values()):
            connection.close()
        self._loop.remove_reader(self._epoll.fileno())
        if self._ticker is not None:
            self._ticker.cancel()
        await self.sender.close()
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=self.settings.drain_s)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        self._epoll.close()

    def _fail(self, error: Exception) -> None:
        self.observer.on_error(error, None)
        if not self.failure.done():
            self.failure.set_exception(error)
            self.failure.exception()  # marks it as retrieved; asyncio would log it otherwise

    # What connections call.

    def wake(self) -> None:
        """Ask for a turn."""
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self.turn)

    def resume(self, connection: Connection) -> None:
        """Let a connection proceed in a later turn, after connections with events of their own."""
        self._resumed.append(connection)
        self.wake()

    def refusal(self, connection: Connection, caller: str) -> HttpError | None:
        """Why a request cannot be taken on: 429 or 503, or None. Makes the connection one of `caller`'s."""
        if not self.limits.take_slot(connection, caller):
            limit = self.settings.max_connections_per_caller
            return HttpError(
                429, "too_many_connections", f"A caller has at most {limit} connections at a time.", _RETRY_AFTER
            )
        if self.draining and not self._outlived:
            return HttpError(503, "draining", "This server is shutting down; try again.", _RETRY_AFTER)
        if connection.over_limit:
            connection.over_limit = len(self._connections) > self.settings.max_connections
        if connection.over_limit:
            return HttpError(503, "server_full", "This server has no room for more connections.", _RETRY_AFTER)
        return None

    def spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a handler as a task that `close` waits for."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def forget(self, connection: Connection) -> None:
        """A connection is closing: take it off every list."""
        del self._connections[connection.fd]
        self.timers.disarm(connection)
        self.limits.remove(connection)
        if not self._connections:
            self._emptied.set()

    # The turn.

    def _polled(self) -> None:
        if not self._turn_due:
            self.turn()

    def turn(self) -> None:
        """One turn, as the head of this file says. The loop calls it."""
        self._turn_due = False
        if self._closed:
            return
        pending, accepting = self._pending_events, []
        for fd, events in self._epoll.poll(0, _BATCH):
            # Connections are looked up here, before any is closed: a descriptor that is reused later in this turn
            # must not get its predecessor's events. For the same reason accepting comes after them all.
            connection = self._connections.get(fd)
            if connection is not None:
                pending.append((connection, events))
            elif fd in self._listeners:
                accepting.append(fd)
        deadline = self.clock() + TURN_S
        while pending:
            connection, events = pending.popleft()
            connection.on_events(events)
            if self.clock() >= deadline:
                break
        # Many deadlines may expire at once, and many connections may have more to do. Those with events do not wait
        # for them; of each kind at least one is served in a turn.
        while self._expired:
            self._expired.popleft().on_deadline(self.clock())
            if self.clock() >= deadline:
                break
        for _ in range(len(self._resumed)):
            self._resumed.popleft().proceed()
            if self.clock() >= deadline:
                break
        for fd in accepting:
            self._accept(self._listeners[fd])
        if self.has_work:
            self.wake()

    def _tick(self, expected: float) -> None:
        """The one timer: sees how late the loop is, and which deadlines have passed."""
        now = self.clock()
        if now - expected >= _TICK_S:
            self.observer.on_stall(now - expected)
        for item in self.timers.due(now):
            assert isinstance(item, Connection)
            self._expired.append(item)
        if self._expired:
            self.wake()
        self._ticker = self._loop.call_later(_TICK_S, self._tick, now + _TICK_S)

    # Connections come and go.

    def _listen(self) -> None:
        self._accepting_paused = False
        for fd in self._listeners:
            self._epoll.register(fd, select.EPOLLIN)

    def _pause_accepting(self) -> None:
        """Take no connections for a moment: there is nothing to hold them with."""
        if not self._accepting_paused:
            self._accepting_paused = True
            for fd in self._listeners:
                self._epoll.unregister(fd)
            self._loop.call_later(_PAUSE_S, self._listen)

    def _stop_listening(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _SHORT_OF:
                    self._pause_accepting()
                    return
                continue  # the client was gone before it was taken
            try:
                self._adopt(sock, str(plain_address(address[0])))
            except OSError:
                sock.close()

    def _adopt(self, sock: socket.socket, address: str) -> None:
        """Serve an accepted socket, if there is room for it."""
        caller = None if address in self.proxies else caller_of(address)
        if (other := self.limits.connection_to_close(caller, len(self._connections))) is not None:
            other.close()
        if not self.limits.has_room(caller, len(self._connections)):
            sock.close()
            return
        sock.setblocking(False)
        # Responses are written whole, heads joined to bodies by MSG_MORE: there is nothing for Nagle to gather.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = sock.fileno()
        transport: Transport
        if self._certificate is None:
            transport = PlainTransport(sock)
        else:
            transport = TlsTransport(sock, self._certificate.context(self.observer.on_warning))
        try:
            self._epoll.register(fd, _EVENTS)
        except OSError:
            transport.close(reset=False)
            return
        self.attach(transport, fd, address)
