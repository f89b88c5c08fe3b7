"""One response on its way out: what has been sent of it, and what its socket and its file allow next.

Who owns a transfer depends on its state:

    BUSY                      the sending thread that took its turn: it alone calls `advance` and the transport's sends
    READY, BLOCKED, COLD      nobody sends; the event loop's thread may close it
    OVER                      the event loop's thread

`state`, `flow`, `writable_again` and `dropped` change under the sender's lock. Everything else belongs to the owner.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from math import inf
from typing import Protocol

from bzstream.http.protocol.bodies import Body
from bzstream.http.send.fair_queue import Flow
from bzstream.http.send.page_cache import Probe
from bzstream.payload import Extent, UnitFile

__all__ = ["BLOCKED", "BUSY", "COLD", "OVER", "READY", "DamagedFile", "Outgoing", "Transfer", "TransferOwner",
           "TransferState"]  # fmt: skip

_PROBE_BYTES = 32 * 1024 * 1024
_PROBE_S = 1.0
"""The page cache is asked about so many bytes at once, and the answer is trusted for so long."""


class DamagedFile(Exception):
    """A file is shorter than it was when opened: its bytes cannot be sent, and nothing else may take their place."""

    def __init__(self, file: UnitFile) -> None:
        super().__init__("a unit file was cut while it was served")
        self.file = file


class TransferState(enum.Enum):
    """Where a transfer stands."""

    READY = enum.auto()
    """It waits for its turn; there may be room in its socket."""
    BUSY = enum.auto()
    """A thread is sending for it."""
    BLOCKED = enum.auto()
    """Its socket was full; the kernel will say when there is room."""
    COLD = enum.auto()
    """Its next bytes are on their way from the disk."""
    OVER = enum.auto()
    """Everything is sent, or nothing more will be; also before the sender has it."""


READY, BUSY, BLOCKED, COLD, OVER = TransferState
"""The same under names of their own: looking one up in its class takes 0.1 µs, ten times a turn."""


class Outgoing(Protocol):
    """What the sender needs of a transport."""

    short_send_means_full: bool
    """Whether `sendfile` sends less than it was asked only for want of room, so that trying again is in vain."""

    def send(self, data: bytes | memoryview, more: bool) -> int:
        """Take some of `data`, 0 when there is no room. `more`: hold a last small packet back, more follows."""

    def sendfile(self, fd: int, offset: int, count: int) -> int | None:
        """Send from a file: bytes sent, 0 at the end of the file, None when there is no room."""

    def wait_for_room(self, wait: bool) -> None:
        """Whether `sendfile` waits a little for room before it sends less than it was asked for.

        Nothing else ever waits. A transport that cannot do this (TLS in user space) does not.
        """

    def flush(self) -> bool:
        """Whether everything taken is with the kernel."""


class TransferOwner(Protocol):
    """The connection behind a transfer, called on the event loop."""

    def transfer_done(self) -> None:
        """Everything is with the kernel."""

    def transfer_failed(self, error: Exception) -> None:
        """The transport, the file or the code failed; nothing more is sent."""


class Transfer:
    """Bytes from memory (`lead`), then `body`. Holds the body's files from construction to `close`."""

    __slots__ = (
        "_body", "_cached_until", "_file", "_lead", "_length", "_part_end", "_shift", "_trusted_until", "caller",
        "dropped", "fd", "first_sent", "flow", "owner", "position", "queued", "state", "taken",
        "transport", "wanted", "writable_again",
    )  # fmt: skip

    def __init__(
        self,
        owner: TransferOwner,
        transport: Outgoing,
        fd: int,
        caller: str,
        lead: bytes,
        body: Body | None,
        queued: float,
    ) -> None:
        """`fd`: the descriptor of the transport's socket. `queued`: now, in monotonic seconds."""
        self.owner, self.caller = owner, caller
        self.transport, self.fd = transport, fd
        self.queued = queued
        self.first_sent = 0.0
        """When it had its first turn (monotonic seconds); 0 before."""
        self.position = 0
        """Bytes of `body` handed to the kernel so far."""
        self.taken = 0
        """Bytes handed to the kernel so far, the lead's included."""
        # The sender's notes.
        self.state = OVER
        self.flow: Flow | None = None
        self.writable_again = False
        """While BUSY: there was room again before the thread had let go."""
        self.dropped: Callable[[], None] | None = None
        """While BUSY: it is to be given up, and what to call then."""
        self.wanted: Extent | None = None
        """While COLD: what is to be read."""
        self._lead = memoryview(lead)
        self._body = body
        self._length = len(body) if body is not None else 0
        # The page cache holds the bytes up to a position, as far as was known until a time.
        self._cached_until, self._trusted_until = 0, 0.0
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
        """Let go of the files; safe to call twice. For the event loop's thread."""
        assert self.state is not BUSY, "a thread is sending from these files"
        if self._body is not None:
            self._body.release()
            self._body = None

    def mark_cached(self, end: int) -> None:
        """The file that was wanted has been read up to `end`; what is before it is not probed again.

        Should memory be so short that it is gone already, one slow send is better than reading it for ever.
        """
        assert self.state is COLD
        assert self.wanted is not None
        _, offset, length = self.wanted
        self._cached_until, self._trusted_until = self.position + min(length, end - offset), inf

    def advance(self, allowance: int, probe: Probe, now: float) -> TransferState:
        """Send about `allowance` bytes, or for as long as there is room; `taken` counts them. Returns the new state.

        For the thread that has the transfer's turn. Raises OSError when the transport is gone or the disk fails,
        DamagedFile when a file was cut.
        """
        limit = self.taken + allowance
        while self._lead:
            sent = self.transport.send(self._lead, self.position < self._length)
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
                if self.position >= self._cached_until or now >= self._trusted_until:
                    self._ask(file, count, probe, now)
                    if self.position >= self._cached_until:
                        return COLD
                count = min(count, self._cached_until - self.position)
                moved = self.transport.sendfile(file.fd, self._shift + self.position, count)
                if moved == 0:
                    file.broken = True
                    raise DamagedFile(file)
            else:
                assert self._body is not None
                part = self._body.at(self.position)
                assert isinstance(part, bytes)
                count = len(part)
                moved = self.transport.send(part, self.position + count < self._length) or None
            if moved is None:
                return BLOCKED
            self.taken += moved
            self.position += moved
            if moved < count and self.transport.short_send_means_full:
                return BLOCKED
        return OVER if self.transport.flush() else BLOCKED

    def _ask(self, file: UnitFile, count: int, probe: Probe, now: float) -> None:
        """Find out whether the next `_PROBE_BYTES`, or at least the next `count` bytes, are in the page cache.

        The price of a probe is the call, not the bytes, so one serves several turns. Its answer is soon out of date.
        """
        offset, left = self._shift + self.position, self._part_end - self.position
        self._cached_until, self._trusted_until = self.position, now + _PROBE_S
        for length in (min(left, _PROBE_BYTES), min(left, count)):
            if probe.is_cached(file, offset, length):
                self._cached_until += length
                return
        self.wanted = Extent(file, offset, left)

    def _enter_part(self) -> None:
        """Look up the run of bytes that holds `position`: once, not in every turn."""
        assert self._body is not None
        part = self._body.at(self.position)
        if isinstance(part, Extent):
            self._file, self._shift = part.file, part.offset - self.position
            self._part_end = self.position + part.length
        else:
            self._file = None
            self._part_end = self.position + len(part)
