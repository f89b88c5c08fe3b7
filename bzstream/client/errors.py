"""What can go wrong on the client's side, and who has to do something about it.

Three families, told apart by what a retry would do. `Passing` trouble goes away by itself (a dropped connection, a
busy server): the transfer waits and tries again. A `Misbehaved` server answered against the protocol: a few strikes
are forgiven, then it is dropped. Everything else is final for the URL that it came from, and its sentence is what
the person reads.
"""

from __future__ import annotations

from bzstream.errors import BzstreamError

__all__ = [
    "BadManifest",
    "BadSignature",
    "BadUrl",
    "Busy",
    "ClientError",
    "DiskTrouble",
    "Dropped",
    "FolderBusy",
    "Forbidden",
    "Misbehaved",
    "Moved",
    "NotFound",
    "Passing",
    "Refused",
    "Stalled",
    "Stopped",
    "Unauthorized",
    "Unreachable",
    "WrongHash",
]


class ClientError(BzstreamError):
    """Base of everything that the client raises on purpose."""


class BadUrl(ClientError):
    """The URL of a validator cannot be used: other scheme, credentials, a query or a fragment in it."""


class FolderBusy(ClientError):
    """Another pull is writing into the same folder."""


class DiskTrouble(ClientError):
    """The disk is full, read-only or failing; what was verified so far is kept."""


class Stopped(ClientError):
    """The caller stopped the transfer; the same call goes on from here."""


class BadManifest(ClientError):
    """A manifest is malformed, contradicts itself or is for another unit than the one asked for."""


class BadSignature(ClientError):
    """A manifest is not signed by the validator that it should come from."""


class WrongHash(ClientError):
    """What arrived does not have the published hash, and fetching it again did not help."""


class Moved(ClientError):
    """The server has another version of the unit than the manifest that the transfer works from."""

    fetched = 0
    """Payload bytes that crossed the network before that was seen."""


class Passing(ClientError):
    """Trouble that a retry may cure. `retry_after`: seconds that the server asked for, else None."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Unreachable(Passing):
    """No connection: refused, no route, unknown name, a TLS handshake that failed."""


class Dropped(Passing):
    """The connection ended before the answer did."""


class Stalled(Passing):
    """No byte for longer than the stall time-out."""


class Busy(Passing):
    """429 or 503: the server asks to come back later."""


class Misbehaved(ClientError):
    """An answer against HTTP or against the contract: wrong range, 200 for a range, a redirect, an endless head."""


class Refused(ClientError):
    """A final status of the server: `status`, `code` (snake_case, for programs) and `detail` (for a person)."""

    def __init__(self, text: str, status: int, code: str = "", detail: str = "", submission_id: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        self.detail = detail
        self.submission_id = submission_id


class Unauthorized(Refused):
    """401: the token, or the signed-request proof, is not accepted."""


class Forbidden(Refused):
    """403: the caller is known but may not have this."""


class NotFound(Refused):
    """404: no such group, or the version is no longer kept."""
