"""One HTTP/1.1 connection, seen from the client: heads through h11, bodies past it.

h11 copies every body byte that goes through it several times. So it is handed exactly the bytes of a response head and
judges them; the body then goes from the socket straight into the caller's memory (`read_into`), counted here against
the one framing that is accepted for it, Content-Length. Small JSON documents go through h11 whole, with a limit.

Everything from the network is bounded: the bytes of a head, the time for a head, the seconds without a byte, the bytes
of a document. Redirects are never followed: they would carry the token to whoever the answer names.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from typing import TYPE_CHECKING

import h11

from bzstream.client.address import Address
from bzstream.client.errors import Dropped, Misbehaved, Passing, Stalled, Unreachable
from bzstream.client.tuning import Tuning

if TYPE_CHECKING:
    import ssl

__all__ = ["Connection", "Reply", "tls_context"]

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LENGTH_FORM = re.compile(r"[0-9]{1,18}", re.ASCII)
_TCPI_RTT = 68
"""Offset of tcpi_rtt (microseconds) in struct tcp_info, linux/tcp.h."""
_FIRST_READ = 4096
"""Bytes of the read that gets a head: what it catches of the body is copied once, so it is kept small."""


def tls_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Certificates and names are verified, by the system's authorities or by those in `ca_file` (PEM) alone."""
    import ssl  # 5 ms that a plain http pull need not pay

    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # SSLError too
        raise Unreachable(f"the certificates in {ca_file} cannot be loaded: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Reply:
    """The head of a final response."""

    __slots__ = ("_fields", "status")

    def __init__(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self._fields = fields

    def get(self, name: str) -> str | None:
        """A header's value, None without one. Raises Misbehaved when it comes twice with different values."""
        wanted = name.lower().encode("ascii")
        values = {value for field, value in self._fields if field == wanted}
        if len(values) > 1:
            raise Misbehaved(f"the server sent the header {name} twice with different values")
        return values.pop().decode("latin-1") if values else None

    @property
    def length(self) -> int:
        """Content-Length. Raises Misbehaved without one, or with an encoding that changes what the bytes mean."""
        if self.get("transfer-encoding") is not None or self.get("content-encoding") not in (None, "identity"):
            raise Misbehaved("the server sent the data encoded, which a range of a file must not be")
        text = self.get("content-length")
        if text is None or not _LENGTH_FORM.fullmatch(text):
            raise Misbehaved("the server did not say how many bytes it sends (Content-Length)")
        return int(text)


class Connection:
    """A connection that one thread uses; `interrupt` alone may be called from another.

    Raises Unreachable from the constructor; Dropped, Stalled and Misbehaved from everything that reads.
    """

    def __init__(self, address: Address, tuning: Tuning, context: ssl.SSLContext | None) -> None:
        self.address = address
        self.reusable = True
        """Whether another request may be sent once the body is read."""
        self.remaining = 0
        """Bytes of the current body still to be read."""
        self.requests = 0
        self._tuning = tuning
        self._ahead = b""
        began = time.monotonic()
        try:
            raw = socket.create_connection((address.host, address.port), tuning.connect_timeout_s)
        except (OSError, UnicodeError) as error:
            raise Unreachable(f"{address} cannot be reached: {_reason(error)}") from None
        self.rtt = _handshake_rtt(raw, time.monotonic() - began)
        """Seconds of a round trip, as the kernel measured it in the handshake."""
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is None:
                _kernel_timeout(raw, tuning.stall_s)
                self._socket = raw
            else:
                raw.settimeout(tuning.stall_s)
                self._socket = context.wrap_socket(raw, server_hostname=address.host)
        except (OSError, ValueError) as error:
            raw.close()
            raise Unreachable(f"{address} does not complete a TLS handshake: {_reason(error)}") from None

    def exchange(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes = b"") -> Reply:
        """Send a request and read the head of its final response; the body is then waiting to be read."""
        assert self.reusable, "the last body was not read to its end"
        self.reusable = False
        engine = h11.Connection(h11.CLIENT, max_incomplete_event_size=self._tuning.max_head)
        fields = [("Host", self.address.authority), *headers]
        if body:
            fields.append(("Content-Length", str(len(body))))
        request = engine.send(h11.Request(method=method, target=target, headers=fields)) or b""
        if body:
            request += engine.send(h11.Data(body)) or b""
        engine.send(h11.EndOfMessage())
        try:
            self._socket.sendall(request)
        except (TimeoutError, BlockingIOError):
            raise Stalled(f"{self.address} took no request for {self._tuning.stall_s:g} s") from None
        except OSError as error:
            raise Dropped(f"{self.address} closed the connection: {_reason(error)}") from None
        self.requests += 1
        self._engine = engine
        response = self._read_final_head()
        self._keep_alive = response.http_version >= b"1.1" and not _says_close(response)
        return Reply(response.status_code, list(response.headers))

    def begin_body(self, length: int) -> None:
        """Expect `length` bytes of body, to be read with `read_into`."""
        self.remaining = length
        if length < len(self._ahead):
            self._keep_alive = False  # more came than was announced: what follows is no answer to us
        self._settle()

    def read_into(self, view: memoryview) -> int:
        """Receive at least 1 byte of the body into `view` (not empty), at most what remains of it."""
        if self._ahead:
            count = min(len(self._ahead), len(view), self.remaining)
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
        else:
            if len(view) > self.remaining:
                view = view[: self.remaining]
            try:
                count = self._socket.recv_into(view)
            except (TimeoutError, BlockingIOError):
                raise Stalled(f"{self.address} sent no byte for {self._tuning.stall_s:g} s") from None
            except OSError as error:
                raise Dropped(f"{self.address} dropped the connection: {_reason(error)}") from None
            if count == 0:
                raise Dropped(f"{self.address} ended the body {self.remaining} bytes too early")
        self.remaining -= count
        self._settle()
        return count

    def read_document(self, limit: int) -> bytes:
        """The whole body of a small answer, any framing. Raises Misbehaved when it is over `limit` bytes."""
        engine = self._engine
        pieces: list[bytes] = []
        size = 0
        deadline = time.monotonic() + max(60.0, self._tuning.stall_s)
        if self._ahead:
            engine.receive_data(self._ahead)
            self._ahead = b""
        try:
            while not isinstance(event := engine.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Data):
                    size += len(event.data)
                    if size > limit:
                        raise Misbehaved(f"{self.address} sent a document of more than {limit} bytes")
                    pieces.append(bytes(event.data))
                elif event is h11.NEED_DATA:
                    engine.receive_data(self._receive(65536, deadline))
                else:
                    raise Dropped(f"{self.address} ended its answer too early")
        except h11.RemoteProtocolError as error:
            raise _broken(self.address, error) from None
        self.reusable = self._keep_alive and engine.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}
        self.reusable = self.reusable and not engine.trailing_data[0]
        return b"".join(pieces)

    def finish_empty(self) -> None:
        """After a response without a body (HEAD)."""
        self.begin_body(0)

    def interrupt(self) -> None:
        """Make a read that another thread is in end at once."""
        # Not SSLSocket.shutdown: that would take the TLS object away under the reading thread.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.reusable = False
        with contextlib.suppress(OSError):
            self._socket.close()

    def _settle(self) -> None:
        if self.remaining == 0:
            self.reusable = self._keep_alive and not self._ahead

    def _receive(self, size: int, deadline: float) -> bytes:
        if time.monotonic() > deadline:
            raise Stalled(f"{self.address} is too slow with a small answer")
        try:
            return self._socket.recv(size)
        except (TimeoutError, BlockingIOError):
            raise Stalled(f"{self.address} sent no byte for {self._tuning.stall_s:g} s") from None
        except OSError as error:
            raise Dropped(f"{self.address} dropped the connection: {_reason(error)}") from None

    def _read_final_head(self) -> h11.Response:
        """Bytes up to the end of a head go to h11, the rest stays in `_ahead`; interim responses are passed over."""
        deadline = time.monotonic() + self._tuning.stall_s
        data, self._ahead = self._ahead, b""
        taken = 0
        while True:
            end = _HEAD_END.search(data)
            if end is None:
                if taken + len(data) > self._tuning.max_head:
                    raise Misbehaved(f"{self.address} sent a head of more than {self._tuning.max_head} bytes")
                more = self._receive(_FIRST_READ, deadline)
                if not more:
                    raise Dropped(f"{self.address} closed the connection without an answer")
                data += more
                continue
            head, data = data[: end.end()], data[end.end() :]
            taken += len(head)
            if taken > self._tuning.max_head:
                raise Misbehaved(f"{self.address} sent a head of more than {self._tuning.max_head} bytes")
            try:
                self._engine.receive_data(head)
                event = self._engine.next_event()
            except h11.RemoteProtocolError as error:
                raise _broken(self.address, error) from None
            if isinstance(event, h11.Response):
                self._ahead = data
                return event
            if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
                raise Misbehaved(f"{self.address} sent no HTTP response")


def _handshake_rtt(sock: socket.socket, fallback: float) -> float:
    """tcpi_rtt, which a busy processor does not stretch; `fallback` where the kernel does not tell."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return float(struct.unpack_from("@I", info, _TCPI_RTT)[0]) / 1e6 or fallback
    except (OSError, struct.error):
        return fallback


def _kernel_timeout(sock: socket.socket, seconds: float) -> None:
    """Let the kernel end a wait (EAGAIN). Python's own time-out polls before each read, which costs a fast link 10% of
    its processor time in wake-ups.
    """
    sock.settimeout(None)
    whole, part = divmod(seconds, 1)
    limit = struct.pack("@ll", int(whole), max(1, int(part * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _says_close(response: h11.Response) -> bool:
    values = b",".join(value for name, value in response.headers if name == b"connection")
    return b"close" in [token.strip().lower() for token in values.split(b",")]


def _broken(address: Address, error: h11.RemoteProtocolError) -> Passing | Misbehaved:
    text = str(error)
    if "incomplete message" in text or "without sending complete" in text:
        return Dropped(f"{address} ended its answer too early")
    return Misbehaved(f"{address} broke the HTTP protocol: {text}")


def _reason(error: Exception) -> str:
    untrusted = getattr(error, "verify_message", None)  # of ssl.SSLCertVerificationError
    if untrusted is not None:
        return f"its certificate is not trusted ({untrusted})"
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
