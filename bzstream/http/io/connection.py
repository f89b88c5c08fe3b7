"""One connection: reads requests, has them handled, and sends the responses. For the event loop's thread.

The engine is `proceed`: it runs through the states below for as long as there is something to do at once, and returns
when it needs the peer, the application or the sender. Events (of the poller, of a finished handler, of a finished
transfer, of a timer) are noted and `proceed` is called again. One call does a bounded amount of work: it reads one head
or one piece of a body. If there is more to do, the connection asks its host to be resumed in a later turn.

    HEAD -> BODY -> HANDLING -> SENDING -> HEAD ...        with keep-alive
                        any -> SENDING -> LINGERING        after the last response: our side is closed, input discarded
                        any -> CLOSED                      the peer is gone, silent or too slow
"""

from __future__ import annotations

import asyncio
import enum
import errno
import select as poll
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from math import inf
from typing import Protocol

from msgspec.structs import replace

from bzstream.config import HttpSettings
from bzstream.http.io.limits import ConnectionLimits
from bzstream.http.io.observer import Application, Observer, RequestRecord
from bzstream.http.io.timers import TimerWheel
from bzstream.http.io.transports import Transport
from bzstream.http.protocol import request_parser
from bzstream.http.protocol.bodies import Body
from bzstream.http.protocol.dates import format_date
from bzstream.http.protocol.messages import Endpoint, HttpError, Representation, Request, Response, Result
from bzstream.http.protocol.peers import TrustedProxies, caller_of
from bzstream.http.protocol.request_body import ChunkedBody, RequestBody, SizedBody, check_body_head
from bzstream.http.protocol.request_parser import RequestHead, malformed
from bzstream.http.protocol.response import PreparedResponse, prepare, serialise_head
from bzstream.http.send.sender import Sender
from bzstream.http.send.transfer import DamagedFile, Transfer, TransferState

__all__ = ["Connection", "ConnectionHost", "ConnectionState"]

_RECEIVE = 16 * 1024
"""Bytes of one recv. Whatever is pipelined beyond the current request waits in the kernel, except for this much."""
_EMPTY_LINES = 8
"""Empty lines before a request line that are ignored (RFC 9112 2.2 asks for one at least)."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_CLIENT_CLOSED = 499
_READER_CHECKS = 8
"""How often in a stall time-out a reader is checked. What the kernel's buffers swallow counts as taken once."""
_OUR_FAULT = frozenset({errno.EIO, errno.EBADF, errno.EINVAL, errno.ENOMEM})
"""OSErrors of a send that are about the disk or us. All others mean that the client is gone."""


ConnectionState = enum.Enum("ConnectionState", "HEAD BODY HANDLING SENDING LINGERING CLOSED")
"""See the head of this file."""
HEAD, BODY, HANDLING, SENDING, LINGERING, CLOSED = ConnectionState
"""The same under names of their own: looking one up in its class takes 0.1 µs, a dozen times a request."""


