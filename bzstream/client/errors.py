"""What can go wrong on the client's side, and who has to do something about it.

Three families, told apart by what a retry would do. A `TransientError` goes away by itself (a dropped connection, a
busy server): the transfer waits and tries again. A `ProtocolViolation` is an answer against HTTP or the contract: a few
are forgiven, then the server is left out. Everything else is final for the URL that it came from, and its sentence is
what the person reads.
"""

from __future__ import annotations

from bzstream.httpclient.errors import *  # noqa: F403
from bzstream.httpclient.errors import ClientError, TransientError
from bzstream.httpclient.errors import __all__ as __all__

__all__ += (
    "AxonNotFound", "BadManifest", "BadSignature", "BadSnapshot", "BadUrl", "Busy", "DiskError", "FolderBusy",
    "Forbidden", "NotFound", "Refused", "Stopped", "Unauthorized", "UsageError", "VersionChanged", "WrongHash",
)  # fmt: skip


class UsageError(ClientError):
    """The arguments of a call contradict each other or have a wrong form."""


class BadUrl(ClientError):
    """The URL of a validator cannot be used: other scheme, credentials, a query or a fragment in it."""


class AxonNotFound(ClientError):
    """The chain does not list where the validator is, or its node does not tell."""


class FolderBusy(ClientError):
    """Another pull is writing into the same folder."""


class DiskError(ClientError):
    """The disk is full, read-only or failing; what was verified so far is kept."""


class Stopped(ClientError):
    """The caller stopped the transfer; the same call goes on from here."""


class BadManifest(ClientError):
    """A manifest is malformed, contradicts itself or is for another unit than the one asked for."""


class BadSignature(ClientError):
    """A manifest is not signed by the validator that it should come from."""


class BadSnapshot(ClientError):
    """A peer's description of its snapshot is malformed, contradicts the units, or is an old one offered as new."""


class WrongHash(ClientError):
    """What arrived does not have the published hash, and fetching it again did not help."""


class VersionChanged(ClientError):
    """The server has another version of the unit than the manifest that the transfer works from."""

    fetched = 0
    """Payload bytes that crossed the network before that was seen."""


class Busy(TransientError):
    """429 or 503: the server asks to come back later."""


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
