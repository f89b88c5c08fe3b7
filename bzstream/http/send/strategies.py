"""Two ways for a thread to send for a transfer: a turn like everybody's, or staying with it as long as few others send.

Both hold to one contract: `send` is called by the thread that owns the transfer (it is BUSY), and returns the turn that
has ended, for the sender to settle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from bzstream.http.send.page_cache import Probe
from bzstream.http.send.transfer import BLOCKED, BUSY, OVER, READY, Transfer, TransferState

__all__ = ["DedicatedThread", "SharedTurn", "Strategy", "Turn"]


class Turn(NamedTuple):
    """A turn that has ended."""

    transfer: Transfer
    state: TransferState
    """The transfer's new state."""
    charged: int
    """Bytes that the transfer's caller is charged."""
    error: Exception | None


class Strategy(Protocol):
    """How a thread sends for a transfer."""

    def send(self, transfer: Transfer, probe: Probe) -> Turn:
        """Send for a transfer that is BUSY with the calling thread. Raises nothing: errors stand in the turn."""


class SharedTurn:
    """One quantum, without ever waiting; the caller is charged for what was sent."""

    __slots__ = ("_arm", "_clock", "_quantum")

    def __init__(self, quantum: int, arm: Callable[[Transfer], None], clock: Callable[[], float]) -> None:
        """`arm` has the poller report a transfer's socket; it may raise OSError."""
        self._quantum = quantum
        self._arm = arm
        self._clock = clock

    def send(self, transfer: Transfer, probe: Probe) -> Turn:
        return _advance(transfer, self._quantum, probe, self._arm, self._clock, wait=False)


class DedicatedThread:
    """The thread stays with the transfer and waits in the kernel for its reader, as long as it may.

    Nobody is charged: what was sent while no other caller wanted to send is owed to nobody.
    """

    __slots__ = ("_arm", "_clock", "_may_stay", "_step")

    def __init__(
        self,
        step: int,
        arm: Callable[[Transfer], None],
        clock: Callable[[], float],
        may_stay: Callable[[Transfer], bool],
    ) -> None:
        """After every `step` bytes `may_stay` is asked."""
        self._step = step
        self._arm = arm
        self._clock = clock
        self._may_stay = may_stay

    def send(self, transfer: Transfer, probe: Probe) -> Turn:
        while True:
            turn = _advance(transfer, self._step, probe, self._arm, self._clock, wait=True)
            if turn.state is not READY or not self._may_stay(transfer):
                return turn._replace(charged=0)


def _advance(
    transfer: Transfer,
    allowance: int,
    probe: Probe,
    arm: Callable[[Transfer], None],
    clock: Callable[[], float],
    *,
    wait: bool,
) -> Turn:
    """Send for a transfer, and have the kernel tell of room where there was none left."""
    assert transfer.state is BUSY, "only the thread that took the turn sends"
    before, now, error = transfer.taken, clock(), None
    if not transfer.first_sent:
        transfer.first_sent = now
    try:
        transfer.transport.wait_for_room(wait)
        state = transfer.advance(allowance, probe, now)
        if state is BLOCKED:
            arm(transfer)
    except Exception as problem:
        state, error = OVER, problem
    return Turn(transfer, state, transfer.taken - before, error)
