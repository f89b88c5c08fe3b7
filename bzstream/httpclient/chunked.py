"""The framing of a chunked body, without its data: sizes, extensions and trailers are read, checked and dropped.

    chunked-body = *chunk last-chunk trailer-section CRLF
    chunk        = chunk-size [ chunk-ext ] CRLF chunk-data CRLF        (RFC 9112 7.1)

Lines are short, numbers bounded, and the bytes of the framing may not be more than a quarter of the content (and a
little): a server that sends single bytes as chunks would otherwise cost six bytes and a line to parse for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bzstream.httpclient.errors import ProtocolViolation

__all__ = ["ChunkFraming"]

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?")
_TRAILER_LINE = re.compile(rb"[!-9;-~]+:[\t -~\x80-\xff]*")
MAX_LINE = 1024
MAX_TRAILERS = 8192
FREE_OVERHEAD = 64 * 1024


class ChunkFraming:
    """`read_line(limit)` gives the next line without its CRLF, or raises when it is longer than `limit` bytes."""

    def __init__(self, read_line: Callable[[int], bytes]) -> None:
        self._read_line = read_line
        self._left = 0
        self._begun = False
        self._over = False
        self._content = 0
        self._overhead = 0

    def available(self) -> int:
        """Bytes of data that come next on the connection; 0 when the body is over. Raises ProtocolViolation."""
        if self._left or self._over:
            return self._left
        if self._begun and self._read_line(0):
            raise ProtocolViolation("the server's chunk is longer than it says")
        self._begun = True
        line = self._read_line(MAX_LINE)
        form = _SIZE_LINE.fullmatch(line)
        if form is None:
            raise ProtocolViolation("the server's chunk has no proper size")
        self._overhead += len(line) + 4
        if self._overhead > FREE_OVERHEAD + self._content // 4:
            raise ProtocolViolation("the server's chunks are more framing than content")
        self._left = int(form[1], 16)
        self._content += self._left
        if self._left == 0:
            self._skip_trailers()
        return self._left

    def took(self, count: int) -> None:
        """`count` bytes of the data were read."""
        self._left -= count

    def _skip_trailers(self) -> None:
        total = 0
        while line := self._read_line(MAX_LINE):
            total += len(line)
            if total > MAX_TRAILERS or not _TRAILER_LINE.fullmatch(line):
                raise ProtocolViolation("the server's trailers are too long or no header fields")
        self._over = True
