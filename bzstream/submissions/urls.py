"""Checkpoint URLs: their form (RFC 3986) and where they may point. Nothing is looked up and nothing is fetched here.

A miner chooses the URL and the validator will fetch it, from inside its own network. So a URL must name a DNS name or a
literal public address, in the one spelling that all URL libraries read alike. What can be seen in the text is refused
here, before anything is queued. A name can still resolve to a private address: the fetcher checks every address that it
connects to with `is_public_address`.
"""

from __future__ import annotations

import ipaddress
import re

from bzstream.config import SubmitSettings
from bzstream.errors import BzstreamError

__all__ = ["InvalidUrl", "check_url", "is_public_address"]


class InvalidUrl(BzstreamError):
    """A checkpoint URL has the wrong form, or policy does not allow it. `code` names the reason for programs."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


# RFC 3986 section 3: URI = scheme ":" "//" authority path-abempty [ "?" query ] [ "#" fragment ]
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?P<fragment>#.*)?", re.S
)
# Section 3.3 and 3.4: pchar = unreserved / pct-encoded / sub-delims / ":" / "@"; a query has "/" and "?" too. Square
# brackets, backslashes, quotes, spaces and everything beyond ASCII have no place.
_PATH_AND_QUERY = re.compile(
    r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*)?(?:\?(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?"
)
_AUTHORITY = re.compile(r"(?P<host>\[[^\]]*\]|[^\[\]:]*)(?::(?P<port>[^:]*))?")
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
# RFC 1123 2.1 letters, digits and hyphens, and the underscore that real names have.
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
# What the WHATWG URL standard ("ends in a number") and inet_aton take for an IPv4 address: 2130706433, 0x7f.1, 0177.1.
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*", re.ASCII)
_DOTTED_QUAD = re.compile(r"(?:(?:0|[1-9][0-9]{0,2})\.){3}(?:0|[1-9][0-9]{0,2})", re.ASCII)

_PRIVATE_NAMES = ("localhost", "localdomain", "local", "internal", "intranet", "lan", "home", "corp", "home.arpa")
"""Names that are, or commonly are, resolved inside a network (RFC 6761, 6762, 8375; ICANN's list of collisions)."""

_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared address space of providers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; cloud metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
"""IANA's IPv4 special-purpose address registry, whole. A checkpoint is never fetched from these."""

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them, which holds an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which holds an IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
"""IANA's IPv6 special-purpose registry inside 2000::/3. All else is outside it: loopback, mapped and NAT64 addresses
(which hold an IPv4 address), unique local, link-local, multicast."""


def is_public_address(address: str) -> bool:
    """Whether a literal IP address is an ordinary one of the public Internet: for literals and for what DNS answers."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_V4)
    if parsed.scope_id is not None:
        return False
    return parsed in _GLOBAL_V6 and not any(parsed in network for network in _SPECIAL_V6)


def check_url(url: str, rules: SubmitSettings) -> None:
    """Check the form of a checkpoint URL and whether policy allows it. Raises InvalidUrl."""
    if len(url) > rules.max_url:
        raise InvalidUrl("url_too_long", f"checkpoint_url has more than {rules.max_url} characters")
    parts = _URL.fullmatch(url)
    if parts is None or not _PATH_AND_QUERY.fullmatch(parts["rest"]):
        raise InvalidUrl("invalid_url", "checkpoint_url is not an absolute URL as RFC 3986 writes it")
    scheme = parts["scheme"].lower()
    if scheme != "https" and not (scheme == "http" and rules.allow_http):
        allowed = "https or http" if rules.allow_http else "https"
        raise InvalidUrl("url_scheme_not_allowed", f"checkpoint_url must be an {allowed} URL")
    if parts["fragment"] is not None:
        raise InvalidUrl("url_has_fragment", "checkpoint_url must not have a fragment (#)")
    if "@" in parts["authority"]:
        raise InvalidUrl("url_has_credentials", "checkpoint_url must not carry a user name or password")
    authority = _AUTHORITY.fullmatch(parts["authority"])
    if authority is None:
        raise InvalidUrl("invalid_url", "checkpoint_url's host and port are not as RFC 3986 writes them")
    _check_port(authority["port"], 443 if scheme == "https" else 80, rules)
    _check_host(authority["host"], rules)


def _check_port(text: str | None, default: int, rules: SubmitSettings) -> None:
    if text is not None and not (_PORT.fullmatch(text) and int(text) <= 65535):
        raise InvalidUrl("invalid_url", "checkpoint_url's port is not a number from 1 to 65535")
    port = default if text is None else int(text)
    if rules.ports and port not in rules.ports:
        named = ", ".join(map(str, rules.ports))
        raise InvalidUrl("url_port_not_allowed", f"checkpoint_url's port {port} is not one of {named}")


def _check_host(host: str, rules: SubmitSettings) -> None:
    if host.startswith("["):
        try:
            address = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise InvalidUrl("invalid_url", "checkpoint_url's IPv6 address is not valid") from None
        if address.scope_id is not None:
            raise InvalidUrl("invalid_url", "checkpoint_url's IPv6 address must not name a zone (%)")
        _check_address(str(address), rules)
        return
    name = host.removesuffix(".").lower()  # the root's dot, which some resolvers strip and some do not
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        if not _DOTTED_QUAD.fullmatch(name) or any(int(label) > 255 for label in labels):
            raise InvalidUrl("invalid_url", "checkpoint_url's IPv4 address must be written as four decimal numbers")
        _check_address(name, rules)
        return
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidUrl("invalid_url", "checkpoint_url's host is not a DNS name; write Unicode names in Punycode")
    for label in labels:
        _check_punycode(label)
    # A name without a dot is completed from the resolver's search list: it means something else on every network.
    private = len(labels) == 1 or any(name == end or name.endswith("." + end) for end in _PRIVATE_NAMES)
    if private and not rules.allow_private_urls:
        raise InvalidUrl("url_host_not_public", "checkpoint_url's host is a name of a private network")


def _check_address(address: str, rules: SubmitSettings) -> None:
    if not rules.allow_private_urls and not is_public_address(address):
        raise InvalidUrl("url_host_not_public", "checkpoint_url's address is private, local or otherwise special")


def _check_punycode(label: str) -> None:
    """RFC 5890 2.3.1: after `xn--` comes the Punycode of something that is not plain ASCII; else it is a disguise."""
    if label.startswith("xn--"):
        try:
            plain = label[4:].encode("ascii").decode("punycode")
        except UnicodeError:
            plain = ""
        if plain.isascii() or any(sign in plain for sign in "。．｡/\\@:?#"):
            raise InvalidUrl("invalid_url", "checkpoint_url's host has a label that is not valid Punycode")
