"""What the server needs of an application, and what it tells an observer, which makes logs and metrics of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from bzstream.http.protocol.messages import Endpoint, Request

__all__ = ["Application", "Observer", "RequestRecord"]


class RequestRecord(msgspec.Struct, frozen=True):
    """One request, reported when the last byte of its response was handed to the kernel or its connection was lost.

    A request whose client went away before there was a response is reported with status 499 (nginx's convention).
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
    """Body bytes that the response has."""
    seconds: float
    """From the first byte of the request's head to the last byte of the response."""
    queued: float
    """Seconds that the response waited for its first turn to be sent."""
    caller: str
    peer: str

    @property
    def complete(self) -> bool:
        """Whether every byte was sent."""
        return self.sent == self.length


class Observer:
    """Is told what happens, on the event loop. Methods must not block and must not raise; these here do nothing."""

    def on_request(self, record: RequestRecord) -> None:
        """A request is over."""

    def on_stall(self, seconds: float) -> None:
        """The event loop was late by so much (reported from 10 ms up)."""

    def on_warning(self, text: str) -> None:
        """Something outside is wrong and the server goes on; `text` is one sentence for the operator."""

    def on_error(self, error: BaseException, request: Request | None) -> None:
        """An exception that is a bug: the client got a 500 without details, or lost its connection."""

    def on_damage(self, path: Path) -> None:
        """A file is shorter than when it was opened; the download was broken off, nothing was padded."""


class Application(Protocol):
    """What is served."""

    def admit(self, request: Request) -> Endpoint:
        """Decide from the head alone, at once and without blocking: 401, 404 (unknown path), 405, in this order.

        May set `request.caller` to a bound or proven hotkey. The core then goes on in this order: 413 and 417 for the
        body's head, the endpoint's `check`, the limits (429, 503), 100 and the body, the endpoint's `handle`.
        Raises HttpError to refuse.
        """
