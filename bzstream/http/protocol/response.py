"""Turns a handler's result into an HTTP response. For a Representation it evaluates the conditional headers and Range.

Pure, except that the boundary of a multipart response is random, so that no content can be made to contain it. The head
is written here and not by h11, which takes 50 µs for checks that our own responses cannot fail: every body has a known
length before it begins, and the one choice left is whether the connection goes on.

    status-line = HTTP-version SP status-code SP [ reason-phrase ]        (RFC 9112 4; the version is always HTTP/1.1)
"""

from __future__ import annotations

import secrets

import msgspec

from bzstream.http.protocol import conditions, ranges
from bzstream.http.protocol.bodies import Body, byteranges
from bzstream.http.protocol.dates import format_date
from bzstream.http.protocol.messages import PHRASES, Fields, HttpError, Representation, Request, Response, Result

__all__ = ["PreparedResponse", "prepare", "select", "serialise_head"]

_KEPT_BY_304 = frozenset({"cache-control", "content-location", "expires", "vary"})
"""Beside ETag and Date: the fields of a 200 that a 304 must repeat (RFC 9110 15.4.5)."""


class PreparedResponse(msgspec.Struct, frozen=True):
    """A response that is ready to be sent. `length` is Content-Length, None for 304 and 204; HEAD sends no body."""

    status: int
    headers: Fields
    body: Body | bytes
    length: int | None
    label: str = ""


def prepare(result: Result | HttpError, request: Request | None, now: int) -> PreparedResponse:
    """The response to a request, which is None when it could not be parsed."""
    if isinstance(result, Representation):
        assert request is not None
        try:
            return select(request, result, now)
        except HttpError as error:
            result = error
    response: Response = result.response() if isinstance(result, HttpError) else result
    bodiless = response.status in (204, 304)
    return PreparedResponse(response.status, response.headers, response.body, None if bodiless else len(response.body))


def select(request: Request, chosen: Representation, now: int) -> PreparedResponse:
    """Evaluate conditions and ranges of a GET or HEAD. `now`: epoch seconds.

    Raises HttpError 412 (a precondition failed) or 416 (no range can be satisfied).
    """
    verdict = conditions.evaluate(request.headers, chosen.etag, chosen.last_modified, now)
    if verdict == 412:
        raise HttpError(412, "precondition_failed", "What is served now does not meet the request's precondition.")
    if verdict == 304:
        kept = tuple((name, value) for name, value in chosen.headers if name.lower() in _KEPT_BY_304)
        return PreparedResponse(304, (("ETag", chosen.etag), *kept), b"", None, chosen.label)
    payload, size = chosen.payload, len(chosen.payload)
    common: Fields = (
        ("ETag", chosen.etag),
        ("Last-Modified", format_date(min(chosen.last_modified, now))),  # RFC 9110 8.8.2.1: never in the future
        ("Accept-Ranges", "bytes"),
        *chosen.headers,
    )
    spans = _spans(request, chosen, size, now)
    if spans is None:
        return PreparedResponse(200, (("Content-Type", chosen.content_type), *common), payload, size, chosen.label)
    if not spans:
        raise HttpError(
            416,
            "range_not_satisfiable",
            f"No byte of the requested range exists; there are {size} bytes.",
            (("Content-Range", f"bytes */{size}"),),
        )
    if len(spans) == 1:
        start, stop = spans[0]
        fields = (
            ("Content-Type", chosen.content_type),
            ("Content-Range", f"bytes {start}-{stop - 1}/{size}"),
            *common,
        )
        return PreparedResponse(206, fields, payload[start:stop], stop - start, chosen.label)
    boundary = secrets.token_hex(16)
    body = byteranges(payload, spans, chosen.content_type, boundary)
    fields = (("Content-Type", f"multipart/byteranges; boundary={boundary}"), *common)
    return PreparedResponse(206, fields, body, len(body), chosen.label)


def _spans(request: Request, chosen: Representation, size: int, now: int) -> list[ranges.Span] | None:
    """The spans to send; None for all of it. Range means something for GET alone (RFC 9110 14.2)."""
    fields = request.headers.all("range")
    if request.method != "GET" or len(fields) != 1:
        return None
    if not conditions.range_applies(request.headers, chosen.etag, chosen.last_modified, now):
        return None
    return ranges.resolve(fields[0], size)


def serialise_head(status: int, fields: Fields | list[tuple[str, str]]) -> bytes:
    """The head of a response, blank line included.

    Raises ValueError for text in a field that would end it, or that has no place in a head (RFC 9110 5.5).
    """
    lines = [f"{name}: {value}\r\n" for name, value in fields]
    text = f"HTTP/1.1 {status} {PHRASES.get(status, '')}\r\n{''.join(lines)}\r\n"
    ends = len(lines) + 2
    if text.count("\n") != ends or text.count("\r") != ends or "\0" in text:
        raise ValueError("a header field of a response has a line end or NUL in it")
    return text.encode("latin-1")
