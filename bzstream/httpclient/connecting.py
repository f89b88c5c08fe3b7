"""Opens connections: addresses tried in the order and rhythm of RFC 8305 (happy eyeballs), then TLS or a proxy.

A name often has an IPv6 and an IPv4 address, and one of the two may answer nothing. So the next address gets its chance
a quarter of a second after the one before, or at once when that one fails; the first that answers is used, and tried
first from then on.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from bzstream.httpclient.connection import Connection, os_reason
from bzstream.httpclient.errors import ClientError, Unreachable
from bzstream.httpclient.origin import Origin
from bzstream.httpclient.proxies import Proxy, ProxyRules

if TYPE_CHECKING:
    import ssl

__all__ = ["Connector", "SocketAddress", "connect_first", "pinned_tls_context", "resolve", "start_tls", "tls_context"]

ATTEMPT_DELAY_S = 0.25
"""RFC 8305 5: the recommended Connection Attempt Delay."""


class SocketAddress(NamedTuple):
    """What `socket.connect` takes."""

    family: int
    address: Any

    @property
    def ip(self) -> str:
        return str(self.address[0])


def tls_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Certificates and names are verified, by the system's authorities (`SSL_CERT_FILE`, `SSL_CERT_DIR`) or by those in
    `ca_file` (PEM) alone. Raises Unreachable.
    """
    import ssl  # 5 ms that a plain http pull need not pay

    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # SSLError too
        raise Unreachable(f"the certificates in {ca_file} cannot be loaded: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def pinned_tls_context(pin: bytes) -> ssl.SSLContext:
    """Not the name of the server is verified but its key, by this pin (`util.key_pin`)."""
    from bzstream.httpclient.pinned_tls import pinned_context

    return pinned_context(pin)


def resolve(host: str, port: int) -> list[SocketAddress]:
    """The addresses of a name, in the system's order (RFC 6724) but with the families by turns. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that IDNA does not allow
        raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
    addresses = list(dict.fromkeys(SocketAddress(family, address) for family, _, _, _, address in found))
    first = [address for address in addresses if address.family == addresses[0].family]
    others = [address for address in addresses if address.family != addresses[0].family]
    return [address for address in chain.from_iterable(zip_longest(first, others)) if address is not None]


def connect_first(
    addresses: Sequence[SocketAddress], timeout_s: float, on_wait: Callable[[], None] | None = None
) -> tuple[socket.socket, SocketAddress]:
    """A connection to the first of the addresses that answers. `on_wait` as in `Connection`. Raises OSError."""
    deadline = next_attempt = time.monotonic()
    deadline += timeout_s
    waiting = list(addresses)
    pending: dict[int, tuple[socket.socket, SocketAddress]] = {}
    poller = select.poll()
    failure = OSError("no address")
    try:
        while waiting or pending:
            if on_wait is not None:
                on_wait()
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError("timed out")
            if waiting and (now >= next_attempt or not pending):
                address = waiting.pop(0)
                next_attempt = now + ATTEMPT_DELAY_S
                try:
                    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                except OSError as error:  # a family that this system does not have
                    failure = error
                    continue
                pending[sock.fileno()] = sock, address
                # A failure at once shows in SO_ERROR no more, so that it is looked at here.
                number = sock.connect_ex(address.address)
                if number not in (0, errno.EINPROGRESS):
                    failure = OSError(number, os.strerror(number))
                    pending.pop(sock.fileno())
                    sock.close()
                    continue
                poller.register(sock, select.POLLOUT)
            until = min(deadline, next_attempt if waiting else now + ATTEMPT_DELAY_S)
            for fd, _ in poller.poll(max(0.0, until - now) * 1000):
                sock, address = pending[fd]
                poller.unregister(fd)
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number == 0:
                    del pending[fd]
                    return sock, address
                failure = OSError(number, os.strerror(number))
                pending.pop(fd)[0].close()
                next_attempt = now
        raise failure
    finally:
        for sock, _ in pending.values():
            sock.close()


def start_tls(sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float) -> ssl.SSLSocket:
    """TLS on a connected socket, which is closed when that fails. Raises OSError (SSLError) and ValueError."""
    try:
        sock.settimeout(timeout_s)
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


class Connector:
    """Opens connections for one caller of the network, directly or through the proxies of the environment.

    Any thread. `context`: for https origins. The address that answered is remembered for each host and port.
    """

    def __init__(
        self,
        proxies: ProxyRules,
        context: Callable[[], ssl.SSLContext],
        *,
        connect_timeout_s: float,
        stall_s: float,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self._proxies = proxies
        self._context = context
        self._connect_timeout_s = connect_timeout_s
        self._stall_s = stall_s
        self._on_wait = on_wait
        self._answered: dict[tuple[str, int], SocketAddress] = {}

    def open(self, origin: Origin) -> Connection:
        """A connection that is ready for a request. Raises Unreachable and BadProxy."""
        proxy = self._proxies.for_origin(origin)
        if proxy is None:
            sock = self._connect(origin.host, origin.port, str(origin))
        else:
            sock = self._connect(proxy.host, proxy.port, f"the proxy {proxy}")
            try:
                sock = self._tunnel(sock, proxy, origin)
            except BaseException:
                sock.close()
                raise
        if origin.secure:
            try:
                sock = start_tls(sock, self._context(), origin.host, self._stall_s)
            except (OSError, ValueError) as error:
                raise Unreachable(f"{origin} does not complete a TLS handshake: {os_reason(error)}") from None
        forwarded = proxy is not None and proxy.kind == "http" and not origin.secure
        return Connection(
            sock,
            origin,
            stall_s=self._stall_s,
            absolute_form=forwarded,
            extra_fields=proxy.fields if proxy is not None and forwarded else (),
        )

    def _connect(self, host: str, port: int, name: str) -> socket.socket:
        try:
            addresses = resolve(host, port)
            best = self._answered.get((host, port))
            if best in addresses:
                addresses.remove(best)
                addresses.insert(0, best)
            sock, self._answered[host, port] = connect_first(addresses, self._connect_timeout_s, self._on_wait)
        except OSError as error:
            raise Unreachable(f"{name} cannot be reached: {os_reason(error)}") from None
        return sock

    def _tunnel(self, sock: socket.socket, proxy: Proxy, origin: Origin) -> socket.socket:
        """The way through a proxy: a SOCKS request, CONNECT for https, nothing for http (requests are forwarded)."""
        if proxy.kind != "http":
            from bzstream.httpclient.socks import socks_connect

            try:
                socks_connect(sock, proxy, origin, self._connect_timeout_s, resolve)
            except OSError as error:
                raise Unreachable(f"the proxy {proxy} does not lead to {origin}: {os_reason(error)}") from None
            return sock
        if not origin.secure:
            return sock
        target = f"{origin.host if ':' not in origin.host else f'[{origin.host}]'}:{origin.port}"
        connection = Connection(sock, Origin("http", origin.host, origin.port), stall_s=self._stall_s)
        try:
            status = connection.exchange("CONNECT", target, proxy.fields).status
            if 200 <= status < 300:
                return connection.detach()
        except ClientError as error:
            raise Unreachable(f"the proxy {proxy} does not lead to {origin}: {error}") from None
        raise Unreachable(f"the proxy {proxy} refuses to connect to {origin}: it answered {status}")
