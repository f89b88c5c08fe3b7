"""Peer addresses, trusted proxies, and the caller that limits count a connection under. Pure functions."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from bzstream.http.protocol.messages import Headers

__all__ = ["TrustedProxies", "caller_of", "plain_address"]

_MOST_HOPS = 32
"""Entries of X-Forwarded-For that are read, from the right. Each costs microseconds; no chain of proxies is longer."""


def plain_address(text: str) -> IPv4Address | IPv6Address:
    """An IP address; an IPv4 one that came through an IPv6 socket (`::ffff:…`) as IPv4. Raises ValueError."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def caller_of(peer: str) -> str:
    """The peer address, or for IPv6 its /64: the smallest block that one customer is handed (RFC 6177)."""
    if ":" not in peer:
        return peer
    return str(IPv6Network((int(IPv6Address(peer.partition("%")[0])), 64), strict=False))


class TrustedProxies:
    """Networks whose X-Forwarded-For is believed. Raises ValueError for text that is no CIDR network."""

    __slots__ = ("_networks",)

    def __init__(self, networks: tuple[str, ...]) -> None:
        self._networks = tuple(ip_network(text, strict=False) for text in networks)

    def __contains__(self, peer: str) -> bool:
        if not self._networks:
            return False
        address = plain_address(peer)
        return any(address in network for network in self._networks)

    def resolve(self, peer: str, headers: Headers) -> str:
        """The nearest address that is no trusted proxy, read from the right, where our own proxies wrote.

        Anyone may have written what is left of it. An entry that is no address ends the search.
        """
        entries = (headers.list("x-forwarded-for") or "").rsplit(",", _MOST_HOPS)
        while peer in self and entries:
            try:
                peer = str(plain_address(_without_port(entries.pop().strip())))
            except ValueError:
                break
        return peer


def _without_port(entry: str) -> str:
    """`1.2.3.4:80` and `[2001:db8::1]:80` are seen in the wild beside bare addresses."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry.partition(":")[0] if entry.count(":") == 1 else entry
