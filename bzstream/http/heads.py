"""Heads of messages: a request's understood, an answer's written. Pure.

h11 parses requests, behind the gate of `framing.py`. That costs 35 µs, and requests repeat byte for byte: health
checks, polls, a miner's connections. So short heads are remembered with what they were found to mean.

Answers are written here and not by h11, which takes 50 µs for checks that an answer of ours cannot fail: every body has
a length, known before it begins, and the one choice left is whether the connection goes on.

    status-line = HTTP-version SP status-code SP [ reason-phrase ]        (RFC 9112 4; the version is always HTTP/1.1)
"""

from __future__ import annotations

from functools import lru_cache

import h11
import msgspec

from bzstream.http.framing import check_head, malformed, split_target
from bzstream.http.messages import PHRASES, Fields, Headers

__all__ = ["RequestHead", "read_head", "write_head"]

_REMEMBERED = 512
_SHORT = 1024
"""Bytes of a head that is remembered: so the memory holds half a MiB of heads, whoever sends what."""


class RequestHead(msgspec.Struct, frozen=True):
    """What a request's head says."""

    method: str
    target: str
    """As it stood in the request line."""
    path: str
    query: str
    headers: Headers
    http_version: bytes
    """Such as b"1.1"."""
    persistent: bool
    """Whether the client can go on after the answer (RFC 9112 9.3; HTTP/1.0 is answered once)."""
    body_length: int | None
    """Bytes of the body, 0 for none; None for a chunked one."""
    expects_continue: bool
    """Whether the client waits for a 100 before it sends the body (RFC 9110 10.1.1)."""


def read_head(head: bytes, max_fields: int) -> RequestHead:
    """Understand a complete head, blank line included.

    Raises HttpError 400, 431 (too many fields) or 505 (major version other than 1).
    """
    return _remembered(head, max_fields) if len(head) <= _SHORT else _understand(head, max_fields)


def write_head(status: int, fields: Fields | list[tuple[str, str]]) -> bytes:
    """The head of an answer, blank line included.

    Raises ValueError for text in a field that would end it, or that has no place in a head (RFC 9110 5.5).
    """
    lines = [f"{name}: {value}\r\n" for name, value in fields]
    text = f"HTTP/1.1 {status} {PHRASES.get(status, '')}\r\n{''.join(lines)}\r\n"
    ends = len(lines) + 2
    if text.count("\n") != ends or text.count("\r") != ends or "\0" in text:
        raise ValueError("a header field of an answer has a line end or NUL in it")
    return text.encode("latin-1")


def _understand(head: bytes, max_fields: int) -> RequestHead:
    check_head(head, max_fields)
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head) + 1)
    parser.receive_data(head)
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError:
        raise malformed("The request head does not follow HTTP/1.1.") from None
    assert isinstance(event, h11.Request)
    method, target = event.method.decode("ascii"), event.target.decode("ascii")
    headers = Headers([(name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers])
    path, query = split_target(method, target)
    options = (headers.list("connection") or "").lower().split(",")
    persistent = event.http_version >= b"1.1" and "close" not in (option.strip() for option in options)
    # Nineteen digits are more than any limit, and int() of long text is slow.
    digits = (headers.get("content-length") or "").lstrip("0")[:19]
    length = None if "transfer-encoding" in headers else int(digits or "0")
    expects = event.http_version != b"1.0" and (headers.list("expect") or "").lower() == "100-continue"
    return RequestHead(method, target, path, query, headers, event.http_version, persistent, length, expects)


_remembered = lru_cache(_REMEMBERED)(_understand)
