"""Response heads: h11 parses them, behind a gate that is linear in their bytes. Pure.

h11's expression for a field is quadratic on white space that is followed by NUL, VT or FF (64 KiB held a processor for
minutes), so those bytes, and every other control character, are refused before h11 sees them. The gate also refuses
what RFC 9112 lets a client tolerate and this one does not need to: bare line feeds (2.2), folded lines (5.2), a
Content-Length beside a Transfer-Encoding (6.3). Bytes, fields and interim responses are counted.

    HTTP-message = status-line CRLF *( field-line CRLF ) CRLF [ message-body ]        (RFC 9112 2.1)
    field-value  = *( SP / HTAB / VCHAR / obs-text )                                  (RFC 9110 5.5)
"""

from __future__ import annotations

import re

import h11

from bzstream.httpclient.errors import ProtocolViolation

__all__ = ["MAX_HEAD", "ContentRange", "HeadParser", "ResponseHead", "parse_content_range"]

MAX_HEAD = 32 * 1024
"""Bytes of all heads of one response: nginx and bzstream stay below 1 KiB, a redirect to a presigned URL below 8. The
dearest head of this size costs 7 ms of processor time."""

MAX_FIELDS = 128
"""nginx, bzstream and the clouds' object stores send fewer than 30; h11 takes 3 µs for each."""
MAX_INTERIM = 8
"""Interim (1xx) responses before the final one; honest servers send one or two."""

_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n|\n[ \t]")
"""Control characters but HTAB, a CR or LF alone, a line that continues the one before. No repetition: linear."""
_START = b"HTTP/1."
_DIGITS = re.compile(r"[0-9]{1,18}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII)
"""RFC 9110 14.4, with a known total: `bytes first-last/total`."""

ContentRange = tuple[int, int, int]
"""First byte, one past the last byte, bytes of the whole."""


def parse_content_range(text: str | None) -> ContentRange | None:
    """The range that a Content-Range names; None when it is missing, names no total or contradicts itself."""
    form = _CONTENT_RANGE.fullmatch(text or "")
    if form is None:
        return None
    first, last, total = map(int, form.groups())
    return (first, last + 1, total) if first <= last < total else None


class ResponseHead:
    """The head of a final response. Field names are lower case."""

    __slots__ = ("_fields", "status", "version")

    def __init__(self, status: int, version: bytes, fields: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.version = version
        """Such as b"1.1"."""
        self._fields = fields

    def get(self, name: str) -> str | None:
        """A field's value, None without one. Raises ProtocolViolation when it comes twice with different values."""
        wanted = name.lower().encode("ascii")
        values = {value for field, value in self._fields if field == wanted}
        if len(values) > 1:
            raise ProtocolViolation(f"the server sent the header {name} twice with different values")
        return values.pop().decode("latin-1") if values else None

    def list(self, name: str) -> list[str]:
        """The members of a list-valued field over all its lines, lower case (RFC 9110 5.6.1)."""
        wanted = name.lower().encode("ascii")
        text = b",".join(value for field, value in self._fields if field == wanted).decode("latin-1")
        return [member.strip().lower() for member in text.split(",") if member.strip()]

    @property
    def persistent(self) -> bool:
        """Whether another request may follow on the connection (RFC 9112 9.3)."""
        return self.version >= b"1.1" and "close" not in self.list("connection")

    @property
    def encoded(self) -> bool:
        """Whether the content is not the bytes of the resource themselves (RFC 9110 8.4)."""
        return self.list("content-encoding") not in ([], ["identity"])

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks. Raises ProtocolViolation for any other transfer coding."""
        codings = self.list("transfer-encoding")
        if codings and (codings != ["chunked"] or self.version < b"1.1" or self.get("content-length") is not None):
            raise ProtocolViolation("the server frames the body in two ways, or in one that HTTP/1.1 does not have")
        return bool(codings)

    @property
    def content_length(self) -> int | None:
        """Content-Length. Raises ProtocolViolation for one that is no plain number below 10^18."""
        text = self.get("content-length")
        if text is not None and not _DIGITS.fullmatch(text):
            raise ProtocolViolation("the server sent a Content-Length that is no number")
        return None if text is None else int(text)


class HeadParser:
    """Takes the bytes of one response up to the end of its final head, as they come.

    `engine`: h11's client side, which has sent the request.
    """

    def __init__(self, engine: h11.Connection) -> None:
        self._engine = engine
        self._data = bytearray()
        self._checked = 0
        """Bytes of `_data` that passed the gate."""
        self._taken = 0
        self._interim = 0

    def feed(self, data: bytes) -> ResponseHead | None:
        """More bytes of the response; its final head once that is whole. Raises ProtocolViolation."""
        self._data += data
        while True:
            end = self._data.find(b"\r\n\r\n", max(0, self._checked - 3))
            stop = len(self._data) if end < 0 else end + 4
            if self._taken + stop > MAX_HEAD:
                raise ProtocolViolation(f"the server sent a head of more than {MAX_HEAD} bytes")
            self._check(stop)
            if end < 0:
                return None
            head = self._parse(bytes(self._data[:stop]))
            del self._data[:stop]
            self._checked = 0
            self._taken += stop
            if head is not None:
                return head

    @property
    def rest(self) -> bytes:
        """What came after the final head: the beginning of the body."""
        return bytes(self._data)

    def _check(self, stop: int) -> None:
        if self._data[: len(_START)] != _START[:stop]:
            raise ProtocolViolation("the server did not answer in HTTP/1")
        if _FORBIDDEN.search(self._data, max(0, self._checked - 2), stop):
            raise ProtocolViolation("the server sent a head with a control character or a broken line end in it")
        self._checked = stop

    def _parse(self, head: bytes) -> ResponseHead | None:
        """A final head, or None for an interim one."""
        if head.count(b"\n") - 2 > MAX_FIELDS:
            raise ProtocolViolation(f"the server sent a head of more than {MAX_FIELDS} fields")
        try:
            self._engine.receive_data(head)
            event = self._engine.next_event()
        except h11.RemoteProtocolError as error:
            raise ProtocolViolation(f"the server broke the HTTP protocol: {str(error)[:200]}") from None
        if isinstance(event, h11.Response):
            return ResponseHead(event.status_code, event.http_version, list(event.headers))
        self._interim += 1
        if not isinstance(event, h11.InformationalResponse) or event.status_code == 101 or self._interim > MAX_INTERIM:
            raise ProtocolViolation("the server sent no final answer")
        return None
