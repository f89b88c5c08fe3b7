"""One connection: from bytes to requests, from results to answers.

The engine is `proceed`: it runs through the phases below for as long as there is something to do at once, and returns
when it needs the peer, the application or the sender. Whoever brings news (the poller, a finished handler, a finished
transfer, the wheel) notes it and calls `proceed` again. h11 reads heads and bodies, one head or one piece of body at a
time (`heads.py`, `incoming.py`).

    HEAD -> BODY -> HANDLING -> SENDING -> HEAD ...        with keep-alive
                        any -> SENDING -> LINGERING        after the last answer: our side is closed, input discarded
                        any -> CLOSED                      the peer is gone, silent or too slow
"""

from __future__ import annotations

import asyncio
import enum
import errno
import select as poll
from collections.abc import Awaitable, Coroutine
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from msgspec.structs import replace

from bzstream.http import framing, heads
from bzstream.http.heads import RequestHead
from bzstream.http.incoming import check_body_head, translate
from bzstream.http.links import Link
from bzstream.http.messages import Endpoint, HttpError, Representation, Request, Response, Result
from bzstream.http.observer import RequestRecord
from bzstream.http.peers import caller_of
from bzstream.http.request_body import ChunkedBody, RequestBody, SizedBody
from bzstream.http.selection import Answer, answer_for
from bzstream.http.sender import Damaged, Transfer, TransferState

if TYPE_CHECKING:
    from bzstream.http.server import Server

__all__ = ["Connection", "Phase"]

_RECEIVE = 16 * 1024
"""Bytes of one recv. Whatever is pipelined beyond the current request waits in the kernel, but for this much."""
_EMPTY_LINES = 8
"""Empty lines before a request line that are ignored (RFC 9112 2.2 asks for one at least)."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_CLIENT_CLOSED = 499
_LOOKS = 8
"""How often in a stall time-out a reader is looked at. What the kernel's buffers swallow counts as taken once."""
_OUR_FAULT = frozenset({errno.EIO, errno.EBADF, errno.EINVAL, errno.ENOMEM})
"""OSErrors of a send that speak of the disk or of us. All others mean that the client is gone."""


class Phase(enum.Enum):
    """See the head of this file."""

    HEAD = enum.auto()
    BODY = enum.auto()
    HANDLING = enum.auto()
    SENDING = enum.auto()
    LINGERING = enum.auto()
    CLOSED = enum.auto()


HEAD, BODY, HANDLING, SENDING, LINGERING, CLOSED = Phase
"""The same under names of their own: looking one up in its class takes 0.1 µs, a dozen times a request."""


