"""The sender: threads that move the bytes of all downloads from the page cache to the sockets, by turns.

A download is a `Transfer`. At any time it is *ready* (there may be room in its socket), *busy* (a thread is sending for
it), *blocked* (the socket was full; the kernel will say when there is room) or *cold* (its next bytes are on their way
from the disk). Only ready transfers stand in the queue.

Whose turn it is, and for how many bytes, `turns.py` decides: fairly among callers, however many connections each has.

The bytes never enter this process: sendfile moves them from the page cache to the socket, from explicit offsets, so
that any number of downloads share one open file. Moving them is work for the kernel, and sendfile does it without the
interpreter's lock; so a few threads do nothing else, and the event loop keeps to requests. A second thread is worth
another core of sending, and no download, nor a thousand of them, makes a request wait.

Threads share one queue under one lock, held for microseconds. A transfer has one user at a time: its thread while it is
busy, the loop otherwise. That is the one rule here; `drop` of a busy transfer therefore only marks it, and the link is
closed (and its descriptor free for reuse) when its thread has let go.
"""

from __future__ import annotations

import asyncio
import enum
import os
import select
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from bzstream.http.bodies import Body
from bzstream.http.links import Link
from bzstream.http.readahead import ReadAhead, Residency
from bzstream.http.turns import Flow, Turns
from bzstream.payload import Extent, UnitFile

__all__ = ["Damaged", "Sender", "Transfer", "TransferState"]

_EVENTS = 256
_PICKS_PER_POLL = 8
"""A busy thread looks for sockets that have room again every so many turns, about once a millisecond."""
_ARMED = select.EPOLLOUT | select.EPOLLONESHOT


class Damaged(Exception):
    """A file is shorter than it was when opened: its bytes cannot be sent, and nothing else may take their place."""

    def __init__(self, file: UnitFile) -> None:
        super().__init__("a unit file was cut while it was served")
        self.file = file


class TransferState(enum.Enum):
    """Where a transfer stands; see the head of this file."""

    READY = enum.auto()
    BUSY = enum.auto()
    BLOCKED = enum.auto()
    COLD = enum.auto()
    OVER = enum.auto()


class Owner(Protocol):
    """The connection behind a transfer, called on the loop."""

    def transfer_done(self) -> None:
        """Everything is with the kernel."""

    def transfer_failed(self, error: Exception) -> None:
        """The link, the file or the code failed; nothing more is sent."""


class Transfer:
    """An answer on its way out: `lead` from memory, then `body`. Holds the body's files from construction to `close`.

    Made and closed on the loop, advanced by one thread at a time.
    """

    __slots__ = (
        "_assured", "_body", "_lead", "_length", "_link", "caller", "dropped", "fd", "first_sent", "flow", "owner",
        "position", "queued", "registered", "state", "taken", "wanted",
    )  # fmt: skip

    def __init__(
        self, owner: Owner, link: Link, fd: int, caller: str, lead: bytes, body: Body | None, queued: float
    ) -> None:
        self.owner = owner
        self.caller = caller
        self.queued = queued
        """When it was made (monotonic seconds)."""
        self.first_sent = 0.0
        """When it had its first turn; 0 before."""
        self.position = 0
        """Bytes of `body` handed over so far."""
        self.taken = 0
        """Bytes handed over so far, the lead's included."""
        # The sender's notes.
        self.fd = fd
        self.state = TransferState.OVER
        self.flow: Flow | None = None
        self.registered = False
        self.dropped: Callable[[], None] | None = None
        self.wanted: Extent | None = None
        """While cold: what is to be read."""
        self._link = link
        self._lead = memoryview(lead)
        self._body = body
        self._length = len(body) if body is not None else 0
        self._assured = -1
        if body is not None:
            body.retain()

    @property
    def lead_left(self) -> int:
        """Bytes of the lead that are still to be sent."""
        return len(self._lead)

    def close(self) -> None:
        """Let go of the files; safe to call twice."""
        if self._body is not None:
            self._body.release()
            self._body = None

    def assure(self, end: int) -> None:
        """The file that was wanted has been read up to `end`; what lies there is not probed again.

        Should memory be so short that it is gone already, one slow send is better than reading it for ever.
        """
        assert self.wanted is not None
        _, offset, length = self.wanted
        self._assured = self.position + min(length, end - offset)

    def advance(self, allowance: int, residency: Residency) -> TransferState:
        """Send about `allowance` bytes, or for as long as there is room; `taken` counts them. Returns the new state.

        Raises OSError when the link is gone or the disk fails, Damaged when a file was cut.
        """
        limit = self.taken + allowance
        while self._lead:
            sent = self._link.send(self._lead, self.position < self._length)
            if not sent:
                return TransferState.BLOCKED
            self.taken += sent
            self._lead = self._lead[sent:]
        while self.position < self._length:
            if self.taken >= limit:
                return TransferState.READY
            assert self._body is not None
            part = self._body.at(self.position)
            if isinstance(part, Extent):
                file, offset, length = part
                count = min(length, limit - self.taken)
                if self.position < self._assured:
                    count = min(count, self._assured - self.position)
                elif not residency.resident(file, offset, count):
                    self.wanted = part
                    return TransferState.COLD
                moved = self._link.sendfile(file.fd, offset, count)
                if moved == 0:
                    file.broken = True
                    raise Damaged(file)
            else:
                count = len(part)
                moved = self._link.send(part, self.position + count < self._length) or None
            if moved is None:
                return TransferState.BLOCKED
            self.taken += moved
            self.position += moved
            if moved < count and self._link.short_is_full:
                return TransferState.BLOCKED
        return TransferState.OVER if self._link.flush() else TransferState.BLOCKED


