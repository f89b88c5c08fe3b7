"""One URL of a unit and how far it is to be believed: failures, strikes, back-off.

Pure but for the clock that is passed in; the transfer's lock guards it.
"""

from __future__ import annotations

import random
from collections import Counter

from bzstream.client.address import Address
from bzstream.client.errors import ClientError, Misbehaved, Passing, Refused, Unreachable, WrongHash
from bzstream.client.tuning import Tuning

__all__ = ["Mirror", "backoff"]


def backoff(failures: int, *, first: float = 0.1, most: float = 15.0) -> float:
    """Seconds to wait after the n-th failure in a row: doubling, jittered over a factor of 3, so that many clients that
    lost the same server do not come back in the same instant.
    """
    return float(min(most, first * 2.0 ** min(failures - 1, 20)) * random.uniform(0.5, 1.5))


class Mirror:
    """`number` is its place in the list that the caller gave."""

    def __init__(self, number: int, address: Address, tuning: Tuning) -> None:
        self.number = number
        self.address = address
        self.lanes = 0
        """Lanes that work on it."""
        self.not_before = 0.0
        """No request before this moment (monotonic clock)."""
        self.dropped: ClientError | None = None
        """Why it is used no more."""
        self.bytes = 0
        """Payload bytes that came from it."""
        self.rtt = 0.0
        self._tuning = tuning
        self._failures = 0
        self._violations = 0
        self._strikes: Counter[int] = Counter()

    def good(self) -> None:
        """A chunk from it was right."""
        self._failures = 0
        self._violations = 0

    def trouble(self, error: ClientError, now: float) -> None:
        """Draw the consequence of an error that a request to it met."""
        if isinstance(error, Misbehaved):
            self._violations += 1
            if self._violations >= self._tuning.violations:
                self.dropped = error
        elif isinstance(error, Passing):
            if error.retry_after is not None and error.retry_after > self._tuning.max_retry_after_s:
                self.dropped = error
            elif now >= self.not_before:
                # Of many lanes that meet the same outage only the first counts it.
                self._failures += 1
                least = error.retry_after or 0.0
                wait = backoff(self._failures) if isinstance(error, Unreachable) or least else 0.0
                self.not_before = now + least + wait
        elif isinstance(error, Refused | WrongHash):
            self.dropped = error

    def strike(self, chunk: int, text: str) -> None:
        """All of `chunk` came from here and is wrong."""
        self._strikes[chunk] += 1
        if self._strikes[chunk] >= self._tuning.strikes:
            self.dropped = WrongHash(text)
