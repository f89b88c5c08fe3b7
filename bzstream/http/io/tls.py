"""TLS over the same sockets, the same poller and the same run queue.

OpenSSL reads and writes the socket by itself, without ever blocking. Where the kernel offers TLS (the `tls` upper layer
protocol), OpenSSL hands the keys down after the handshake, and then sendfile works on the connection as if it were
plain: the kernel encrypts. Elsewhere the sending threads read, encrypt and write a piece of the file at a time.

Certificate and key are loaded again when their files change; connections that are open keep what they began with.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from bzstream.errors import BzstreamError
from bzstream.http.io import transports
from bzstream.util.files import FileStamp, file_stamp

__all__ = ["Certificate", "TlsError", "TlsTransport"]

_PIECE = 64 * 1024
"""Bytes read and encrypted at a time: four records, and the most that a blocked connection keeps in memory."""
_OP_ENABLE_KTLS = 1 << 3
"""SSL_OP_ENABLE_KTLS of OpenSSL 3; Python has a name for it from 3.12 on."""
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: forward secrecy and authenticated encryption. OpenSSL's default has suites in CBC mode, too."""
_SOL_TLS, _TLS_TX = 282, 1
_LOOK_S = 0.25
"""How often, at most, the files are looked at: a new certificate is in force within a second."""


class TlsError(BzstreamError):
    """The certificate or the key cannot be used; the text names the files."""


class Certificate:
    """A certificate chain and its key in PEM files, and the context made from them."""

    __slots__ = ("_cert", "_clock", "_context", "_key", "_looked", "_stamps")

    def __init__(self, cert: str, key: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises TlsError."""
        self._cert, self._key = cert, key
        self._clock = clock
        self._looked = clock()
        self._stamps = self._stamps_now()
        self._context = self._load()

    def context(self, warn: Callable[[str], None]) -> ssl.SSLContext:
        """The context for a new connection. `warn` is told once of changed files that cannot be loaded; the last good
        ones stay in force then."""
        now = self._clock()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            stamps = self._stamps_now()
            if stamps != self._stamps:
                self._stamps = stamps
                try:
                    self._context = self._load()
                except TlsError as error:
                    warn(str(error))
        return self._context

    def _stamps_now(self) -> list[FileStamp | None]:
        return [file_stamp(Path(name)) for name in (self._cert, self._key)]

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | _OP_ENABLE_KTLS
        context.set_alpn_protocols(["http/1.1"])
        context.set_ciphers(_CIPHERS)
        try:
            context.load_cert_chain(self._cert, self._key)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise TlsError(
                f"The TLS certificate {self._cert} with the key {self._key} cannot be loaded ({reason}); "
                "give PEM files that belong together."
            ) from None
        return context


class TlsTransport:
    """A connection under TLS; the handshake happens in the first calls of `recv`."""

    __slots__ = ("_kernel", "_retry", "_socket", "_tls")

    secure = True
    short_recv_means_empty = False
    short_send_means_full = False

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """Takes the socket over. Raises OSError when its peer is gone already."""
        self._tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self._kernel: bool | None = None
        # What OpenSSL began to write and had no room for: it wants to be handed the same bytes again.
        self._retry: bytes | memoryview = b""

    def recv(self, size: int) -> bytes | None:
        try:
            return self._tls.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return None

    def send(self, data: bytes | memoryview, more: bool) -> int:
        return self._write(self._retry or data[:_PIECE])

    def sendfile(self, fd: int, offset: int, count: int) -> int | None:
        if self._kernel is None:
            self._kernel = _kernel_sends(self._tls)
        if self._kernel and not self._retry:
            try:
                return os.sendfile(self._tls.fileno(), fd, offset, count)
            except (BlockingIOError, InterruptedError):
                return None
        piece = self._retry or os.pread(fd, min(count, _PIECE), offset)
        if not piece:
            return 0
        return self._write(piece) or None

    def _write(self, piece: bytes | memoryview) -> int:
        try:
            sent = self._tls.send(piece)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            # A copy: the caller may have cut its own differently by then.
            self._retry = bytes(piece)
            return 0
        self._retry = b""
        return sent

    def wait_for_room(self, wait: bool) -> None:
        pass

    def flush(self) -> bool:
        return not self._retry

    def unacknowledged(self) -> int:
        return transports.unacknowledged(self._tls.fileno())

    def close_write(self) -> None:
        try:
            self._tls.unwrap()  # says close_notify; the peer's own is not waited for
        except (OSError, ValueError):
            pass
        self._tls.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool) -> None:
        transports.close(self._tls, reset=reset)


def _kernel_sends(sock: socket.socket) -> bool:
    """Whether the kernel encrypts what is sent (it then knows this connection's keys)."""
    try:
        return len(sock.getsockopt(_SOL_TLS, _TLS_TX, 4)) > 0
    except OSError:
        return False
