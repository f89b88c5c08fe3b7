"""One URL of a unit: its failures, its wrong chunks, and how long it is left alone after them.

Pure but for the clock that is passed in; the transfer's lock guards it.
"""

from __future__ import annotations

from collections import Counter

from bzstream.client.address import Address
from bzstream.client.errors import Busy, ClientError, ProtocolViolation, TransientError, Unreachable, WrongHash
from bzstream.client.tuning import Tuning
from bzstream.util.backoff import backoff

__all__ = ["Mirror"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 15.0


class Mirror:
    """`number` is its place in the list that the caller gave."""

    def __init__(self, number: int, address: Address, tuning: Tuning) -> None:
        self.number = number
        self.address = address
        self.workers = 0
        """Workers that work on it."""
        self.not_before = 0.0
        """No request before this moment (monotonic clock)."""
        self.dropped: ClientError | None = None
        """Why it is used no more."""
        self.bytes = 0
        """Payload bytes that came from it."""
        self.rtt = 0.0
        self.receiver: str | None = None
        """The hotkey that the node says it has, for proofs when the caller gave none."""
        self._tuning = tuning
        self._failures = 0
        self._violations = 0
        self._wrong_chunks: Counter[int] = Counter()

    def note_good_chunk(self) -> None:
        """A chunk from it was right."""
        self._failures = 0
        self._violations = 0

    def note_error(self, error: ClientError, now: float) -> ClientError | None:
        """Note an error that a request to it met; returned when it means that the mirror should be dropped."""
        if isinstance(error, ProtocolViolation):
            self._violations += 1
            return error if self._violations >= self._tuning.violations else None
        if not isinstance(error, TransientError):
            return error
        if error.retry_after is not None and error.retry_after > self._tuning.max_retry_after_s:
            return error
        if now >= self.not_before and (error.retry_after or isinstance(error, Unreachable | Busy)):
            # Of many workers that meet the same outage only the first counts it.
            self._failures += 1
            pause = backoff(self._failures, first=FIRST_PAUSE_S, most=LONGEST_PAUSE_S)
            self.not_before = now + (error.retry_after or 0.0) + pause
        return None

    def note_wrong_chunk(self, chunk: int, text: str) -> WrongHash | None:
        """All of `chunk` came from here and is wrong; after a few times returns that error, in these words."""
        self._wrong_chunks[chunk] += 1
        return WrongHash(text) if self._wrong_chunks[chunk] >= self._tuning.max_wrong else None
