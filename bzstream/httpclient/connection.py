"""One HTTP/1.1 connection, seen from the client: heads through h11, bodies past it.

h11 copies every body byte that goes through it several times. So it is handed exactly the bytes of a response head; the
body then goes from the socket straight into the caller's memory (`read_into`), counted here against its framing:
Content-Length, chunks, or the end of the connection.

Everything from the network is bounded: the bytes of a head, the time for a head, the seconds without a byte, the bytes
and the time of a document, the framing of chunks. Redirects are never followed here.

One thread uses a connection; `interrupt` alone may be called from another.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import time
from collections.abc import Callable, Sequence

import h11

from bzstream.httpclient.chunked import ChunkFraming
from bzstream.httpclient.errors import ConnectionLost, ProtocolViolation, Stalled
from bzstream.httpclient.heads import MAX_HEAD, HeadParser, ResponseHead
from bzstream.httpclient.origin import Origin

__all__ = ["Connection", "os_reason"]

_TCPI_RTT = 68
"""Offset of tcpi_rtt (microseconds) in struct tcp_info, linux/tcp.h."""
_FIRST_READ = 4096
"""Bytes of the read that gets a head: what it catches of the body is copied once, so it is kept small."""
_DOCUMENT_S = 60.0
"""Seconds for a small answer, if the stall time-out is not longer."""


class Connection:
    """Takes over `sock`, connected and secured already, to `origin` (named in the Host field and in errors).

    `stall_s`: seconds without a byte. `absolute_form` and `extra_fields` are
    for a proxy that forwards requests (RFC 9112 3.2.2). `on_wait` is called at least every `slice_s` seconds of a wait
    and between the reads of a head; what it raises ends the exchange.
    """

    def __init__(
        self,
        sock: socket.socket,
        origin: Origin,
        *,
        stall_s: float,
        absolute_form: bool = False,
        extra_fields: Sequence[tuple[str, str]] = (),
        slice_s: float | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.origin = origin
        self.reusable = True
        """Whether another request may be sent once the body is read."""
        self.remaining: int | None = 0
        """Bytes of the current body still to be read; None when its framing does not say."""
        self.requests = 0
        self.rtt = _handshake_rtt(sock)
        """Seconds of a round trip, as the kernel measured it in the handshake; 0 where it does not tell."""
        self._socket = sock
        self._stall_s = stall_s
        self._slice_s = stall_s if slice_s is None else slice_s
        self._prefix = str(origin) if absolute_form else ""
        self._extra_fields = list(extra_fields)
        self._on_wait = on_wait
        self._ahead = b""
        """Bytes that were received and not used yet."""
        self._chunks: ChunkFraming | None = None
        self._keep_alive = False
        self._deadline = math.inf
        self._set_timeouts()

    def exchange(
        self, method: str, target: str, fields: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> ResponseHead:
        """Send a request and read the head of its final response; the body is then waiting to be read.

        Raises ConnectionLost, Stalled and ProtocolViolation, as does everything that reads.
        """
        assert self.reusable, "the last body was not read to its end"
        self.reusable = False
        engine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        every_field = [("Host", self.origin.authority), *self._extra_fields, *fields]
        if body:
            every_field.append(("Content-Length", str(len(body))))
        request = engine.send(h11.Request(method=method, target=self._prefix + target, headers=every_field)) or b""
        if body:
            request += engine.send(h11.Data(body)) or b""
        engine.send(h11.EndOfMessage())
        try:
            self._socket.sendall(request)
        except (TimeoutError, BlockingIOError):
            raise Stalled(f"{self.origin} took no request for {self._stall_s:g} s") from None
        except OSError as error:
            raise ConnectionLost(f"{self.origin} closed the connection: {os_reason(error)}") from None
        self.requests += 1
        head = self._read_head(HeadParser(engine))
        self._frame_body(method, head)
        return head

    def read_into(self, view: memoryview) -> int:
        """Receive at least 1 byte of the body into `view` (not empty); 0 when the body is over."""
        if self._ahead or self.remaining is None:
            return self._read_otherwise(view)
        if len(view) > self.remaining:
            view = view[: self.remaining]
        if not view:
            return 0
        count = self._receive_into(view)
        if count == 0:
            raise ConnectionLost(f"{self.origin} ended the body {self.remaining} bytes too early")
        self.remaining -= count
        if self.remaining == 0:
            self._end_body()
        return count

    def read_document(self, limit: int) -> bytes:
        """The whole body of a small answer, any framing. Raises ProtocolViolation when it is over `limit` bytes."""
        self._deadline = time.monotonic() + max(_DOCUMENT_S, self._stall_s)
        found = bytearray()
        piece = memoryview(bytearray(min(65536, limit + 1)))
        while count := self.read_into(piece):
            found += piece[:count]
            if len(found) > limit:
                raise ProtocolViolation(f"{self.origin} sent a document of more than {limit} bytes")
            self._check_deadline()
        self._deadline = math.inf
        return bytes(found)

    def detach(self) -> socket.socket:
        """Give the socket up, after a CONNECT that was granted. Raises ProtocolViolation if bytes came already."""
        if self._ahead:
            raise ProtocolViolation(f"{self.origin} sent bytes before it was asked")
        return self._socket

    def interrupt(self) -> None:
        """Make a read that another thread is in end at once."""
        # Not SSLSocket.shutdown: that would take the TLS object away under the reading thread.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.reusable = False
        with contextlib.suppress(OSError):
            self._socket.close()

    def _frame_body(self, method: str, head: ResponseHead) -> None:
        """How the body ends (RFC 9112 6.3)."""
        self._keep_alive = head.persistent
        self._chunks = ChunkFraming(self._read_line) if head.chunked else None
        length = head.content_length
        if method == "HEAD" or head.status in (204, 304) or (method == "CONNECT" and head.status < 300):
            length, self._chunks = 0, None
        self.remaining = None if self._chunks is not None else length
        if self.remaining is None and self._chunks is None:
            self._keep_alive = False
        if self.remaining == 0:
            self._end_body()

    def _end_body(self) -> None:
        self.remaining = 0
        # Bytes beyond the body are no answer to anything that was asked.
        self.reusable = self._keep_alive and not self._ahead

    def _read_otherwise(self, view: memoryview) -> int:
        """`read_into` for a body that came with its head, in chunks, or up to the end of the connection."""
        limit = self.remaining
        if self._chunks is not None and self.remaining is None:
            limit = self._chunks.available()
            if limit == 0:
                self._end_body()
        if limit is not None:
            view = view[:limit]
        if not view:
            return 0
        if self._ahead:
            count = min(len(self._ahead), len(view))
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
        else:
            count = self._receive_into(view)
        if count == 0:
            if limit is not None:
                raise ConnectionLost(f"{self.origin} ended the body in the middle of a chunk")
            self._end_body()
        elif self._chunks is not None:
            self._chunks.took(count)
        elif self.remaining is not None:
            self.remaining -= count
            if self.remaining == 0:
                self._end_body()
        return count

    def _read_head(self, parser: HeadParser) -> ResponseHead:
        self._deadline = time.monotonic() + self._stall_s
        data, self._ahead = self._ahead, b""
        while (head := parser.feed(data)) is None:
            data = self._receive()
            if not data:
                raise ConnectionLost(f"{self.origin} closed the connection without an answer")
        self._deadline = math.inf
        self._ahead = parser.rest
        return head

    def _read_line(self, limit: int) -> bytes:
        """The next line of a chunked body's framing, without its CRLF."""
        while (end := self._ahead.find(b"\r\n", 0, limit + 2)) < 0:
            if len(self._ahead) >= limit + 2:
                raise ProtocolViolation("the server's chunks are broken, or a line of their framing has no end")
            data = self._receive()
            if not data:
                raise ConnectionLost(f"{self.origin} ended its answer too early")
            self._ahead += data
        line, self._ahead = self._ahead[:end], self._ahead[end + 2 :]
        return line

    def _receive(self) -> bytes:
        """Some bytes of a head or of a chunk's framing, b"" at the end."""
        self._check_deadline()
        if self._on_wait is not None:
            self._on_wait()
        buffer = bytearray(_FIRST_READ)
        return bytes(buffer[: self._receive_into(memoryview(buffer))])

    def _receive_into(self, view: memoryview) -> int:
        waited = 0.0
        while True:
            try:
                return self._socket.recv_into(view)
            except (TimeoutError, BlockingIOError):
                waited += self._slice_s
                if waited >= self._stall_s:
                    raise Stalled(f"{self.origin} sent no byte for {self._stall_s:g} s") from None
            except OSError as error:
                raise ConnectionLost(f"{self.origin} dropped the connection: {os_reason(error)}") from None
            if self._on_wait is not None:
                self._on_wait()

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise Stalled(f"{self.origin} is too slow with a small answer")

    def _set_timeouts(self) -> None:
        """Let the kernel end a wait (EAGAIN). Python's own time-out polls before each read, which costs a fast link 10%
        of its processor time in wake-ups. A TLS socket knows only Python's.
        """
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if type(self._socket) is not socket.socket:
            self._socket.settimeout(self._slice_s)
            return
        self._socket.settimeout(None)
        for option, seconds in ((socket.SO_RCVTIMEO, self._slice_s), (socket.SO_SNDTIMEO, self._stall_s)):
            whole, part = divmod(seconds, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), max(1, int(part * 1e6))))


def os_reason(error: Exception) -> str:
    """What the system said, for a person."""
    untrusted = getattr(error, "verify_message", None)  # of ssl.SSLCertVerificationError
    if untrusted is not None:
        return f"its certificate is not trusted ({untrusted})"
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _handshake_rtt(sock: socket.socket) -> float:
    """tcpi_rtt, which a busy processor does not stretch."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return float(struct.unpack_from("@I", info, _TCPI_RTT)[0]) / 1e6
    except (OSError, struct.error):
        return 0.0
