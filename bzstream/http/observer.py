"""What the HTTP core tells the outside about itself; logs and metrics are made from this elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from bzstream.http.messages import Endpoint, Request

__all__ = ["Application", "Observer", "RequestRecord", "SilentObserver"]


class RequestRecord(msgspec.Struct, frozen=True):
    """One answered request, told when its last byte was handed to the kernel or its connection was lost.

    A request whose client went away before there was an answer is told with status 499 (nginx's convention).
    """

    method: str
    """Empty when the request could not be parsed."""
    route: str
    """The route's pattern, never the raw target (which a hostile client fills); empty when none matched."""
    label: str
    """The representation's label, such as `partial/0`, or empty."""
    status: int
    sent: int
    """Body bytes handed to the kernel."""
    length: int
    """Body bytes that the answer has."""
    seconds: float
    """From the first byte of the request's head to the last byte of the answer."""
    queued: float
    """Seconds that the answer waited for its first turn in the run queue."""
    caller: str
    peer: str

    @property
    def complete(self) -> bool:
        """Whether every byte was sent."""
        return self.sent == self.length


class Observer(Protocol):
    """Called on the event loop; must not block and must not raise."""

    def on_request(self, record: RequestRecord) -> None:
        """A request is over."""

    def on_stall(self, seconds: float) -> None:
        """The event loop was late by so much (told from 10 ms up)."""

    def on_error(self, error: BaseException, request: Request | None) -> None:
        """An exception that is a bug: the client got a 500 without details, or lost its connection."""

    def on_damage(self, path: Path) -> None:
        """A file turned out shorter than when it was opened; the download was broken off, nothing was padded."""


class SilentObserver:
    """An observer that keeps nothing."""

    def on_request(self, record: RequestRecord) -> None:
        pass

    def on_stall(self, seconds: float) -> None:
        pass

    def on_error(self, error: BaseException, request: Request | None) -> None:
        pass

    def on_damage(self, path: Path) -> None:
        pass


class Application(Protocol):
    """What is served."""

    def admit(self, request: Request) -> Endpoint:
        """Decide from the head alone, at once and without blocking: 401, 404 (unknown path), 405, in this order.

        May set `request.caller` to a bound or proven hotkey. The core then goes on in this order: 413 and 417 for the
        body's head, the endpoint's `check`, the limits (429, 503), 100 and the body, the endpoint's `handle`.
        Raises HttpError to refuse.
        """
