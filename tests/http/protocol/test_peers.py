"""Callers and trusted proxies."""

from __future__ import annotations

from bzstream.http import Headers
from bzstream.http.protocol.peers import TrustedProxies, caller_of


def test_callers_and_proxies() -> None:
    assert caller_of("10.1.2.3") == "10.1.2.3"
    assert caller_of("2001:db8:1:2:3::4") == caller_of("2001:db8:1:2:ffff::") == "2001:db8:1:2::/64"
    proxies = TrustedProxies(("10.0.0.0/8", "fd00::/8"))

    def resolve(peer: str, *forwarded: str) -> str:
        return proxies.resolve(peer, Headers([("x-forwarded-for", value) for value in forwarded]))

    assert resolve("1.1.1.1", "9.9.9.9") == "1.1.1.1"
    assert resolve("10.0.0.1") == "10.0.0.1"
    assert resolve("10.0.0.1", "6.6.6.6, 7.7.7.7, 10.9.9.9") == "7.7.7.7"
    assert resolve("10.0.0.1", "6.6.6.6", "7.7.7.7:123") == "7.7.7.7"
    assert resolve("10.0.0.1", "[2001:db8::1]:80") == "2001:db8::1"
    assert resolve("10.0.0.1", "7.7.7.7, junk") == "10.0.0.1"
    assert resolve("10.0.0.1", "::ffff:7.7.7.7") == "7.7.7.7"
    assert resolve("10.0.0.1", "") == "10.0.0.1"
