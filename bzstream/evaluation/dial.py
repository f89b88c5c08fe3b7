"""Connections to hosts that a miner names, without becoming the miner's way into our network.

A validator fetches any URL that a registered miner signs, from inside its own network: the classic server-side request
forgery. Three rules close it. The URL must pass one policy, again at every redirect. A name is resolved once, *all* its
addresses must be allowed, and the socket connects to an address that was checked, so that a name which answers
differently the second time (DNS rebinding) has no second time. And "allowed" means global unicast, also for the IPv4
address that hides inside a mapped, compatible, 6to4, Teredo or NAT64 one.

The host name still goes into SNI, the certificate check and the Host field, as the server expects.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from bzstream.config import SubmitSettings
from bzstream.evaluation.codes import Refusal

__all__ = ["Dialer", "Target", "address_is_public", "parse_url"]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_AZURE = ipaddress.IPv4Address("168.63.129.16")
"""Azure's platform address: globally routable on paper, a metadata service inside every Azure machine."""

_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
"""RFC 1123 2.1 names, with the underscore that object stores use. Not ASCII: the miner writes the A-label itself."""

_TARGET = re.compile(r"[!-~]*")
"""Path and query as they go on the request line: visible ASCII, nothing that could end the line (RFC 9112 3)."""


class Target(NamedTuple):
    """Where one request goes."""

    secure: bool
    host: str
    """Without brackets; a name or an address."""
    port: int
    path: str
    """Path and query, beginning with a slash."""

    @property
    def authority(self) -> str:
        """The Host field's value (RFC 9110 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.path}"


def parse_url(url: str, policy: SubmitSettings) -> Target:
    """A URL as the policy allows it. Raises Refusal `forbidden_url`, or `forbidden_address` for a literal address."""

    def refuse(what: str) -> Refusal:
        return Refusal("forbidden_url", f"the checkpoint's URL {what}")

    if len(url) > policy.max_url or not _TARGET.fullmatch(url) or "\\" in url:
        raise refuse("is too long or holds characters that a URL cannot")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refuse("is malformed") from None
    secure = parts.scheme == "https"
    if not secure and not (parts.scheme == "http" and policy.allow_http):
        raise refuse("must begin with https://")
    if "@" in parts.netloc or "#" in url:
        raise refuse("must hold no user name, password or fragment")
    host = parts.hostname or ""
    if port is None:
        port = 443 if secure else 80
    if not port or (policy.ports and port not in policy.ports):
        raise refuse(f"names port {port}, which is not allowed")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A last label that is a number makes inet_aton read the host as an address ("127.1", "0x7f000001").
        if len(host) > 253 or not _HOST.fullmatch(host) or re.fullmatch(r"(.*\.)?(\d+|0[xX][0-9a-fA-F]*)\.?", host):
            raise refuse("has no valid host") from None
    else:
        if getattr(address, "scope_id", None):
            raise refuse("has an address with a zone")
        _check(address, policy)
    path = parts.path or "/"
    return Target(secure, host, port, path + (f"?{parts.query}" if parts.query else ""))


def address_is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address, and any IPv4 address inside it, is a global unicast one."""
    inner: list[ipaddress.IPv4Address] = []
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return address_is_public(address.ipv4_mapped)
        inner += [address.sixtofour] if address.sixtofour else []
        inner += list(address.teredo) if address.teredo else []
        if address in _NAT64 or address in _COMPATIBLE:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if not all(address_is_public(each) for each in inner):
        return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address == _AZURE
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    # NAT64's prefix itself is not "global" in the registry, but what it leads to was judged above.
    return (address.is_global or address in _NAT64) and not special and not site_local


def _check(address: ipaddress.IPv4Address | ipaddress.IPv6Address, policy: SubmitSettings) -> None:
    if not policy.allow_private_urls and not address_is_public(address):
        raise Refusal("forbidden_address", "the checkpoint's host has an address that is not public")


class Dialer:
    """Resolves, checks and connects. `policy`: what `/submit` enforces; `tls`: a context that verifies certificates."""

    def __init__(self, policy: SubmitSettings, tls: ssl.SSLContext | None = None) -> None:
        self.policy = policy
        self._tls = tls or ssl.create_default_context()

    def parse(self, url: str) -> Target:
        return parse_url(url, self.policy)

    def follow(self, target: Target, location: str) -> Target:
        """Where a redirect leads. Raises Refusal `forbidden_url` or `forbidden_address`."""
        try:
            joined = urljoin(target.url, location.split("#")[0])
        except ValueError:
            raise Refusal("forbidden_url", "the server redirects to a malformed URL") from None
        return self.parse(joined)

    def resolve(self, target: Target) -> str:
        """The one address to connect to. Raises Refusal `unreachable` or `forbidden_address`."""
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Refusal("unreachable", "the checkpoint's host name does not resolve") from None
        addresses = [str(info[4][0]) for info in found]
        for address in addresses:
            _check(ipaddress.ip_address(address.split("%")[0]), self.policy)
        return addresses[0]

    def connect(self, target: Target, address: str, *, timeout: float) -> socket.socket:
        """A connection to that very address, with TLS for https. Raises Refusal `unreachable`."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        deadline = time.monotonic() + timeout
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect((address, target.port))
            if target.secure:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                return self._tls.wrap_socket(connection, server_hostname=target.host)
        except (OSError, ValueError) as error:  # ssl.SSLError and socket.timeout are OSErrors
            connection.close()
            what = "the TLS session failed" if isinstance(error, ssl.SSLError) else "no connection could be made"
            raise Refusal("unreachable", f"{what} to the checkpoint's host: {type(error).__name__}") from None
        except BaseException:
            connection.close()
            raise
        return connection
