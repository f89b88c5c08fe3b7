"""From what came in to the application's `Request`: the head translated, the body bounded. No I/O."""

from __future__ import annotations

import h11

from bzstream.http.framing import malformed
from bzstream.http.heads import RequestHead
from bzstream.http.messages import HttpError, Request
from bzstream.http.peers import TrustedProxies, caller_of

__all__ = ["BodyReader", "check_body_head", "translate"]


def translate(head: RequestHead, address: str, secure: bool, loopback: bool, proxies: TrustedProxies) -> Request:
    """A head as the application's request. `address`, `secure`, `loopback`: of the connection itself."""
    peer = address
    if peer in proxies:
        secure = secure or (head.headers.list("x-forwarded-proto") or "").lower() == "https"
        peer = proxies.resolve(peer, head.headers)
    return Request(
        head.method, head.target, head.path, head.query, head.headers, peer, caller_of(peer), loopback, secure
    )


def check_body_head(head: RequestHead, limit: int) -> None:
    """What can be said of a body before a byte of it has come: raises HttpError 413 (too long) or 417."""
    length = head.headers.get("content-length")
    # Nineteen digits are too many for any limit without being made a number (int() of long text is slow).
    if length is not None and (len(length.lstrip("0")) > 19 or int(length) > limit):
        raise _too_large(limit)
    expected = head.headers.list("expect")
    # RFC 9110 10.1.1: an expectation in an HTTP/1.0 request is ignored.
    if expected is not None and expected.lower() != "100-continue" and head.http_version != b"1.0":
        raise HttpError(417, "expectation_failed", "The only expectation that can be met is 100-continue.")


class BodyReader:
    """Collects one request's body of at most `limit` bytes from the pieces that come in."""

    __slots__ = ("_chunked", "_limit", "_parser", "_tail", "content", "leftover")

    def __init__(self, parser: h11.Connection, limit: int, *, chunked: bool) -> None:
        """`parser` has given its Request event."""
        self._parser = parser
        self._limit = limit
        self._chunked = chunked
        self._tail = b""
        self.content = bytearray()
        self.leftover = b""
        """After the end: bytes received that belong to what follows the body."""

    def feed(self, data: bytes) -> bool:
        """Take the next piece (b"" for none); True when the body is complete.

        Raises HttpError 400 (not chunked as RFC 9112 7.1 has it, or with trailer fields) or 413.
        """
        if data:
            self._parser.receive_data(data)
            self._tail = self._tail[-4:] + data
        while True:
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError:
                raise malformed("The request body does not follow HTTP/1.1.") from None
            if isinstance(event, h11.Data):
                if len(self.content) + len(event.data) > self._limit:
                    raise _too_large(self._limit)
                self.content += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.leftover = self._parser.trailing_data[0]
                self._check_end(event)
                return True
            else:
                return False

    def _check_end(self, event: h11.EndOfMessage) -> None:
        """h11 takes bare LF and folded lines in the trailer section; here its only form is the empty one."""
        if not self._chunked:
            return
        message = self._tail[: len(self._tail) - len(self.leftover)]
        if len(event.headers) or not message.endswith(b"\r\n\r\n"):
            raise malformed("A chunked body ends with an empty chunk and an empty line; trailers are not taken.")


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "body_too_large", f"The request body has more than {limit} bytes.")
