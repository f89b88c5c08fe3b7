"""The run queue: who sends next, and how much.

A download is a `Transfer`. At any time it is *ready* (there may be room in its socket), *blocked* (the socket was full;
the poller says when there is room again) or *cold* (its next bytes are on their way from the disk). Only ready
transfers stand in the queue. Each turn of the event loop spends a few milliseconds on them and then goes back to accept
connections and answer small requests, so no download, and no thousand of them, makes anybody wait for long.

Whose turn it is, deficit round robin decides on two levels. Callers take turns, each with a quantum of bytes; what a
caller could not use for lack of room is not saved up. Inside a caller its connections take turns. So a miner with 64
connections gets one miner's share, and a miner with one connection gets the same.

The bytes never enter this process: sendfile moves them from the page cache to the socket, a quantum at a time, from
explicit offsets, so that any number of downloads share one open file.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Protocol

from bzstream.http.bodies import Body
from bzstream.http.links import Link
from bzstream.http.readahead import ReadAhead, resident
from bzstream.payload import Extent, UnitFile

__all__ = ["Damaged", "Sender", "Transfer", "TransferState"]


class Damaged(Exception):
    """A file is shorter than it was when opened: its bytes cannot be sent, and nothing else may take their place."""

    def __init__(self, file: UnitFile) -> None:
        super().__init__("a unit file was cut while it was served")
        self.file = file


class TransferState(enum.Enum):
    """Where a transfer stands; see the head of this file."""

    READY = enum.auto()
    BLOCKED = enum.auto()
    COLD = enum.auto()
    DONE = enum.auto()


class Owner(Protocol):
    """The connection behind a transfer."""

    def transfer_done(self) -> None:
        """Everything is with the kernel."""

    def transfer_failed(self, error: Exception) -> None:
        """The link, the file or the code failed; nothing more is sent."""


class Flow:
    """One caller's ready transfers and what it may still send this round."""

    __slots__ = ("caller", "deficit", "ready")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.deficit = 0
        self.ready: deque[Transfer] = deque()


class Transfer:
    """An answer on its way out: `lead` from memory, then `body` from position `position` on.

    Holds the body's files from construction to `close`.
    """

    __slots__ = (
        "_assured", "_body", "_lead", "_length", "_link", "caller", "first_sent", "owner", "position", "queued",
        "state", "taken",
    )  # fmt: skip

    def __init__(self, owner: Owner, link: Link, caller: str, lead: bytes, body: Body | None, queued: float) -> None:
        self.owner = owner
        self.caller = caller
        self.queued = queued
        """When it entered the queue (monotonic seconds)."""
        self.first_sent = 0.0
        """When it had its first turn; 0 before."""
        self.state = TransferState.DONE
        self.position = 0
        """Bytes of `body` handed over so far."""
        self.taken = 0
        """Bytes handed over so far, the lead's included."""
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

    def advance(self, allowance: int, readahead: ReadAhead, wake: Callable[[Transfer], None]) -> int:
        """Send up to about `allowance` bytes and set `state`; returns bytes sent.

        Raises OSError when the link is gone or the disk fails, Damaged when a file was cut.
        """
        sent = 0
        if self._lead:
            sent = self._link.send(self._lead, self.position < self._length)
            self._lead = self._lead[sent:]
            if self._lead:
                self.state = TransferState.BLOCKED
                return sent
        while self.position < self._length:
            if sent >= allowance:
                self.state = TransferState.READY
                return sent
            assert self._body is not None
            part = self._body.at(self.position)
            if isinstance(part, Extent):
                count = self._send_extent(part, min(part.length, allowance - sent), readahead, wake)
                if count is None:
                    return sent
            else:
                count = self._link.send(part, self.position + len(part) < self._length)
                if count == 0:
                    self.state = TransferState.BLOCKED
                    return sent
            sent += count
            self.position += count
        self.state = TransferState.DONE if self._link.flush() else TransferState.BLOCKED
        return sent

    def _send_extent(
        self, extent: Extent, count: int, readahead: ReadAhead, wake: Callable[[Transfer], None]
    ) -> int | None:
        """Bytes sent from a file; None when there was no room or the pages are cold (`state` says which)."""
        file, offset, length = extent
        # What a read-ahead just brought in is not probed again: should memory be so short that it is gone already, one
        # slow send is better than reading it for ever.
        if self.position < self._assured:
            count = min(count, self._assured - self.position)
        elif not resident(file.fd, offset, count):
            self.state = TransferState.COLD
            end = readahead.fetch(file, offset, lambda: wake(self))
            self._assured = self.position + min(length, end - offset)
            return None
        sent = self._link.sendfile(file.fd, offset, count)
        if sent is None:
            self.state = TransferState.BLOCKED
            return None
        if sent == 0:
            file.broken = True
            raise Damaged(file)
        return sent