class Connection:
    """A client's connection to the server that it was accepted by."""

    __slots__ = (
        "_address", "_answer", "_bodiless", "_body", "_checked", "_complete", "_empty_lines", "_ending", "_endpoint",
        "_eof", "_head", "_inbox", "_last", "_lead_body", "_lingered", "_link", "_loopback", "_moved", "_proxied",
        "_readable", "_request", "_scanned", "_server", "_started", "_taken", "_task", "_transfer", "caller_slot",
        "deadline", "extra_of", "fd", "phase", "slot", "surplus",
    )  # fmt: skip

    def __init__(
        self, server: Server, link: Link, fd: int, address: str, loopback: bool, *, proxied: bool = False
    ) -> None:
        """`proxied`: whether the address is one of a trusted proxy."""
        # For as long as the connection lives.
        self._server = server
        self._link = link
        self.fd = fd
        self._address = address
        self._loopback = loopback
        self.phase = HEAD
        self._proxied = proxied
        self.caller_slot: str | None = None
        self.extra_of: str | None = None
        self.surplus = False
        """Accepted beyond the worker's limit, to be told so."""
        # What the poller and the wheel know.
        self._readable = False
        self._ending = False
        self._eof = False
        self.deadline = inf
        self.slot = 0
        # Bytes received and not yet used, and how many of them were searched for the end of a head.
        self._inbox = b""
        self._scanned = 0
        # For one request and its answer.
        self._forget_request()
        # After the last answer.
        self._lingered = 0
        settings = server.settings
        self._set_deadline(server.clock() + min(settings.head_timeout_s, settings.idle_timeout_s))

    def _forget_request(self) -> None:
        """The state of a connection between two requests."""
        self._started = 0.0
        self._empty_lines = 0
        self._head: RequestHead | None = None
        self._request: Request | None = None
        self._complete = False
        self._bodiless: bool | None = None
        self._endpoint: Endpoint | None = None
        self._checked: object = None
        """What the endpoint's `check` returned, for its `handle`."""
        self._body: RequestBody | None = None
        self._task: asyncio.Task[None] | None = None
        self._answer: Answer | None = None
        self._last = False
        self._transfer: Transfer | None = None
        self._lead_body = 0
        self._taken = 0
        self._moved = 0.0

    # What the server calls.

    @property
    def idle(self) -> bool:
        """Whether no request is under way, not even the first bytes of one."""
        return self.phase is HEAD and not self._inbox

    def on_events(self, events: int) -> None:
        """The poller's news, edge-triggered: said once, then noted here until a recv or send would block."""
        if events & (poll.EPOLLERR | poll.EPOLLHUP):
            # Reset, or both sides are closed: nobody is there to read an answer.
            self.close()
            return
        if events & (poll.EPOLLIN | poll.EPOLLRDHUP):
            self._readable = True
            self._ending = self._ending or bool(events & poll.EPOLLRDHUP)
        self.proceed()

    def on_deadline(self, now: float) -> None:
        """The wheel's news, perhaps late: the deadline that was set had passed."""
        if self.deadline > now:
            return  # it has moved since, and the wheel knows
        self.deadline = inf
        if self.phase is HEAD and self._inbox:
            self._respond(HttpError(408, "request_timeout", "The request head took too long."))
        elif self.phase is BODY:
            self._respond(HttpError(408, "request_timeout", "The request body took too long."))
        elif self.phase is SENDING:
            self._watch_reader(now)
        else:
            self.close()

    def transfer_done(self) -> None:
        """The sender's news: the whole answer is with the kernel."""
        try:
            self._answered()
        except OSError:
            self.close()

    def transfer_failed(self, error: Exception) -> None:
        """The sender's news: no more of the answer can be sent. What is missing is missing; nothing is made up."""
        if isinstance(error, Damaged):
            self._server.observer.on_damage(error.file.path)
        elif not isinstance(error, OSError) or error.errno in _OUR_FAULT:
            self._server.observer.on_error(error, self._request)
        self.close()

    def proceed(self) -> None:
        """Do what can be done at once."""
        try:
            if self.phase is HEAD:
                self._read_head()
            elif self.phase is BODY:
                self._read_body()
            elif self.phase is LINGERING:
                self._discard()
        except OSError:
            self.close()
        except Exception as error:
            self._respond(self._failure(error))

    def close(self, *, reset: bool = False) -> None:
        """End it here and now, in whatever phase; safe to call twice. `reset`: drop what the kernel still holds."""
        if self.phase is CLOSED:
            return
        begun, self.phase = self.phase in (HANDLING, SENDING), CLOSED
        if begun:
            self._report()
        transfer = self._transfer
        if self._task is not None and self._request is not None and self._request.method in _SAFE:
            self._task.cancel()
        self._forget_request()
        self._server.forget(self)
        if transfer is not None:
            self._server.sender.drop(transfer, partial(self._link.close, reset=reset))
        else:
            self._link.close(reset=reset)

    # Reading a request.

    def _fill(self) -> bool:
        """Receive once into the inbox; False when nothing came."""
        if not self._readable:
            return False
        data = self._link.recv(_RECEIVE)
        if data:
            self._inbox += data
            # After a short read there is nothing more, and whatever comes is news again (epoll(7)); but the peer's end
            # is said only once.
            self._readable = len(data) == _RECEIVE or self._ending or not self._link.short_is_empty
            return True
        self._readable = False
        self._eof = data is not None
        return False

    def _read_head(self) -> None:
        settings = self._server.settings
        while True:
            while self._inbox.startswith(b"\r\n"):
                self._inbox, self._scanned = self._inbox[2:], 0
                self._empty_lines += 1
                if self._empty_lines > _EMPTY_LINES:
                    raise framing.malformed("More empty lines than a client has reason to send.")
            if self._inbox and self._inbox != b"\r":
                begun = bool(self._started)
                if not begun:
                    self._started = self._server.clock()
                end = framing.find_head(self._inbox, self._scanned)
                if max(end, len(self._inbox) if end < 0 else 0) > settings.max_head:
                    raise HttpError(431, "head_too_large", f"A request head has at most {settings.max_head} bytes.")
                if end > 0:
                    head, self._inbox, self._scanned = self._inbox[:end], self._inbox[end:], 0
                    self._server.limits.work(self)
                    self._begin(head)
                    return
                self._scanned = len(self._inbox)
                if not begun:
                    self._server.limits.wait(self)
                    self._set_deadline(self._started + settings.head_timeout_s)
            if not self._fill():
                break
        if self._eof:
            if self._inbox:
                raise framing.malformed("The connection ended inside a request head.")
            self.close()

    def _begin(self, head: bytes) -> None:
        """A head is complete: make every check that needs nothing else, and go on to the body or the answer."""
        server = self._server
        settings = server.settings
        self._bodiless = head.startswith(b"HEAD ")
        self._head = understood = heads.read_head(head, settings.max_fields)
        self._complete = understood.body_length == 0
        request = translate(understood, self._address, self._link.secure, self._loopback, server.proxies)
        self._request = request
        self._endpoint = endpoint = server.application.admit(request)
        if not self._complete:
            check_body_head(understood, settings.max_body)
        self._checked = endpoint.check(request)
        if endpoint.limited and (refusal := server.refusal(self, request.caller)) is not None:
            self._last = True  # the connection has no place here
            raise refusal
        if self._complete:
            self._handle()
            return
        self.phase = BODY
        if understood.body_length is None:
            self._body = ChunkedBody(settings.max_body, keep=endpoint.reads_body)
        else:
            self._body = SizedBody(understood.body_length, keep=endpoint.reads_body)
        self._set_deadline(server.clock() + settings.body_timeout_s)
        if understood.expects_continue and not self._inbox:
            interim = heads.write_head(100, ())
            if self._link.send(interim, False) != len(interim):
                raise ConnectionError("no room for the first 25 bytes")
        self._read_body()

    def _read_body(self) -> None:
        """Read a bounded piece of the body; if there may be more, in a later turn of the loop."""
        assert self._body is not None
        assert self._request is not None
        done = self._feed_body() or (not self._body.pending and self._fill() and self._feed_body())
        if not done:
            if self._body.pending or self._readable:
                self._server.resume(self)
            elif self._eof:
                raise framing.malformed("The connection ended inside a request body.")
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

    # Making an answer.

    def _handle(self) -> None:
        assert self._endpoint is not None
        assert self._request is not None
        self.phase, self.deadline = HANDLING, inf
        result = self._endpoint.handle(self._checked)
        if isinstance(result, Response | Representation):
            self._respond(result)
            return
        self._task = self._server.spawn(self._wait_for(result))
        if isinstance(result, Coroutine):
            # A task that is cancelled before its first step never comes to await the handler.
            self._task.add_done_callback(lambda _: result.close())

    async def _wait_for(self, pending: Awaitable[Result]) -> None:
        """Run a handler. The answer begins in the very step in which it returns, before anything can be released."""
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
        self._server.observer.on_error(error, self._request)
        return HttpError(500, "internal_error", "The server made a mistake, which has been logged.")

    def _respond(self, result: Result | HttpError) -> None:
        """Turn what became of a request into an answer and begin to send it. Does nothing when one was begun."""
        if self.phase not in (HEAD, BODY, HANDLING):
            return
        self.phase, self.deadline = SENDING, inf
        try:
            try:
                head = self._frame(result)
            except ValueError as error:
                # A header field of the application's that cannot be sent. Nothing of the answer has gone out.
                head = self._frame(self._failure(error))
            self._begin_sending(head)
        except OSError:
            self.close()
        except Exception as error:
            self._server.observer.on_error(error, self._request)
            self.close()

    def _frame(self, result: Result | HttpError) -> bytes:
        """Make the answer, settle whether it is the connection's last, and return its head."""
        server, request = self._server, self._request
        self._answer = answer = answer_for(result, request, server.wall_clock())
        fields = [("Date", server.date()), ("Server", "bzstream"), *answer.headers]
        if answer.length is not None:
            fields.append(("Content-Length", str(answer.length)))
        # Input that was not understood, or not read to its request's end, would be taken for the next request.
        self._complete = self._complete and request is not None
        persistent = self._head is not None and self._head.persistent
        self._last = self._last or not (self._complete and persistent) or server.draining
        if self._last:
            fields.append(("Connection", "close"))
        if self._bodiless is None:
            self._bodiless = self._inbox.startswith(b"HEAD ")
        if self._bodiless:
            self._answer = replace(answer, body=b"")
        return heads.write_head(answer.status, fields)

    def _begin_sending(self, head: bytes) -> None:
        """Send a short answer at once; leave a long one, or what there is no room for, to the sender."""
        assert self._answer is not None
        server, body = self._server, self._answer.body
        caller = self._request.caller if self._request is not None else caller_of(self._address)
        if isinstance(body, bytes):
            self._lead_body = len(body)
            lead = head + body
            taken = self._link.send(lead, False)
            if taken == len(lead) and self._link.flush():
                self._answered()
                return
            self._transfer = Transfer(self, self._link, self.fd, caller, lead[taken:], None, server.clock())
        else:
            self._transfer = Transfer(self, self._link, self.fd, caller, head, body, server.clock())
        self._moved = now = server.clock()
        server.sender.begin(self._transfer)
        self._set_deadline(now + server.settings.stall_timeout_s / _LOOKS)

    def _answered(self) -> None:
        """The whole answer is with the kernel: go on to the next request, or to the end."""
        self._report()
        last = self._last or self._server.draining
        self._forget_request()
        self._server.limits.wait(self)
        if self._proxied:
            self._server.limits.release(self)
        if last:
            self._link.finish()
            self.phase = LINGERING
            self._inbox = b""
            self._set_deadline(self._server.clock() + self._server.settings.linger_s)
        else:
            self.phase = HEAD
            self._set_deadline(self._server.clock() + self._server.settings.idle_timeout_s)
        # Most clients wait for the answer before they send more; then this finds nothing, and all is said.
        if self._inbox or self._fill() or self._eof:
            self._server.resume(self)

    def _report(self) -> None:
        """Tell the observer of the request that is over."""
        request, answer, transfer, server = self._request, self._answer, self._transfer, self._server
        now = server.clock()
        length = len(answer.body) if answer is not None else 0
        sent, queued = length, 0.0
        if transfer is not None:
            sent = transfer.position + self._lead_body - min(self._lead_body, transfer.lead_left)
            queued = (transfer.first_sent or now) - transfer.queued
        server.observer.on_request(
            RequestRecord(
                method=request.method if request is not None else "",
                route=request.route if request is not None else "",
                label=answer.label if answer is not None else "",
                status=answer.status if answer is not None else _CLIENT_CLOSED,
                sent=sent,
                length=length,
                seconds=now - (self._started or now),
                queued=queued,
                caller=request.caller if request is not None else caller_of(self._address),
                peer=request.peer if request is not None else self._address,
            )
        )

    # Waiting for the peer.

    def _set_deadline(self, deadline: float) -> None:
        self.deadline = deadline
        self._server.wheel.arm(self)

    def _watch_reader(self, now: float) -> None:
        """Close on a reader that took no byte for the stall time-out.

        What was taken is what the kernel was given less what it still holds: a slow reader may keep a full socket
        unwritable for minutes, and is no stalled one. Time in our own queue, or waiting for our disk, does not count.
        """
        assert self._transfer is not None
        taken = self._transfer.taken - self._link.unsent()
        if taken != self._taken or self._transfer.state is not TransferState.BLOCKED:
            self._taken, self._moved = taken, now
        patience = self._server.settings.stall_timeout_s
        if now - self._moved >= patience:
            self.close(reset=True)
        else:
            self._set_deadline(min(now + patience / _LOOKS, self._moved + patience))

    def _discard(self) -> None:
        """After the last answer: let the client finish writing and read it, within limits (RFC 9112 9.6)."""
        while self._fill():
            self._lingered += len(self._inbox)
            self._inbox = b""
            if self._lingered > self._server.settings.linger_bytes:
                break
        else:
            if not self._eof:
                return
        self.close()
