"""TLS to a server that is known by its key, not by a name: the key's pin (`util.key_pin`) is compared in the handshake.

The server proves in the handshake that it has the key, whatever its certificate says of names and dates.
"""

from __future__ import annotations

import ssl

from bzstream.util.key_pin import key_pin

__all__ = ["pinned_context"]


class _PinnedContext(ssl.SSLContext):
    pin = b""


class _PinnedSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        context, certificate = self.context, self.getpeercert(binary_form=True)
        assert isinstance(context, _PinnedContext)
        if certificate is None or key_pin(certificate) != context.pin:
            raise ssl.SSLError("the server does not have the key that it is known by")


def pinned_context(pin: bytes) -> ssl.SSLContext:
    """A client's context that accepts the one key with this pin."""
    context = _PinnedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _PinnedSocket
    context.pin = pin
    return context
