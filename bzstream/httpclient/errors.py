"""What can go wrong between a client and a server, told apart by what a retry would do.

A `TransientError` may go away by itself: a dropped connection, a busy server. A `ProtocolViolation` is an answer
against HTTP: asking the same server again seldom helps. `ClientError` is the base of both and of everything that the
`client` package raises on purpose.
"""

from __future__ import annotations

from bzstream.errors import BzstreamError

__all__: tuple[str, ...] = (
    "BadProxy", "ClientError", "ConnectionLost", "ProtocolViolation", "Stalled", "TransientError", "Unreachable",
)  # fmt: skip


class ClientError(BzstreamError):
    """Base of every error of a client; the text is the sentence that a person reads."""


class TransientError(ClientError):
    """A retry may succeed. `retry_after`: seconds that the server asked for, else None."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Unreachable(TransientError):
    """No connection: refused, no route, unknown name, a TLS handshake or a proxy that failed."""


class ConnectionLost(TransientError):
    """The connection ended before the answer did."""


class Stalled(TransientError):
    """No byte for longer than the stall time-out, or a small answer that took too long."""


class ProtocolViolation(ClientError):
    """An answer against HTTP or against what was asked for: broken framing, an endless head, another range."""


class BadProxy(ClientError):
    """A proxy variable of the environment cannot be used."""
