"""What a node has and how it is, in one call.

Every text of an answer has a checked form, or is cut and made printable: it ends on somebody's terminal.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from bzstream.client.errors import ProtocolViolation
from bzstream.client.responses import printable
from bzstream.client.session import Session
from bzstream.client.session_factory import Options, open_session
from bzstream.client.tuning import Tuning

__all__ = ["NodeInfo", "UnitInfo", "VersionInfo", "info"]

T = TypeVar("T")
_Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
_Word = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,64}\Z")]
_Hotkey = Annotated[str, Meta(pattern=r"\A5[1-9A-HJ-NP-Za-km-z]{47}\Z")]
_Moment = Annotated[str, Meta(pattern=r"\A[0-9T:.Z+-]{1,40}\Z")]
_Hash = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class UnitInfo(msgspec.Struct, frozen=True):
    """One unit of a version; `size` in payload bytes."""

    unit: Literal["partial", "shared", "ungrouped", "full"]
    expert_group: _Count | None
    size: _Count
    content_hash: _Hash


class VersionInfo(msgspec.Struct, frozen=True):
    """One version that a node keeps. `published_at`: RFC 3339, UTC."""

    model_version: _Name
    block_number: _Count
    published_at: _Moment
    signed: bool
    units: tuple[UnitInfo, ...]


class _Health(msgspec.Struct, frozen=True):
    status: _Word
    current_block: _Count
    phase: _Word
    model_loaded: bool = True
    reasons: tuple[str, ...] = ()


class _Model(msgspec.Struct, frozen=True):
    current: _Name
    versions: tuple[VersionInfo, ...]
    validator_hotkey: _Hotkey | None = None


class NodeInfo(msgspec.Struct, frozen=True):
    """What a node says of itself: GET /health and GET /model. `versions`: the newest first; none before the first."""

    status: str
    reasons: tuple[str, ...]
    """Why it is not healthy, a sentence each."""
    current_block: int
    phase: str
    validator_hotkey: str | None
    current: str | None
    versions: tuple[VersionInfo, ...]


def info(
    url: str,
    *,
    hotkey: str | None = None,
    token: str | None = None,
    ca_file: str | None = None,
    patience_s: float = 10.0,
    tuning: Tuning | None = None,
) -> NodeInfo:
    """What a node has: its state, whose node it is, its versions with their units, sizes and hashes.

    `token`: default BZ_AUTH_TOKEN. Raises Refused, ProtocolViolation, and TransientError without an answer in
    `patience_s` seconds.
    """
    session = open_session(url, Options(hotkey, token=token, ca_file=ca_file), tuning or Tuning(), claim_needed=False)
    try:
        health = _ask(session, "/health", _Health, patience_s)
        reasons = tuple(printable(reason) for reason in health.reasons)
        model = _ask(session, "/model", _Model, patience_s) if health.model_loaded else None
    finally:
        session.close()
    return NodeInfo(
        health.status,
        reasons,
        health.current_block,
        health.phase,
        None if model is None else model.validator_hotkey,
        None if model is None else model.current,
        () if model is None else model.versions,
    )


def _ask(session: Session, target: str, answer: type[T], patience_s: float) -> T:
    _, data = session.request_with_retries("GET", target, patience_s=patience_s)
    try:
        return msgspec.json.decode(data, type=answer)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ProtocolViolation(f"{session.mirrors[0].address} sent a malformed answer for {target}") from None