class Sender:
    """The queue and its threads. All methods are for the loop's thread; those with `_locked` need the lock."""

    def __init__(
        self,
        threads: int,
        quantum: int,
        loop: asyncio.AbstractEventLoop,
        readahead: ReadAhead,
        clock: Callable[[], float],
        failed: Callable[[Exception], None],
    ) -> None:
        """`failed` is called on the loop should a thread end by a bug: then nothing is sent any more."""
        self.active: set[Transfer] = set()
        """Transfers begun and not yet over."""
        self.sent = 0
        """Bytes sent since the start, heads included."""
        self._loop = loop
        self._readahead = readahead
        self._clock = clock
        self._failed = failed
        self._lock = threading.Lock()
        self._turns: Turns[Transfer] = Turns(quantum)
        self._idle = 0
        self._closed = False
        # Threads without work wait here for room in a socket, or for the bell: an eventfd, edge-triggered, so that
        # every ring wakes one thread and nobody needs to read it.
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN | select.EPOLLET)
        self._blocked: dict[int, Transfer] = {}
        self._threads = [threading.Thread(target=self._run, name=f"send-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def begin(self, transfer: Transfer) -> None:
        """Take a transfer in; its owner hears of its end, or ends it by `drop`."""
        self.active.add(transfer)
        with self._lock:
            self._enqueue_locked(transfer)

    def drop(self, transfer: Transfer, then: Callable[[], None]) -> None:
        """Forget a transfer in whatever state; call `then` when nobody uses its link any more, perhaps at once."""
        with self._lock:
            if transfer.state is TransferState.BUSY:
                transfer.dropped = then
                return
            if transfer.state is TransferState.READY:
                self._turns.remove(transfer)
            self._retire_locked(transfer)
        self.active.discard(transfer)
        transfer.close()
        then()

    async def close(self) -> None:
        """End the threads. Every transfer must have been dropped."""
        self._closed = True
        self._ring()
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join)
        self._epoll.close()
        os.close(self._bell)

    # On the loop, called from the threads.

    def _over(self, transfer: Transfer, error: Exception | None) -> None:
        if transfer not in self.active:
            return  # dropped meanwhile
        self.active.remove(transfer)
        transfer.close()
        if transfer.dropped is not None:
            transfer.dropped()
        elif error is not None:
            transfer.owner.transfer_failed(error)
        else:
            transfer.owner.transfer_done()

    def _fetch(self, transfer: Transfer) -> None:
        if transfer.state is TransferState.COLD and transfer.wanted is not None:
            file, offset, _ = transfer.wanted
            transfer.assure(self._readahead.fetch(file, offset, lambda: self._fetched(transfer)))

    def _fetched(self, transfer: Transfer) -> None:
        with self._lock:
            if transfer.state is TransferState.COLD:
                self._enqueue_locked(transfer)

    # In the threads.

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._closed = (
                True  # with one thread less, and a queue that may be wrong, all that waits could wait for ever
            )
            self._ring()
            self._loop.call_soon_threadsafe(self._failed, error)

    def _work(self) -> None:
        residency, picks = Residency(self._readahead.settling), 0
        done: tuple[Transfer, TransferState, int, int, Exception | None] | None = None
        while not self._closed:
            picks += 1
            look = picks % _PICKS_PER_POLL == 0 and self._blocked
            events = self._epoll.poll(0, _EVENTS) if look else ()
            with self._lock:
                self._note_locked(events)
                if done is not None:
                    self._settle_locked(*done)
                    done = None
                turn = self._pick_locked()
                if turn is None:
                    self._idle += 1
            if turn is None:
                events = self._epoll.poll(-1, _EVENTS)
                with self._lock:
                    self._idle -= 1
                    self._note_locked(events)
                continue
            transfer, allowance = turn
            before, error = transfer.taken, None
            if not transfer.first_sent:
                transfer.first_sent = self._clock()
            try:
                state = transfer.advance(allowance, residency)
            except Exception as problem:
                state, error = TransferState.OVER, problem
            sent = transfer.taken - before
            done = (transfer, state, sent, allowance - sent, error)
        if done is not None:
            with self._lock:
                self._settle_locked(*done)
        self._ring()  # for the next thread

    def _note_locked(self, events: Iterable[tuple[int, int]]) -> None:
        """There is room again in these sockets (or they are gone, as sending will find)."""
        for fd, _ in events:
            transfer = self._blocked.pop(fd, None)
            if transfer is not None:
                self._enqueue_locked(transfer)

    def _pick_locked(self) -> tuple[Transfer, int] | None:
        """The transfer whose turn it is, now busy, and how much it may send."""
        turn = self._turns.take()
        if turn is not None:
            turn[0].state = TransferState.BUSY
            if self._idle and self._turns:
                self._ring()  # there may be work for another thread
        return turn

    def _settle_locked(
        self, transfer: Transfer, state: TransferState, sent: int, rest: int, error: Exception | None
    ) -> None:
        """A transfer's turn has ended, with `rest` of its allowance left."""
        self.sent += sent
        self._turns.settle(transfer, rest)
        if transfer.dropped is not None:
            state = TransferState.OVER
        transfer.state = state
        if state is TransferState.READY:
            self._enqueue_locked(transfer)
        elif state is TransferState.BLOCKED:
            self._arm_locked(transfer)
        elif state is TransferState.COLD:
            self._loop.call_soon_threadsafe(self._fetch, transfer)
        else:
            self._retire_locked(transfer)
            self._loop.call_soon_threadsafe(self._over, transfer, error)

    def _arm_locked(self, transfer: Transfer) -> None:
        """Have the kernel say once when there is room, or that the peer is gone.

        Not edge-triggered: a send that was short for another reason than want of room would wait for ever.
        """
        self._blocked[transfer.fd] = transfer
        try:
            if transfer.registered:
                self._epoll.modify(transfer.fd, _ARMED)
            else:
                self._epoll.register(transfer.fd, _ARMED)
                transfer.registered = True
        except OSError as error:  # ENOMEM or ENOSPC, the limits of epoll(7)
            self._retire_locked(transfer)
            self._loop.call_soon_threadsafe(self._over, transfer, error)

    def _enqueue_locked(self, transfer: Transfer) -> None:
        transfer.state = TransferState.READY
        self._turns.add(transfer)
        if self._idle:
            self._ring()

    def _retire_locked(self, transfer: Transfer) -> None:
        transfer.state = TransferState.OVER
        self._turns.leave(transfer)
        self._blocked.pop(transfer.fd, None)
        if transfer.registered:
            self._epoll.unregister(transfer.fd)
            transfer.registered = False

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)
