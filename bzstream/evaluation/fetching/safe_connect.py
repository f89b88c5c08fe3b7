"""Connections to hosts that a miner names, without becoming the miner's way into our network.

A validator fetches any URL that a registered miner signs, from inside its own network: the classic server-side request
forgery. Three rules close it. The URL must pass one policy, again at every redirect. A name is resolved once, *all* its
addresses must be allowed, and the socket connects to an address that was checked, so that a name which answers
differently the second time (DNS rebinding) has no second time. And "allowed" means global unicast, also for the IPv4
address that hides inside a mapped, compatible, 6to4, Teredo or NAT64 one. No proxy is ever used: it would resolve the
name itself.

The host name still goes into SNI, the certificate check and the Host field, as the server expects.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple
from urllib.parse import urljoin, urlsplit

from bzstream.config import SubmitSettings
from bzstream.evaluation.fetching.budget import FetchBudget
from bzstream.evaluation.rejection_codes import Refusal
from bzstream.httpclient import DEFAULT_PORTS, Connection, Origin, SocketAddress, connect_first, resolve, start_tls
from bzstream.submissions.urls import InvalidUrl, check_url, is_public_address

__all__ = ["SafeConnector", "Target", "parse_url"]

_CLOUD_METADATA = frozenset({"168.63.129.16"})
"""Public on paper, a metadata service inside every machine of one cloud (Azure's wire server)."""

_VISIBLE = re.compile(r"[!-~]*")
"""What may stand on a request line (RFC 9112 3): the policy demands no less, this must not depend on it."""

_SLICE_S = 0.25
"""How long one wait for the socket lasts before cancellation and deadlines are looked at again."""


class Target(NamedTuple):
    """Where one request goes."""

    origin: Origin
    path: str
    """Path and query, beginning with a slash."""


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
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    return Target(Origin(scheme, host, port or DEFAULT_PORTS[scheme]), path)


class SafeConnector:
    """Resolves, checks and connects. `policy`: what `/submit` enforces; `tls`: a context that verifies certificates."""

    def __init__(self, policy: SubmitSettings, tls: ssl.SSLContext | None = None) -> None:
        self.policy = policy
        self._tls = tls or ssl.create_default_context()

    def parse(self, url: str) -> Target:
        return parse_url(url, self.policy)

    def follow(self, target: Target, location: str) -> Target:
        """Where a redirect leads. Raises Refusal `forbidden_url` or `forbidden_address`."""
        try:
            joined = urljoin(f"{target.origin}{target.path}", location.split("#")[0])
        except ValueError:
            raise Refusal("forbidden_url", "the server redirects to a malformed URL") from None
        return self.parse(joined)

    def resolve(self, target: Target) -> list[SocketAddress]:
        """The addresses to connect to, every one of them checked. Raises Refusal `unreachable`, `forbidden_address`."""
        try:
            found = resolve(target.origin.host, target.origin.port)
        except OSError:
            raise Refusal("unreachable", "the checkpoint's host name does not resolve") from None
        for address in found:
            public = is_public_address(address.ip) and address.ip not in _CLOUD_METADATA
            if not public and not self.policy.allow_private_urls:
                raise Refusal("forbidden_address", "the checkpoint's host has an address that is not public")
        return found

    def connect(
        self, target: Target, addresses: Sequence[SocketAddress], budget: FetchBudget
    ) -> tuple[Connection, SocketAddress]:
        """A connection to the first of these very addresses that answers, with TLS for https, and that address.

        Raises Refusal `unreachable`, and what the budget raises.
        """
        deadline = time.monotonic() + budget.seconds_left()
        try:
            sock, address = connect_first(addresses, budget.seconds_left(), budget.check)
            if target.origin.secure:
                sock = start_tls(sock, self._tls, target.origin.host, max(0.001, deadline - time.monotonic()))
        except (OSError, ValueError) as error:  # ssl.SSLError and TimeoutError are OSErrors
            what = "the TLS session failed" if isinstance(error, ssl.SSLError) else "no connection could be made"
            raise Refusal("unreachable", f"{what} to the checkpoint's host: {type(error).__name__}") from None
        connection = Connection(
            sock,
            target.origin,
            stall_s=budget.limits.stall_s,
            slice_s=min(_SLICE_S, budget.limits.stall_s),
            on_wait=budget.check,
        )
        return connection, address
