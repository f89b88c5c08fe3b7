"""The sender: threads that move the bytes of all downloads from the page cache to the sockets, by turns.

A download is a `Transfer`. At any time it is *ready* (there may be room in its socket), *busy* (a thread is sending for
it), *blocked* (the socket was full; the kernel will say when there is room) or *cold* (its next bytes are on their way
from the disk). Only ready transfers stand in the queue.

Whose turn it is, and for how many bytes, `turns.py` decides: fairly among callers, however many connections each has.

The bytes never enter this process: sendfile moves them from the page cache to the socket, from explicit offsets, so
that any number of downloads share one open file. Moving them is work for the kernel, and sendfile does it without the
interpreter's lock; so a few threads do nothing else, and the event loop keeps to requests. A second thread is worth
another core of sending, and no download, nor a thousand of them, makes a request wait.

Threads share one queue under one lock, held for microseconds, and make no call meanwhile that gives the interpreter's
lock away (but at a transfer's end): whoever took that would then wait for the queue's, and each for the other to wake.

As long as there are few transfers, and all of one caller or each of another, nobody needs turns. Each has a thread to
itself then, and its thread waits in the kernel for the reader, up to `PATIENCE_S`: at 8 downloads that is worth a
quarter more bytes a second, and a fifth of the CPU time, as a loop in C has it. `send_threads` places are for taking
turns; who stays with one transfer gives its place to another thread, so that whoever comes is served at once.

A transfer has one user at a time: its thread while it is busy, the loop otherwise. That is the one rule here; `drop` of
a busy transfer therefore only marks it, and the link is closed (and its descriptor free for reuse) when its thread has
let go.
"""

from __future__ import annotations

import asyncio
import enum
import os
import select
import threading
from collections.abc import Callable, Iterable
from math import inf
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
_AHEAD = 32 * 1024 * 1024
_BELIEVED_S = 1.0
"""For so many bytes at once it is asked whether they are in memory, and for so long the answer is believed."""
_FEW = 8
"""So many transfers, at most, have a thread each. (With 64, /health beside as many downloads waited for 140 ms.)"""
_STAY = 32 * 1024 * 1024
"""After so many bytes, at the latest, a thread that stays with a transfer sees whether they are still few."""
_NICE = 5
"""Sending stands back behind requests: on full cores it made /health's p99 2.5 ms of 6.9, beside 256 downloads. (On
Linux a thread has a nice value of its own.)"""
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


READY, BUSY, BLOCKED, COLD, OVER = TransferState
"""The same under names of their own: looking one up in its class takes 0.1 µs, ten times a turn."""


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
        "_assured", "_assured_until", "_body", "_file", "_lead", "_length", "_part_end", "_shift", "caller",
        "dropped", "fd", "first_sent", "flow", "link", "owner", "position", "queued", "registered", "roused", "state",
        "taken", "wanted",
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
        self.state = OVER
        self.flow: Flow | None = None
        self.registered = False
        self.roused = False
        """While busy: there was room again before the thread had let go."""
        self.dropped: Callable[[], None] | None = None
        self.wanted: Extent | None = None
        """While cold: what is to be read."""
        self.link = link
        self._lead = memoryview(lead)
        self._body = body
        self._length = len(body) if body is not None else 0
        self._assured, self._assured_until = 0, 0.0
        # The run of bytes that `position` is in: its file (None: bytes in memory), what to add to a position for the
        # offset there, and the position where it ends.
        self._file: UnitFile | None = None
        self._shift = self._part_end = 0
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
        self._assured, self._assured_until = self.position + min(length, end - offset), inf

    def advance(self, allowance: int, residency: Residency, now: float) -> TransferState:
        """Send about `allowance` bytes, or for as long as there is room; `taken` counts them. Returns the new state.

        Raises OSError when the link is gone or the disk fails, Damaged when a file was cut.
        """
        limit = self.taken + allowance
        while self._lead:
            sent = self.link.send(self._lead, self.position < self._length)
            if not sent:
                return BLOCKED
            self.taken += sent
            self._lead = self._lead[sent:]
        while self.position < self._length:
            count = limit - self.taken
            if count <= 0:
                return READY
            if self.position >= self._part_end:
                self._enter_part()
            file = self._file
            if file is not None:
                if self.position >= self._assured or now >= self._assured_until:
                    self._probe(file, count, residency, now)
                    if self.position >= self._assured:
                        return COLD
                count = min(count, self._assured - self.position)
                moved = self.link.sendfile(file.fd, self._shift + self.position, count)
                if moved == 0:
                    file.broken = True
                    raise Damaged(file)
            else:
                assert self._body is not None
                part = self._body.at(self.position)
                assert isinstance(part, bytes)
                count = len(part)
                moved = self.link.send(part, self.position + count < self._length) or None
            if moved is None:
                return BLOCKED
            self.taken += moved
            self.position += moved
            if moved < count and self.link.short_is_full:
                return BLOCKED
        return OVER if self.link.flush() else BLOCKED

    def _probe(self, file: UnitFile, count: int, residency: Residency, now: float) -> None:
        """Find out whether the next `count` bytes, or the next `_AHEAD`, can be sent without waiting for the disk.

        A probe's price is the call, not the bytes, so that one is made for several turns. What it says is soon old.
        """
        offset, left = self._shift + self.position, self._part_end - self.position
        self._assured, self._assured_until = self.position, now + _BELIEVED_S
        for length in (min(left, _AHEAD), min(left, count)):
            if residency.resident(file, offset, length):
                self._assured += length
                return
        self.wanted = Extent(file, offset, left)

    def _enter_part(self) -> None:
        """Look up the run of bytes that holds `position`; it is asked for once, not every turn."""
        assert self._body is not None
        part = self._body.at(self.position)
        if isinstance(part, Extent):
            self._file, self._shift = part.file, part.offset - self.position
            self._part_end = self.position + part.length
        else:
            self._file = None
            self._part_end = self.position + len(part)


