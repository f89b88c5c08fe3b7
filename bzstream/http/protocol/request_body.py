"""Reads the body of one request from the bytes that come in. Pure: no I/O, and the cost is linear in the bytes.

h11 is not used here: it takes bare CR in chunk extensions, sizes without bound, and any amount of framing. What counts
as content is bounded by the caller's limit; all other bytes of a chunked body (sizes, extensions, trailers) together by
`FRAMING_BYTES`. One call of `feed` takes a bounded number of steps, so that a body of very many small chunks is read in
several turns of the event loop.

    chunked-body   = *chunk last-chunk trailer-section CRLF                                       (RFC 9112 7.1)
    chunk          = chunk-size [ chunk-ext ] CRLF chunk-data CRLF
    chunk-ext      = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )
    chunk-ext-val  = token / quoted-string
"""

from __future__ import annotations

import re
from typing import Protocol

from bzstream.http.protocol.messages import HttpError
from bzstream.http.protocol.request_parser import RequestHead, check_field_line, malformed

__all__ = ["FRAMING_BYTES", "ChunkedBody", "RequestBody", "SizedBody", "check_body_head"]

FRAMING_BYTES = 16 * 1024
"""Bytes of a chunked body that are not content: as many as a request head may have. A body of 64 KiB in chunks of 32
bytes stays below; no client in use sends smaller ones."""
_STEPS = 128
"""Chunks, or lines of the trailer section, of one call: about 0.2 ms."""
_LARGEST = 2**32 - 1
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*+"'
# Possessive quantifiers: the grammar is deterministic, so giving bytes back could only cost time.
_SIZE_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16}+)(?:[ \t]*+;[ \t]*+%b(?:[ \t]*+=[ \t]*+(?:%b|%b))?+)*+" % (_TOKEN, _TOKEN, _QUOTED)
)


class RequestBody(Protocol):
    """What the connection needs of a body of either framing."""

    content: bytearray
    leftover: bytes
    """After the end: bytes received that belong to what follows the body."""
    pending: bool
    """Whether `feed` stopped although bytes that it was given are left: call it again, with b"" or more."""

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; True when the body is complete. Raises HttpError 400 or 413."""


class SizedBody:
    """A body with Content-Length, whose bound was checked with the head."""

    __slots__ = ("_keep", "_left", "content", "leftover", "pending")

    def __init__(self, length: int, *, keep: bool) -> None:
        """`keep`: False for an endpoint that reads no body; the bytes are then counted and dropped."""
        self._left = length
        self._keep = keep
        self.content = bytearray()
        self.leftover = b""
        self.pending = False

    def feed(self, data: bytes) -> bool:
        if self._keep:
            self.content += data[: self._left]
        self.leftover = data[self._left :]
        self._left -= len(data) - len(self.leftover)
        return not self._left


class ChunkedBody:
    """A body with Transfer-Encoding: chunked, of at most `limit` bytes. Trailer fields are checked and dropped."""

    __slots__ = (
        "_buffer", "_content_left", "_framing", "_in_trailers", "_keep", "_left", "_limit", "_scanned", "content",
        "leftover", "pending",
    )  # fmt: skip

    def __init__(self, limit: int, *, keep: bool) -> None:
        """`keep`: False for an endpoint that reads no body; the content is then counted and dropped."""
        self._limit = self._content_left = limit
        self._keep = keep
        self._buffer = b""
        self._scanned = 0
        """Bytes of the buffer that hold no line end."""
        self._left = 0
        """Bytes of the current chunk that are still to come, its CRLF included; 0 before a chunk's first line."""
        self._in_trailers = False
        self._framing = 0
        self.content = bytearray()
        self.leftover = b""
        self.pending = False

    def feed(self, data: bytes) -> bool:
        self._buffer += data
        at = 0
        self.pending = False
        for _ in range(_STEPS):
            if self._left:
                at = self._take_data(at)
                if self._left:
                    break
            line = self._line(at)
            if line is None:
                break
            at += len(line) + 2
            if not self._in_trailers:
                self._begin_chunk(line)
            elif not line:
                self.leftover = self._buffer[at:]
                return True
            else:
                check_field_line(line)
        else:
            self.pending = True
        self._buffer = self._buffer[at:]
        return False

    def _take_data(self, at: int) -> int:
        """Take what has come of a chunk's data and of the CRLF after it; the position behind."""
        end = min(at + self._left, len(self._buffer))
        taken = self._buffer[at:end]
        content = max(0, self._left - 2)
        if self._keep:
            self.content += taken[:content]
        expected = b"\r\n"[max(0, 2 - self._left) :]
        if not expected.startswith(taken[content:]):
            raise malformed("The data of a chunk does not end with CR LF where its size says.")
        self._left -= len(taken)
        return end

    def _line(self, at: int) -> bytes | None:
        """The line at a position, without its CRLF; None while it is incomplete."""
        end = self._buffer.find(b"\n", at + self._scanned)
        used = (end + 1 if end >= 0 else len(self._buffer)) - at
        if self._framing + used > FRAMING_BYTES:
            raise HttpError(
                413, "body_too_large", f"The chunk sizes, extensions and trailers have more than {FRAMING_BYTES} bytes."
            )
        if end < 0:
            self._scanned = used
            return None
        self._scanned = 0
        self._framing += used
        line = self._buffer[at : end - 1]
        if end == at or self._buffer[end - 1] != 0x0D:
            raise malformed("A line of a chunked body ends with a bare LF; lines end with CR LF.")
        return line

    def _begin_chunk(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        size = int(match[1], 16) if match is not None else _LARGEST + 1
        if size > _LARGEST:
            raise malformed("A chunk does not begin with its size, in at most 32 bits, and well-formed extensions.")
        self._content_left -= size
        if self._content_left < 0:
            raise _too_large(self._limit)
        if size:
            self._left = size + 2
            self._framing += 2
        else:
            self._in_trailers = True


def _too_large(limit: int) -> HttpError:
    """The 413 for a body with more content than `limit` bytes."""
    return HttpError(413, "body_too_large", f"The request body has more than {limit} bytes.")


def check_body_head(head: RequestHead, limit: int) -> None:
    """What can be said of a body before a byte of it has come: raises HttpError 413 (too long) or 417."""
    if head.body_length is not None and head.body_length > limit:
        raise _too_large(limit)
    # RFC 9110 10.1.1: an expectation in an HTTP/1.0 request is ignored.
    if "expect" in head.headers and not head.expects_continue and head.http_version != b"1.0":
        raise HttpError(417, "expectation_failed", "The only expectation that can be met is 100-continue.")
