"""From what an application returned to the answer; for a representation 200, 206, 304, 412 or 416.

Pure but for the boundary of a multipart answer, which is random, so that no content can be made to contain it.
"""

from __future__ import annotations

import secrets

import msgspec

from bzstream.http import conditional, ranges
from bzstream.http.bodies import Body, byteranges
from bzstream.http.dates import format_date
from bzstream.http.messages import Fields, HttpError, Representation, Request, Response, Result

__all__ = ["Answer", "answer_for", "select"]

_KEPT_BY_304 = frozenset({"cache-control", "content-location", "expires", "vary"})
"""Beside ETag and Date: the fields of a 200 that a 304 must repeat (RFC 9110 15.4.5)."""


class Answer(msgspec.Struct, frozen=True):
    """A response ready for framing. `length` is Content-Length, None for 304 and 204; HEAD sends no body of it."""

    status: int
    headers: Fields
    body: Body | bytes
    length: int | None
    label: str = ""


def answer_for(result: Result | HttpError, request: Request | None, now: int) -> Answer:
    """The answer for whatever became of a request, which is None when it could not be understood."""
    if isinstance(result, Representation):
        assert request is not None
        try:
            return select(request, result, now)
        except HttpError as error:
            result = error
    response: Response = result.response() if isinstance(result, HttpError) else result
    bodiless = response.status in (204, 304)
    return Answer(response.status, response.headers, response.body, None if bodiless else len(response.body))


def select(request: Request, chosen: Representation, now: int) -> Answer:
    """Evaluate conditions and ranges of a GET or HEAD. `now`: epoch seconds.

    Raises HttpError 412 (a precondition failed) or 416 (no range can be satisfied).
    """
    verdict = conditional.evaluate(request.headers, chosen.etag, chosen.last_modified, now)
    if verdict == 412:
        raise HttpError(412, "precondition_failed", "What is served now is not what the request's condition names.")
    if verdict == 304:
        kept = tuple((name, value) for name, value in chosen.headers if name.lower() in _KEPT_BY_304)
        return Answer(304, (("ETag", chosen.etag), *kept), b"", None, chosen.label)
    payload, size = chosen.payload, len(chosen.payload)
    common: Fields = (
        ("ETag", chosen.etag),
        ("Last-Modified", format_date(chosen.last_modified)),
        ("Accept-Ranges", "bytes"),
        *chosen.headers,
    )
    spans = _spans(request, chosen, size, now)
    if spans is None:
        return Answer(200, (("Content-Type", chosen.content_type), *common), payload, size, chosen.label)
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
        return Answer(206, fields, payload[start:stop], stop - start, chosen.label)
    boundary = secrets.token_hex(16)
    body = byteranges(payload, spans, chosen.content_type, boundary)
    fields = (("Content-Type", f"multipart/byteranges; boundary={boundary}"), *common)
    return Answer(206, fields, body, len(body), chosen.label)


def _spans(request: Request, chosen: Representation, size: int, now: int) -> list[ranges.Span] | None:
    """The spans to send; None for all of it. Range means something for GET alone (RFC 9110 14.2)."""
    fields = request.headers.all("range")
    if request.method != "GET" or len(fields) != 1:
        return None
    if not conditional.range_applies(request.headers, chosen.etag, chosen.last_modified, now):
        return None
    return ranges.resolve(fields[0], size)