class Sender:
    """The queue of ready transfers. `run` once a turn of the event loop while `busy`."""

    __slots__ = ("_clock", "_flows", "_quantum", "_readahead", "_round", "_wake_loop", "active", "sent")

    def __init__(
        self, quantum: int, readahead: ReadAhead, clock: Callable[[], float], wake_loop: Callable[[], None]
    ) -> None:
        self._quantum = quantum
        self._readahead = readahead
        self._clock = clock
        self._wake_loop = wake_loop
        self._flows: dict[str, Flow] = {}
        self._round: deque[Flow] = deque()
        self.active: set[Transfer] = set()
        """Transfers begun and not yet over."""
        self.sent = 0
        """Bytes sent since the start, heads included."""

    @property
    def busy(self) -> bool:
        """Whether a transfer is ready."""
        return bool(self._round)

    def begin(self, transfer: Transfer) -> None:
        """Take a transfer in; its owner hears of its end, or ends it by `drop`."""
        self.active.add(transfer)
        self._enqueue(transfer)

    def writable(self, transfer: Transfer) -> None:
        """There is room in the socket again."""
        if transfer.state is TransferState.BLOCKED:
            self._enqueue(transfer)

    def drop(self, transfer: Transfer) -> None:
        """Forget a transfer, whatever its state, and let its files go."""
        if transfer in self.active:
            self.active.remove(transfer)
            flow = self._flows.get(transfer.caller)
            if flow is not None and transfer.state is TransferState.READY:
                try:
                    flow.ready.remove(transfer)
                except ValueError:
                    pass  # it is the one whose turn it is
            transfer.state = TransferState.DONE
        transfer.close()

    def run(self, budget: float) -> None:
        """Let ready transfers send for about `budget` seconds."""
        deadline = self._clock() + budget
        while self._round:
            flow = self._round[0]
            if not flow.ready:
                self._round.popleft()
                del self._flows[flow.caller]
                continue
            if flow.deficit <= 0:
                # The round comes by: a new quantum, less what was overdrawn. It goes to the end once that is used.
                flow.deficit += self._quantum
                if flow.deficit <= 0:
                    self._round.rotate(-1)
                    continue
            self._step(flow, flow.ready.popleft())
            if flow.deficit <= 0:
                self._round.rotate(-1)
            if self._clock() >= deadline:
                return

    def _step(self, flow: Flow, transfer: Transfer) -> None:
        if not transfer.first_sent:
            transfer.first_sent = self._clock()
        try:
            sent = transfer.advance(flow.deficit, self._readahead, self._wake)
        except Exception as error:
            self.drop(transfer)
            transfer.owner.transfer_failed(error)
            return
        flow.deficit -= sent
        transfer.taken += sent
        self.sent += sent
        if transfer.state is TransferState.READY:
            flow.ready.append(transfer)
        elif transfer.state is TransferState.DONE:
            self.drop(transfer)
            transfer.owner.transfer_done()

    def _wake(self, transfer: Transfer) -> None:
        """The pages that a cold transfer waits for have come."""
        if transfer.state is TransferState.COLD:
            self._enqueue(transfer)
            self._wake_loop()

    def _enqueue(self, transfer: Transfer) -> None:
        transfer.state = TransferState.READY
        flow = self._flows.get(transfer.caller)
        if flow is None:
            flow = self._flows[transfer.caller] = Flow(transfer.caller)
            self._round.append(flow)
        flow.ready.append(transfer)
