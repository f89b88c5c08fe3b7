"""What a validator's response means when it is no success: which error, and a sentence that says what to do. Pure."""

from __future__ import annotations

import re
import time
from collections.abc import Collection

import msgspec

from bzstream.client.address import Address
from bzstream.client.errors import (
    Busy,
    ClientError,
    Forbidden,
    NotFound,
    ProtocolViolation,
    Refused,
    Unauthorized,
)
from bzstream.httpclient import ResponseHead

__all__ = ["BUSY", "printable", "redirect_error", "refusal"]

_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)
BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that mean that the same request may succeed later."""


class _Problem(msgspec.Struct):
    """The JSON of a node's error; anything else in it is ignored."""

    code: str
    detail: str = ""
    submission_id: str = ""


def refusal(
    head: ResponseHead, document: bytes, address: Address, what: str, *, busy: Collection[int] = BUSY
) -> ClientError:
    """The error for a status that is no success; one of `busy` may be tried again."""
    status = head.status
    if 300 <= status < 400:
        return redirect_error(head, address)
    if status == 407:
        return ProtocolViolation(f"the proxy on the way to {address} wants a user and password; put them into its URL")
    try:
        problem = msgspec.json.decode(document, type=_Problem)
        code, said, submission_id = problem.code[:64], printable(problem.detail), problem.submission_id[:64]
        tail = f" (it says: {said})" if said else ""
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # Every error of a node is JSON with a code, so that somebody else answered.
        code = said = submission_id = ""
        kind = printable(head.get("content-type") or "no type")
        tail = f" (the answer, {kind}, is not a bzstream node's; a proxy or firewall on the way may have sent it)"
    if status in busy:
        what_happened = "is busy or not ready" if status in (429, 503) else f"failed (status {status})"
        return Busy(f"{address} {what_happened}{tail}", _retry_after(head))
    if status == 401:
        text = f"{address} does not accept the token or the proof; check BZ_AUTH_TOKEN{tail}"
        return Unauthorized(text, status, code, said)
    if status == 403:
        whose = "does not allow" if code else "or something before it answered 403 for"
        return Forbidden(f"{address} {whose} {what}{' for this caller' if code else ''}{tail}", status, code, said)
    if status == 404:
        return NotFound(f"{address} does not have {what}{tail}", status, code, said)
    return Refused(f"{address} answered {status} for {what}{tail}", status, code, said, submission_id)


def redirect_error(head: ResponseHead, address: Address) -> ProtocolViolation:
    """A redirect, with where it leads."""
    where = printable(head.get("location") or "")
    return ProtocolViolation(
        f"{address} redirects {f'to {where}' if where else 'elsewhere'}, which is not followed as the token would go "
        "there too; give the right URL"
    )


def printable(text: str) -> str:
    """Words of a server for a person: no control characters (a terminal would obey them), no pages of text."""
    return "".join(character for character in text[:300] if character.isprintable())


def _retry_after(head: ResponseHead) -> float | None:
    """Seconds, from either form of Retry-After (RFC 9110 10.2.3)."""
    text = head.get("retry-after")
    if text is None:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    from email.utils import parsedate_to_datetime  # 10 ms for what hardly any server sends

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