class ConnectionHost(Protocol):
    """What a connection needs of the server that holds it."""

    settings: HttpSettings
    application: Application
    observer: Observer
    clock: Callable[[], float]
    proxies: TrustedProxies
    timers: TimerWheel
    sender: Sender
    limits: ConnectionLimits[Connection]
    draining: bool
    """Whether every response is to be a connection's last."""

    def refusal(self, connection: Connection, caller: str) -> HttpError | None:
        """Why a request cannot be taken on: 429 or 503, or None. Makes the connection one of `caller`'s."""

    def resume(self, connection: Connection) -> None:
        """Have the connection `proceed` in a later turn."""

    def spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a handler as a task."""

    def forget(self, connection: Connection) -> None:
        """The connection is closing."""


class Connection:
    """A client's connection."""

    __slots__ = (
        "_address", "_body", "_checked", "_complete", "_empty_lines", "_ending", "_endpoint", "_eof", "_head",
        "_host", "_inbox", "_last", "_lead_body", "_lingered", "_moved", "_proxied", "_readable",
        "_request", "_response", "_scanned", "_started", "_taken", "_task", "_transfer", "_transport", "caller_slot",
        "deadline", "extra_of", "fd", "over_limit", "state", "timer_slot",
    )  # fmt: skip

    def __init__(
        self, host: ConnectionHost, transport: Transport, fd: int, address: str, *, proxied: bool, over_limit: bool
    ) -> None:
        """`fd`: the descriptor of the transport's socket; `address`: its peer.

        `proxied`: the peer is a trusted proxy. `over_limit`: it was accepted beyond the worker's limit, to be told so.
        """
        # For as long as the connection lives.
        self._host = host
        self._transport, self.fd = transport, fd
        self._address, self._proxied = address, proxied
        self.state = HEAD
        self.over_limit = over_limit
        self.caller_slot: str | None = None
        self.extra_of: str | None = None
        # What the poller and the timers know.
        self._readable = False
        self._ending = False
        self._eof = False
        self.deadline = inf
        self.timer_slot = 0
        # Bytes received and not yet used, and how many of them were searched for the end of a head.
        self._inbox = b""
        self._scanned = 0
        # For one request and its response.
        self._forget_request()
        # After the last response.
        self._lingered = 0
        self._set_deadline(min(host.settings.head_timeout_s, host.settings.idle_timeout_s))

    def _forget_request(self) -> None:
        """The state of a connection between two requests."""
        self._started = 0.0
        self._empty_lines = 0
        self._head: RequestHead | None = None
        self._request: Request | None = None
        self._complete = False
        """Whether the request was read to its end."""
        self._endpoint: Endpoint | None = None
        self._checked: object = None
        """What the endpoint's `check` returned, for its `handle`."""
        self._body: RequestBody | None = None
        self._task: asyncio.Task[None] | None = None
        self._response: PreparedResponse | None = None
        self._last = False
        self._transfer: Transfer | None = None
        self._lead_body = 0
        self._taken = 0
        self._moved = 0.0

    # What the host calls.

    @property
    def idle(self) -> bool:
        """Whether no request is under way, not even the first bytes of one."""
        return self.state is HEAD and not self._inbox

    def on_events(self, events: int) -> None:
        """The poller's events, edge-triggered: reported once, then noted here until a recv or send would block."""
        if events & (poll.EPOLLERR | poll.EPOLLHUP):
            # Reset, or both sides are closed: nobody is there to read a response.
            self.close()
            return
        if events & (poll.EPOLLIN | poll.EPOLLRDHUP):
            self._readable = True
            self._ending = self._ending or bool(events & poll.EPOLLRDHUP)
        self.proceed()

    def on_deadline(self, now: float) -> None:
        """A timer has expired, perhaps late."""
        if self.deadline > now:
            return  # the deadline has moved since, and the timers know
        self.deadline = inf
        if self.state is HEAD and self._inbox:
            self._respond(HttpError(408, "request_timeout", "The request head took too long."))
        elif self.state is BODY:
            self._respond(HttpError(408, "request_timeout", "The request body took too long."))
        elif self.state is SENDING:
            self._watch_reader(now)
        else:
            self.close()

    def transfer_done(self) -> None:
        """The sender says that the whole response is with the kernel."""
        try:
            self._sent()
        except OSError:
            self.close()

    def transfer_failed(self, error: Exception) -> None:
        """The sender says that no more of the response can be sent. What is missing is missing; nothing is made up."""
        if isinstance(error, DamagedFile):
            self._host.observer.on_damage(error.file.path)
        elif not isinstance(error, OSError) or error.errno in _OUR_FAULT:
            self._host.observer.on_error(error, self._request)
        self.close()

    def proceed(self) -> None:
        """Do what can be done at once."""
        try:
            if self.state is HEAD:
                self._read_head()
            elif self.state is BODY:
                self._read_body()
            elif self.state is LINGERING:
                self._discard()
        except OSError:
            self.close()
        except Exception as error:
            self._respond(self._failure(error))

    def close(self, *, reset: bool = False) -> None:
        """End it here and now, in whatever state; safe to call twice. `reset`: drop what the kernel still holds."""
        if self.state is CLOSED:
            return
        begun, self.state = self.state in (HANDLING, SENDING), CLOSED
        if begun:
            self._report()
        transfer = self._transfer
        if self._task is not None and self._request is not None and self._request.method in _SAFE:
            self._task.cancel()
        self._forget_request()
        self._host.forget(self)
        if transfer is not None:
            self._host.sender.drop(transfer, partial(self._transport.close, reset=reset))
        else:
            self._transport.close(reset=reset)

    # Reading a request.

    def _fill(self) -> bool:
        """Receive once into the inbox; False when nothing came."""
        if not self._readable:
            return False
        data = self._transport.recv(_RECEIVE)
        if data:
            self._inbox += data
            # After a short read there is nothing more, and whatever comes is a new event (epoll(7)); but the peer's end
            # is reported only once.
            self._readable = len(data) == _RECEIVE or self._ending or not self._transport.short_recv_means_empty
            return True
        self._readable = False
        self._eof = data is not None
        return False

    def _read_head(self) -> None:
        host, settings = self._host, self._host.settings
        while True:
            while self._inbox.startswith(b"\r\n"):
                self._inbox, self._scanned = self._inbox[2:], 0
                self._empty_lines += 1
                if self._empty_lines > _EMPTY_LINES:
                    raise malformed("More empty lines than a client has reason to send.")
            if self._inbox and self._inbox != b"\r":
                begun = bool(self._started)
                if not begun:
                    self._started = host.clock()
                end = request_parser.find_head(self._inbox, self._scanned)
                if max(end, len(self._inbox) if end < 0 else 0) > settings.max_head:
                    raise HttpError(431, "head_too_large", f"A request head has at most {settings.max_head} bytes.")
                if end > 0:
                    host.limits.mark_busy(self)
                    self._begin(self._inbox[:end])
                    return
                self._scanned = len(self._inbox)
                if not begun:
                    host.limits.mark_waiting(self)
                    self._set_deadline(settings.head_timeout_s)
            if not self._fill():
                break
        if self._eof:
            if self._inbox:
                raise malformed("The connection ended inside a request head.")
            self.close()

    def _begin(self, head: bytes) -> None:
        """A head is complete: make every check that needs nothing else, and go on to the body or the handler."""
        host, settings = self._host, self._host.settings
        self._head = parsed = request_parser.parse_head(head, settings.max_fields)
        self._inbox, self._scanned = self._inbox[len(head) :], 0
        self._complete = parsed.body_length == 0
        self._request = request = request_parser.make_request(
            parsed, self._address, self._transport.secure, host.proxies
        )
        self._endpoint = endpoint = host.application.admit(request)
        if not self._complete:
            check_body_head(parsed, settings.max_body)
        self._checked = endpoint.check(request)
        if endpoint.limited and (refusal := host.refusal(self, request.caller)) is not None:
            self._last = True  # the connection has no place here
            raise refusal
        if self._complete:
            self._handle()
            return
        self.state = BODY
        if parsed.body_length is None:
            self._body = ChunkedBody(settings.max_body, keep=endpoint.reads_body)
        else:
            self._body = SizedBody(parsed.body_length, keep=endpoint.reads_body)
        self._set_deadline(settings.body_timeout_s)
        if parsed.expects_continue and not self._inbox:
            interim = serialise_head(100, ())
            if self._transport.send(interim, False) != len(interim):
                raise ConnectionError("no room for the first 25 bytes")
        self._read_body()

    def _read_body(self) -> None:
        """Read a bounded piece of the body; if there may be more, the rest in a later turn."""
        assert self._body is not None
        assert self._request is not None
        done = self._feed_body() or (not self._body.pending and self._fill() and self._feed_body())
        if not done:
            if self._body.pending or self._readable:
                self._host.resume(self)
            elif self._eof:
                raise malformed("The connection ended inside a request body.")
            return
        self._inbox = self._body.leftover
        self._request.body = bytes(self._body.content)
        self._body = None
        self._complete = True
        self._handle()

    def _feed_body(self) -> bool:
        assert self._body is not None
        piece, self._inbox = self._inbox, b""
        return self._body.feed(piece)

    # Making a response.

    def _handle(self) -> None:
        assert self._endpoint is not None
        self.state, self.deadline = HANDLING, inf
        result = self._endpoint.handle(self._checked)
        if isinstance(result, Response | Representation):
            self._respond(result)
            return
        self._task = self._host.spawn(self._wait_for(result))
        if isinstance(result, Coroutine):
            # A task that is cancelled before its first step never comes to await the handler.
            self._task.add_done_callback(lambda _: result.close())

    async def _wait_for(self, pending: Awaitable[Result]) -> None:
        """Run a handler. The response begins in the very step in which it returns, before anything is released."""
        result: Result | HttpError
        try:
            result = await pending
        except Exception as error:
            result = self._failure(error)
        self._task = None
        self._respond(result)

    def _failure(self, error: Exception) -> HttpError:
        """What a client is told of an exception."""
        if isinstance(error, HttpError):
            return error
        self._host.observer.on_error(error, self._request)
        return HttpError(500, "internal_error", "The server made a mistake, which has been logged.")

    def _respond(self, result: Result | HttpError) -> None:
        """Turn what became of a request into a response and begin to send it. Does nothing when one was begun."""
        if self.state not in (HEAD, BODY, HANDLING):
            return
        self.state, self.deadline = SENDING, inf
        try:
            try:
                head = self._prepare(result)
            except ValueError as error:
                # A header field of the application's that cannot be sent. Nothing of the response has gone out.
                head = self._prepare(self._failure(error))
            self._begin_sending(head)
        except OSError:
            self.close()
        except Exception as error:
            self._host.observer.on_error(error, self._request)
            self.close()

    def _prepare(self, result: Result | HttpError) -> bytes:
        """Make the response, settle whether it is the connection's last, and return its head."""
        host, request = self._host, self._request
        now = int(time.time())
        response = prepare(result, request, now)
        fields = [("Date", format_date(now)), ("Server", "bzstream"), *response.headers]
        if response.length is not None:
            fields.append(("Content-Length", str(response.length)))
        # Input that was not parsed, or not read to its request's end, would be taken for the next request.
        persistent = self._complete and request is not None and self._head is not None and self._head.persistent
        self._last = self._last or not persistent or host.draining
        if self._last:
            fields.append(("Connection", "close"))
        # The inbox still begins with a head that was not parsed.
        is_head = request.method == "HEAD" if request is not None else self._inbox.startswith(b"HEAD ")
        self._response = replace(response, body=b"") if is_head else response
        return serialise_head(response.status, fields)

    def _begin_sending(self, head: bytes) -> None:
        """Send a short response at once; leave a long one, or what there is no room for, to the sender."""
        assert self._response is not None
        host, lead = self._host, head
        body: Body | None = None
        if isinstance(self._response.body, bytes):
            self._lead_body = len(self._response.body)
            lead += self._response.body
            taken = self._transport.send(lead, False)
            if taken == len(lead) and self._transport.flush():
                self._sent()
                return
            lead = lead[taken:]
        else:
            body = self._response.body
        self._moved = now = host.clock()
        self._transfer = Transfer(self, self._transport, self.fd, self._caller(), lead, body, now)
        host.sender.begin(self._transfer)
        self._set_deadline(host.settings.stall_timeout_s / _READER_CHECKS)

    def _sent(self) -> None:
        """The whole response is with the kernel: go on to the next request, or to the end."""
        host = self._host
        self._report()
        last = self._last or host.draining
        self._forget_request()
        host.limits.mark_waiting(self)
        if self._proxied:
            host.limits.release(self)
        if last:
            self._transport.close_write()
            self.state = LINGERING
            self._inbox = b""
            self._set_deadline(host.settings.linger_s)
        else:
            self.state = HEAD
            self._set_deadline(host.settings.idle_timeout_s)
        # Most clients wait for the response before they send more; then this finds nothing.
        if self._inbox or self._fill() or self._eof:
            host.resume(self)

    def _caller(self) -> str:
        return self._request.caller if self._request is not None else caller_of(self._address)

    def _report(self) -> None:
        """Tell the observer of the request that is over."""
        request, response, transfer = self._request, self._response, self._transfer
        now = self._host.clock()
        length = len(response.body) if response is not None else 0
        sent, queued = length, 0.0
        if transfer is not None:
            sent = transfer.position + self._lead_body - min(self._lead_body, transfer.lead_left)
            queued = (transfer.first_sent or now) - transfer.queued
        self._host.observer.on_request(
            RequestRecord(
                method=request.method if request is not None else "",
                route=request.route if request is not None else "",
                label=response.label if response is not None else "",
                status=response.status if response is not None else _CLIENT_CLOSED,
                sent=sent,
                length=length,
                seconds=now - (self._started or now),
                queued=queued,
                caller=self._caller(),
                peer=request.peer if request is not None else self._address,
            )
        )

    # Waiting for the peer.

    def _set_deadline(self, seconds: float) -> None:
        self.deadline = self._host.clock() + seconds
        self._host.timers.arm(self)

    def _watch_reader(self, now: float) -> None:
        """Close on a reader that took no byte for the stall time-out.

        What was taken is what the kernel was given less what it still holds: a slow reader may keep a full socket
        unwritable for minutes without being stalled. Time in our own queue, or waiting for our disk, does not count.
        """
        assert self._transfer is not None
        taken = self._transfer.taken - self._transport.unacknowledged()
        if taken != self._taken or self._transfer.state is not TransferState.BLOCKED:
            self._taken, self._moved = taken, now
        patience = self._host.settings.stall_timeout_s
        if now - self._moved >= patience:
            self.close(reset=True)
        else:
            self._set_deadline(min(patience / _READER_CHECKS, self._moved + patience - now))

    def _discard(self) -> None:
        """After the last response: let the client finish writing and read it, within limits (RFC 9112 9.6)."""
        while self._fill():
            self._lingered += len(self._inbox)
            self._inbox = b""
            if self._lingered > self._host.settings.linger_bytes:
                break
        else:
            if not self._eof:
                return
        self.close()
