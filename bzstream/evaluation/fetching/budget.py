"""What one fetch may take: bytes, seconds and the least speed, counted over all its connections."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from bzstream.config import EvaluationSettings
from bzstream.evaluation.rejection_codes import Refusal

__all__ = ["CancelledFetch", "FetchBudget", "Limits", "OtherConnectionFailed"]


class Limits(NamedTuple):
    """What one fetch may take."""

    max_bytes: int
    timeout_s: float
    stall_s: float
    max_redirects: int
    connections: int = 4
    part_bytes: int = 16 * 1024 * 1024
    """The first range asked for; a file that is not larger is not worth a second connection."""
    attempts: int = 3

    @classmethod
    def of(cls, settings: EvaluationSettings, max_bytes: int) -> Limits:
        """What the settings allow for a file of at most `max_bytes`."""
        return cls(
            max_bytes=max_bytes,
            timeout_s=settings.fetch_timeout_s,
            stall_s=settings.fetch_stall_s,
            max_redirects=settings.max_redirects,
            connections=settings.fetch_connections,
            attempts=settings.fetch_attempts,
        )


class CancelledFetch(Exception):
    """The caller set the event; the partial file is removed."""


class OtherConnectionFailed(Exception):
    """Another connection of the same fetch failed, which ends this one too; its error is the one to report."""


class FetchBudget:
    """Deadline, cancellation and the least speed of one attempt. Any thread.

    The least speed is an eighth of what would just meet the deadline, over each `stall_s`: a byte now and then does not
    hold a place for a quarter of an hour.
    """

    def __init__(self, limits: Limits, deadline: float, cancelled: threading.Event) -> None:
        self.limits = limits
        self.deadline = deadline
        self.cancelled = cancelled
        self.failed = threading.Event()
        """Set when one connection failed, so that the others end too."""
        self._fair_bytes = 0.0
        self._lock = threading.Lock()
        self._window_began = time.monotonic()
        self._window_bytes = 0

    def expect(self, size: int) -> None:
        """The body begins, of so many bytes in all; it has its own time to stall in."""
        with self._lock:
            self._fair_bytes = size * self.limits.stall_s / self.limits.timeout_s / 8
            self._window_began, self._window_bytes = time.monotonic(), 0

    def check(self) -> None:
        """Raises Refusal, CancelledFetch and OtherConnectionFailed when the fetch must end."""
        now = time.monotonic()
        if self.cancelled.is_set():
            raise CancelledFetch
        if now >= self.deadline:
            raise Refusal("fetch_timeout", f"the file did not arrive within {self.limits.timeout_s:g} s")
        if self.failed.is_set():
            raise OtherConnectionFailed
        with self._lock:
            if now - self._window_began >= self.limits.stall_s:
                if self._window_bytes <= self._fair_bytes:
                    raise Refusal("stalled", f"{self._window_bytes} bytes arrived in {self.limits.stall_s:g} s")
                self._window_began, self._window_bytes = now, 0

    def count(self, received: int) -> None:
        with self._lock:
            self._window_bytes += received

    def seconds_left(self) -> float:
        """For one step: until the deadline, at most `stall_s`."""
        return max(0.001, min(self.limits.stall_s, self.deadline - time.monotonic()))