_Outcome = tuple[Transfer, TransferState, int, int, Exception | None]
"""A turn that has ended: whose, its new state, bytes sent, bytes that its caller is charged, what went wrong."""


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
        self._places = threading.Semaphore(threads)
        # Threads without work wait here for room in a socket, or for the bell: an eventfd, edge-triggered, so that
        # every ring wakes one thread and nobody needs to read it.
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN | select.EPOLLET)
        self._sockets: dict[int, Transfer] = {}
        """Those that the epoll knows, by descriptor."""
        self._threads = [
            threading.Thread(target=self._run, name=f"send-{n}", daemon=True) for n in range(threads + _FEW)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, transfer: Transfer) -> None:
        """Take a transfer in; its owner hears of its end, or ends it by `drop`."""
        self.active.add(transfer)
        with self._lock:
            self._enqueue_locked(transfer)
            idle = self._idle
        if idle:
            self._ring()

    def drop(self, transfer: Transfer, then: Callable[[], None]) -> None:
        """Forget a transfer in whatever state; call `then` when nobody uses its link any more, perhaps at once."""
        with self._lock:
            if transfer.state is BUSY:
                transfer.dropped = then
                return
            if transfer.state is READY:
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
        if transfer.state is COLD and transfer.wanted is not None:
            transfer.assure(self._readahead.fetch(*transfer.wanted, lambda: self._fetched(transfer)))

    def _fetched(self, transfer: Transfer) -> None:
        with self._lock:
            if transfer.state is COLD:
                self._enqueue_locked(transfer)
            idle = self._idle
        if idle:
            self._ring()

    # In the threads.

    def _run(self) -> None:
        os.nice(_NICE)
        try:
            self._work()
        except Exception as error:
            # With one thread less, and a queue that may be wrong, all that waits could wait for ever.
            self._closed = True
            self._ring()
            self._loop.call_soon_threadsafe(self._failed, error)

    def _work(self) -> None:
        residency = Residency(self._readahead.settling)
        while not self._closed:
            with self._places:
                transfer = self._serve(residency)
            if transfer is not None:
                # Nobody else wants this thread: it stays with the one transfer, and its place is another's.
                outcome = self._stay(transfer, residency)
                with self._lock:
                    self._settle_locked(outcome)
                    idle = self._idle
                if idle:
                    self._ring()
        self._ring()  # for the next thread

    def _serve(self, residency: Residency) -> Transfer | None:
        """Take turns, one after the other, until there is a transfer to stay with; None: the sender is closed."""
        picks = 0
        done: _Outcome | None = None
        while not self._closed:
            picks += 1
            look = picks % _PICKS_PER_POLL == 0 and self._sockets
            events = self._epoll.poll(0, _EVENTS) if look else None
            with self._lock:
                if events:
                    self._note_locked(events)
                if done is not None:
                    self._settle_locked(done)
                    done = None
                transfer = self._turns.take()
                if transfer is not None:
                    transfer.state = BUSY
                    more = self._idle and self._turns
                    few = self._turns.needless(_FEW)
                else:
                    self._idle += 1
            if transfer is None:
                events = self._epoll.poll(-1, _EVENTS)
                with self._lock:
                    self._idle -= 1
                    self._note_locked(events)
                continue
            if more:
                self._ring()  # there may be work for another thread
            if few:
                return transfer
            done = self._take_turn(transfer, self._turns.quantum, residency, stay=False)
        if done is not None:
            with self._lock:
                self._settle_locked(done)
        return None

    def _stay(self, transfer: Transfer, residency: Residency) -> _Outcome:
        """Send for one transfer, waiting for its reader, as long as there are few."""
        while True:
            outcome = self._take_turn(transfer, _STAY, residency, stay=True)
            _, state, sent, _, error = outcome
            with self._lock:
                few = self._turns.needless(_FEW)
                if state is READY and few and transfer.dropped is None and not self._closed:
                    self.sent += sent
                    continue
            # What was sent while nobody else wanted to is owed to nobody.
            return transfer, state, sent, 0, error

    def _take_turn(self, transfer: Transfer, allowance: int, residency: Residency, *, stay: bool) -> _Outcome:
        """Send for a transfer that is busy, and have the kernel tell of room where there was none left."""
        before, now, error = transfer.taken, self._clock(), None
        if not transfer.first_sent:
            transfer.first_sent = now
        try:
            transfer.link.wait_for_room(stay)
            state = transfer.advance(allowance, residency, now)
            if state is BLOCKED:
                self._arm(transfer)
        except Exception as problem:
            state, error = OVER, problem
        sent = transfer.taken - before
        return transfer, state, sent, sent, error

    def _arm(self, transfer: Transfer) -> None:
        """Have the kernel say once when there is room, or that the peer is gone. For the transfer's thread.

        Not edge-triggered: a send that was short for another reason than want of room would wait for ever. Raises
        OSError (ENOMEM, ENOSPC: the limits of epoll(7)).
        """
        fd = transfer.fd
        if transfer.registered:
            self._epoll.modify(fd, _ARMED)
            return
        self._sockets[fd] = transfer
        try:
            self._epoll.register(fd, _ARMED)
        except OSError:
            del self._sockets[fd]
            raise
        transfer.registered = True

    def _note_locked(self, events: Iterable[tuple[int, int]]) -> None:
        """There is room again in these sockets (or they are gone, as sending will find)."""
        for fd, _ in events:
            transfer = self._sockets.get(fd)
            if transfer is None:
                continue
            if transfer.state is BLOCKED:
                self._enqueue_locked(transfer)
            elif transfer.state is BUSY:
                transfer.roused = True

    def _settle_locked(self, outcome: _Outcome) -> None:
        """A transfer's turn has ended."""
        transfer, state, sent, charge, error = outcome
        self.sent += sent
        self._turns.settle(transfer, charge)
        if transfer.dropped is not None:
            state = OVER
        if state is READY or (state is BLOCKED and transfer.roused):
            self._enqueue_locked(transfer)
            return
        transfer.state = state
        if state is COLD:
            self._loop.call_soon_threadsafe(self._fetch, transfer)
        elif state is OVER:
            self._retire_locked(transfer)
            self._loop.call_soon_threadsafe(self._over, transfer, error)

    def _enqueue_locked(self, transfer: Transfer) -> None:
        transfer.state = READY
        transfer.roused = False
        self._turns.add(transfer)

    def _retire_locked(self, transfer: Transfer) -> None:
        transfer.state = OVER
        self._turns.leave(transfer)
        if transfer.registered:
            transfer.registered = False
            del self._sockets[transfer.fd]
            self._epoll.unregister(transfer.fd)

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)
