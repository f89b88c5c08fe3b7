"""The values that this package and an application exchange: requests, results, errors.

An application returns one of two things. A `Response` is complete: status, fields, bytes. A
`Representation` says what there is and leaves to this package how much of it is sent: conditions, ranges, HEAD and the
choice between 200, 206, 304, 412 and 416 are evaluated in `response.py`, once, for every endpoint alike.

Everything an application refuses, it refuses by raising `HttpError`, from `Application.admit` or from one of the two
halves of an `Endpoint`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from bzstream.errors import BzstreamError
from bzstream.payload import Payload

__all__ = ["Endpoint", "Fields", "Headers", "HttpError", "Representation", "Request", "Response", "Result"]

Fields = tuple[tuple[str, str], ...]
"""Header fields as (name, value) pairs, in the order in which they are sent."""


class HttpError(BzstreamError):
    """A refusal: an HTTP status, a sentence for a person (`detail`) and a snake_case word for a program (`code`).

    Sent as JSON `{"detail", "code"}` with the given extra header fields. A status of 500 and more is for conditions
    that the contract names (503, 505); a bug is any other exception, which becomes a 500 without details.
    """

    def __init__(self, status: int, code: str, detail: str, headers: Fields = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers

    def response(self) -> Response:
        """The error as a response."""
        return Response.json({"detail": self.detail, "code": self.code}, status=self.status, headers=self.headers)


class Headers:
    """Header fields of a request: case-insensitive, order kept, values as ISO 8859-1 text without outer white space."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        """`pairs`: (name, value), names in lower case."""
        self._pairs = pairs

    def get(self, name: str) -> str | None:
        """The value of a field that may come once, or None.

        Raises HttpError 400 when the field is repeated: which value counts would be anybody's guess, and two parties
        guessing differently is how requests are smuggled.
        """
        values = self.all(name)
        if len(values) > 1:
            raise HttpError(400, "repeated_header", f"The header {name} came more than once; send it once.")
        return values[0] if values else None

    def all(self, name: str) -> tuple[str, ...]:
        """Every value of a field, in the order in which they came."""
        wanted = name.lower()
        return tuple([value for key, value in self._pairs if key == wanted])

    def list(self, name: str) -> str | None:
        """The field lines of a list-valued field as one line (RFC 9110 5.3), or None when there is none."""
        values = self.all(name)
        return ", ".join(values) if values else None

    def __contains__(self, name: str) -> bool:
        return bool(self.all(name))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


@dataclass(slots=True)
class Request:
    """One request. Mutable: `admit` decides `caller` and may keep what it found out in `context`."""

    method: str
    target: str
    """As it stood in the request line."""
    path: str
    """The path of the target, still percent-encoded; `*` for `OPTIONS *`."""
    query_string: str
    headers: Headers
    peer: str
    """IP address of the client as text, behind `http.trusted_proxies` the one that they report."""
    caller: str
    """Whom connection limits and fairness count this under: at first the peer address (IPv6: its /64)."""
    address: str = ""
    """IP address at the other end of the connection: the client's, or a trusted proxy's."""
    secure: bool = False
    """Whether the client spoke TLS, to us or to a trusted proxy that says so."""
    body: bytes = b""
    """Complete before `handle` is called; empty during `admit` and `check`."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Percent-decoded `{names}` of the route's pattern."""
    route: str = ""
    """The pattern that matched, for logs and metrics; empty until a router matched."""
    context: Any = None
    """Whatever the application wants to hand from `admit` to the endpoint."""
    _query: dict[str, str] | None = None

    @property
    def query(self) -> Mapping[str, str]:
        """The query as name -> value; a name without `=` has the value "".

        Raises HttpError 400 when a name is repeated or the query is not UTF-8 (on first use, so that the order of
        checks stays the application's).
        """
        if self._query is None:
            try:
                pairs = parse_qsl(self.query_string, keep_blank_values=True, errors="strict")
            except ValueError:
                raise HttpError(400, "bad_query", "The query string is not percent-encoded UTF-8.") from None
            query = dict(pairs)
            if len(query) != len(pairs):
                raise HttpError(400, "bad_query", "A query parameter came more than once; send it once.")
            self._query = query
        return self._query


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response. Content-Length, Date, Server and Connection are added by this package."""

    status: int
    headers: Fields = ()
    body: bytes = b""

    @classmethod
    def json(cls, value: object, *, status: int = 200, headers: Fields = ()) -> Response:
        """`value` as JSON, by msgspec's rules."""
        return cls(status, (("Content-Type", "application/json"), *headers), msgspec.json.encode(value))


@dataclass(frozen=True, slots=True)
class Representation:
    """The selected representation of a GET or HEAD; the response is 200, 206, 304, 412 or 416.

    The server holds the payload's files from the moment it gets the representation until the last byte is sent or the
    connection is gone. A handler needs to hold them only until it returns.
    """

    payload: Payload
    etag: str
    """Strong entity tag, quoted: `"5f…"`."""
    last_modified: int
    """Epoch seconds; conditions compare with it even while it lies in the future, Last-Modified then shows now."""
    content_type: str = "application/octet-stream"
    headers: Fields = ()
    """Further fields of 200 and 206 (of 304 those that RFC 9110 15.4.5 names)."""
    label: str = ""
    """Short name for logs and metrics, such as `partial/0`."""


Result = Response | Representation


def _unchecked(request: Request) -> Request:
    """The check of an endpoint that refuses nothing before the limits."""
    return request


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What handles the requests of a route, in two halves; the server applies its limits (429, 503) between them.

    `check` sees the head alone. It makes the cheap checks that come before the limits in the order of checks (400 for
    headers and query, 403), and returns whatever `handle` needs. It runs on the event loop and must not block.

    `handle` gets what `check` returned; without a `check`, the request. It runs only when the limits let the request
    through and its body is complete. It may be plain, for responses from memory (it runs on the event loop and must not
    block), or a coroutine function. A coroutine for GET or HEAD is cancelled when its client goes away. One for any
    other method is *never* cancelled: what it began, such as writing a submission to disk, it ends, and only the
    response is dropped; a server that closes waits for it.
    """

    handle: Callable[[Any], Result | Awaitable[Result]]
    check: Callable[[Request], Any] = _unchecked
    reads_body: bool = False
    """False: a body is read within the limits and dropped, as RFC 9110 9.3.1 allows for a GET."""
    limited: bool = True
    """False: answered even when the worker is full or draining or the caller has too many connections (health
    checks)."""


PHRASES: Mapping[int, str] = {status.value: status.phrase for status in HTTPStatus}
"""Reason phrases by status."""
