"""The client's half of SOCKS 5 (RFC 1928), with user and password (RFC 1929)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

from bzstream.httpclient.origin import Origin
from bzstream.httpclient.proxies import Proxy

__all__ = ["socks_connect"]

_NO_AUTHENTICATION, _PASSWORD = 0, 2
_REPLIES = {
    1: "it failed", 2: "its rules do not allow that", 3: "no route to the network", 4: "no route to the host",
    5: "connection refused", 6: "no answer in time",
}  # fmt: skip


def socks_connect(
    sock: socket.socket,
    proxy: Proxy,
    origin: Origin,
    timeout_s: float,
    resolve: Callable[[str, int], Sequence[Any]],
) -> None:
    """Have the proxy connect `sock` on to the origin. Raises OSError, also for what the proxy refuses."""
    sock.settimeout(timeout_s)
    user, password = proxy.user.encode(), proxy.password.encode()
    if max(len(user), len(password)) > 255:
        raise OSError("the user or the password is too long for SOCKS")
    methods = [_NO_AUTHENTICATION, _PASSWORD] if user else [_NO_AUTHENTICATION]
    sock.sendall(bytes([5, len(methods), *methods]))
    version, method = _receive(sock, 2)
    if version != 5 or method not in methods:
        raise OSError("it is no SOCKS 5 proxy, or wants a user and password")
    if method == _PASSWORD:
        sock.sendall(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
        if _receive(sock, 2)[1] != 0:
            raise OSError("it does not accept the user or the password")
    host = origin.host if proxy.kind == "socks5h" else resolve(origin.host, origin.port)[0].ip
    sock.sendall(b"\x05\x01\x00" + _address(host) + origin.port.to_bytes(2, "big"))
    _, reply, _, kind = _receive(sock, 4)
    if reply != 0:
        raise OSError(_REPLIES.get(reply, f"reply {reply}"))
    length = {1: 4, 4: 16}.get(kind) or _receive(sock, 1)[0]
    _receive(sock, length + 2)  # the address that the proxy connects from


def _address(host: str) -> bytes:
    try:
        packed = ipaddress.ip_address(host).packed
        return bytes([1 if len(packed) == 4 else 4]) + packed
    except ValueError:
        name = host.encode("idna")
        return bytes([3, len(name)]) + name


def _receive(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = sock.recv(count - len(found))
        if not piece:
            raise OSError("it closed the connection")
        found += piece
    return found
