"""Two ways for a thread to send for a transfer: a turn like everybody's, or staying with it as long as few others send.

Both hold to one contract: `send` is called by the thread that owns the transfer (it is BUSY), raises nothing, and
returns the turn that has ended, for the sender to settle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bzstream.http.send.page_cache import Probe
from bzstream.http.send.transfer import BLOCKED, BUSY, OVER, READY, Transfer, TransferState

__all__ = ["DedicatedThread", "SharedTurn", "Turn"]


class Turn(NamedTuple):
    """A turn that has ended."""

    transfer: Transfer
    state: TransferState
    """The transfer's new state."""
    charged: int
    """Bytes that the transfer's caller is charged."""
    error: Exception | None


class SharedTurn:
    """One turn, without ever waiting; the caller is charged for what was sent."""

    _waits = False

    def __init__(self, allowance: int, arm: Callable[[Transfer], None], clock: Callable[[], float]) -> None:
        """`allowance`: bytes of a turn. `arm` has a transfer's socket reported when it has room; may raise OSError."""
        self._allowance = allowance
        self._arm = arm
        self._clock = clock

    def send(self, transfer: Transfer, probe: Probe) -> Turn:
        """Send for a transfer that is BUSY with the calling thread."""
        assert transfer.state is BUSY, "only the thread that took the turn sends"
        before, now, error = transfer.taken, self._clock(), None
        if not transfer.first_sent:
            transfer.first_sent = now
        try:
            transfer.transport.wait_for_room(self._waits)
            state = transfer.advance(self._allowance, probe, now)
            if state is BLOCKED:
                self._arm(transfer)
        except Exception as problem:
            state, error = OVER, problem
        return Turn(transfer, state, transfer.taken - before, error)


class DedicatedThread(SharedTurn):
    """Turn after turn, waiting in the kernel for the transfer's reader, for as long as the thread may stay.

    Nobody is charged: what was sent while no other caller wanted to send is owed to nobody.
    """

    _waits = True

    def __init__(
        self,
        allowance: int,
        arm: Callable[[Transfer], None],
        clock: Callable[[], float],
        may_stay: Callable[[Transfer], bool],
    ) -> None:
        """`may_stay` is asked after every turn."""
        super().__init__(allowance, arm, clock)
        self._may_stay = may_stay

    def send(self, transfer: Transfer, probe: Probe) -> Turn:
        while True:
            turn = super().send(transfer, probe)
            if turn.state is not READY or not self._may_stay(transfer):
                return turn._replace(charged=0)
