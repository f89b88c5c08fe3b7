"""Which address a connection is made to, and that the one that answered is remembered."""

from __future__ import annotations

import socket
import time

import pytest

from bzstream.httpclient import Connector, Origin, ProxyRules, connect_first, resolve, tls_context
from bzstream.httpclient.connecting import ATTEMPT_DELAY_S, SocketAddress
from tests.httpclient.conftest import Serve, answering, silent_port


def address(ip: str, port: int) -> SocketAddress:
    return SocketAddress(socket.AF_INET6 if ":" in ip else socket.AF_INET, (ip, port))


def test_the_address_that_answered_is_tried_first_from_then_on(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    port = serve(answering(b""))
    connector = Connector(ProxyRules({}), tls_context, connect_timeout_s=10, stall_s=1)
    with silent_port("::1") as silent:
        found = [(socket.AF_INET6, 1, 6, "", ("::1", silent)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        seconds = []
        for _ in range(6):
            began = time.monotonic()
            connector.open(Origin("http", "node.example", port)).close()
            seconds.append(time.monotonic() - began)
    assert seconds[0] >= ATTEMPT_DELAY_S
    assert min(seconds[1:]) < ATTEMPT_DELAY_S


def test_the_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ips = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1"]
    found = [(socket.AF_INET6 if ":" in ip else socket.AF_INET, 1, 6, "", (ip, 1)) for ip in ips]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert [each.ip for each in resolve("node.example", 1)] == [ips[0], ips[3], ips[1], ips[2]]


def test_when_all_are_silent_the_time_is_bounded() -> None:
    with silent_port("127.0.0.1") as one, silent_port("::1") as other, pytest.raises(TimeoutError):
        connect_first([address("127.0.0.1", one), address("::1", other)], 0.4)


def test_a_refusal_is_the_reason_and_no_socket_is_left(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect_first([address("127.0.0.1", 1), address("::1", 1)], 5)
    assert not recwarn.list
