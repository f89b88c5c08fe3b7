"""Connections to hosts that a miner names, without becoming the miner's way into our network.

A validator fetches any URL that a registered miner signs, from inside its own network: the classic server-side request
forgery. Three rules close it. The URL must pass one policy, again at every redirect. A name is resolved once, *all* its
addresses must be allowed, and the socket connects to an address that was checked, so that a name which answers
differently the second time (DNS rebinding) has no second time. And "allowed" means global unicast, also for the IPv4
address that hides inside a mapped, compatible, 6to4, Teredo or NAT64 one.

The host name still goes into SNI, the certificate check and the Host field, as the server expects.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from bzstream.config import SubmitSettings
from bzstream.evaluation.codes import Refusal
from bzstream.submissions.urls import InvalidUrl, check_url, is_public_address

__all__ = ["Dialer", "Target", "parse_url"]

_PLATFORM = frozenset({"168.63.129.16"})
"""Public on paper, a metadata service inside every machine of one cloud (Azure's wire server)."""

_VISIBLE = re.compile(r"[!-~]*")
"""What may stand on a request line (RFC 9112 3): the policy demands no less, this must not depend on it."""


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
    """A URL that the policy of `/submit` allows. Raises Refusal `forbidden_url`, or `forbidden_address` for a host."""
    try:
        check_url(url, policy)
        parts = urlsplit(url)
        port = parts.port
    except InvalidUrl as error:
        code = "forbidden_address" if error.code == "url_host_not_public" else "forbidden_url"
        raise Refusal(code, str(error)) from None
    except ValueError:
        raise Refusal("forbidden_url", "the URL is malformed") from None
    host, path = parts.hostname or "", parts.path or "/"
    path += f"?{parts.query}" if parts.query else ""
    if not host or not _VISIBLE.fullmatch(host + path):
        raise Refusal("forbidden_url", "the URL is malformed")
    secure = parts.scheme == "https"
    return Target(secure, host, port or (443 if secure else 80), path)


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
            public = is_public_address(address) and address not in _PLATFORM
            if not public and not self.policy.allow_private_urls:
                raise Refusal("forbidden_address", "the checkpoint's host has an address that is not public")
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
