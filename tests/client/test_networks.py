"""The client in real networks: addresses that answer nothing, proxies, path prefixes, whoever else answers."""

from __future__ import annotations

import base64
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from bzstream.chain.keys import Key
from bzstream.chain.proofs import NonceCache, verify_request
from bzstream.client import BadProxy, Forbidden, ProtocolViolation, Unreachable
from bzstream.httpclient import Origin, ProxyRules
from tests.client.conftest import Puller
from tests.client.node import Node, Seen, Unit
from tests.client.test_wire import certificate, secure  # noqa: F401 - fixtures
from tests.httpclient.conftest import Serve, read_request, serve, silent_port  # noqa: F401

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def file_of(tmp_path: Path) -> bytes:
    return (tmp_path / "out" / "group-0.safetensors").read_bytes()


# Addresses


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, int]]]:
    """Name -> the addresses and ports that a scripted DNS answers with."""
    answers: dict[str, list[tuple[str, int]]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **more: object) -> list[object]:
        if host not in answers:
            return real(host, port, **more)  # type: ignore[arg-type, return-value]
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in ip], socket.SOCK_STREAM, 6, "", (ip, at)) for ip, at in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


def test_an_address_that_answers_nothing_costs_a_moment_once(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller, names: dict[str, list[tuple[str, int]]]
) -> None:
    """RFC 8305: the second address is tried while the first is silent, and remembered for the later connections."""
    with silent_port("::1") as silent:
        names["validator.example"] = [("::1", silent), ("127.0.0.1", node.port)]
        began = time.monotonic()
        pull_quickly(url=f"http://validator.example:{node.port}", connections=6)
        assert time.monotonic() - began < 2.0  # of connect_timeout_s alone
    assert file_of(tmp_path) == payload
    assert node.connections >= 2


def test_an_address_that_refuses_costs_nothing(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller, names: dict[str, list[tuple[str, int]]]
) -> None:
    names["validator.example"] = [("127.0.0.2", 1), ("127.0.0.3", 1), ("127.0.0.1", node.port)]
    pull_quickly(url=f"http://validator.example:{node.port}")
    assert file_of(tmp_path) == payload


def test_when_no_address_answers_it_is_said(pull_quickly: Puller, names: dict[str, list[tuple[str, int]]]) -> None:
    names["validator.example"] = [("127.0.0.2", 1), ("::1", 1)]
    with pytest.raises(Unreachable, match=r"validator\.example:9 cannot be reached: Connection refused"):
        pull_quickly(url="http://validator.example:9")


# Path prefixes


def test_a_proof_is_for_the_path_that_the_node_sees(node: Node, payload: bytes, pull_quickly: Puller) -> None:
    """Behind a reverse proxy with a path of its own the signature covers the path without it, for every request."""
    validator = Key.from_seed(b"\4" * 32).ss58_address
    nonces, proven = NonceCache(), []

    def header(seen: Seen, name: str) -> str | None:
        return seen.headers.get(name.lower())

    def strip(seen: Seen) -> None:
        assert seen.target.startswith("/validator1/")
        seen.target = seen.target.removeprefix("/validator1")
        proven.append(verify_request(partial(header, seen), "GET", seen.target, validator, nonces))

    node.answer = strip
    pull_quickly(
        url=node.url + "/validator1/", hotkey=None, key=Key.from_seed(b"\3" * 32), receiver=validator, connections=2
    )
    assert len(proven) > 2


# Proxies


class ForwardProxy:
    """A forward proxy: absolute-form requests and CONNECT, counted; it may want a user and password."""

    def __init__(self, serve: Serve, credentials: str = "") -> None:  # noqa: F811
        self.requests: list[str] = []
        self._wanted = f"Basic {base64.b64encode(credentials.encode()).decode()}" if credentials else None
        self.port = serve(self._handle)

    def _handle(self, client: socket.socket) -> None:
        head = read_request(client).decode()
        method, target, _ = head.split(" ", 2)
        self.requests.append(f"{method} {target}")
        if self._wanted and f"Proxy-Authorization: {self._wanted}\r\n" not in head:
            client.sendall(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
            return
        host, port = target.removeprefix("http://").split("/")[0].rsplit(":", 1)
        server = socket.create_connection((host, int(port)))
        if method == "CONNECT":
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        else:
            server.sendall(head.replace(f"http://{host}:{port}", "", 1).encode())
        join(client, server)


def join(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until one side ends."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                # Later requests of a kept connection still name the server in full; the test's node does not mind.
                target.sendall(data)
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=pass_on, args=(other, one), daemon=True)
    back.start()
    pass_on(one, other)
    back.join()
    other.close()


@pytest.fixture
def proxy(serve: Serve) -> ForwardProxy:  # noqa: F811
    return ForwardProxy(serve)


def origin_form(seen: Seen) -> None:
    """What a proxy that understands every request would have made of it."""
    if seen.target.startswith("http://"):
        seen.target = "/" + seen.target.split("/", 3)[3]


def test_http_goes_through_the_proxy_as_curl_sends_it(
    node: Node,
    payload: bytes,
    tmp_path: Path,
    pull_quickly: Puller,
    proxy: ForwardProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node.answer = origin_form
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
    pull_quickly(connections=2)
    assert file_of(tmp_path) == payload
    assert proxy.requests[0] == f"GET {node.url}/model/partial/manifest"


def test_https_goes_through_a_tunnel(
    secure: Node,  # noqa: F811
    certificate: Path,  # noqa: F811
    payload: bytes,
    tmp_path: Path,
    pull_quickly: Puller,
    serve: Serve,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = ForwardProxy(serve, "me:se cret")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:se%20cret@127.0.0.1:{proxy.port}/")
    pull_quickly(url=secure.url, ca_file=str(certificate / "cert.pem"))
    assert file_of(tmp_path) == payload
    assert set(proxy.requests) == {f"CONNECT 127.0.0.1:{secure.port}"}
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}/")
    with pytest.raises(Unreachable, match=r"refuses to connect to .* 407"):
        pull_quickly(url=secure.url, ca_file=str(certificate / "cert.pem"), out=tmp_path / "other")


def test_a_proxy_that_wants_a_password_says_so(
    pull_quickly: Puller,
    serve: Serve,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{ForwardProxy(serve, 'me:x').port}")
    with pytest.raises(ProtocolViolation, match="wants a user and password"):
        pull_quickly()


@pytest.mark.parametrize("kind", ["socks5", "socks5h"])
@pytest.mark.parametrize("password", ["", "secret"])
def test_all_proxy_may_be_socks(
    kind: str,
    password: str,
    node: Node,
    payload: bytes,
    tmp_path: Path,
    pull_quickly: Puller,
    serve: Serve,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bytes] = []

    def socks(client: socket.socket) -> None:
        methods = client.recv(2)[1]
        offered = client.recv(methods)
        client.sendall(bytes([5, 2 if password else 0]))
        assert offered == (b"\0\2" if password else b"\0")
        if password:
            assert client.recv(100) == b"\1\2me\6secret"
            client.sendall(b"\1\0")
        asked.append(client.recv(300))
        client.sendall(b"\5\0\0\1\x7f\0\0\1\0\0")
        join(client, socket.create_connection(("127.0.0.1", node.port)))

    user = f"me:{password}@" if password else ""
    monkeypatch.setenv("ALL_PROXY", f"{kind}://{user}127.0.0.1:{serve(socks)}")
    pull_quickly(url=f"http://localhost:{node.port}")
    assert file_of(tmp_path) == payload
    there = b"\5\1\0\3\x09localhost" if kind == "socks5h" else b"\5\1\0"
    assert all(request.startswith(there) and request.endswith(node.port.to_bytes(2, "big")) for request in asked)


HTTP, HTTPS = Origin("http", "node.example", 80), Origin("https", "node.example", 443)


@pytest.mark.parametrize(
    ("variables", "origin", "proxy"),
    [
        ({"http_proxy": "p"}, HTTP, "http://p:1080"),
        ({"HTTP_PROXY": "http://p:1"}, HTTP, None),  # a CGI program's request header, not a setting
        ({"http_proxy": "p"}, HTTPS, None),
        ({"HTTPS_PROXY": "p:3128"}, HTTPS, "http://p:3128"),
        ({"HTTPS_PROXY": "a:1", "https_proxy": "b:2"}, HTTPS, "http://b:2"),
        ({"ALL_PROXY": "socks5h://p"}, HTTPS, "socks5h://p:1080"),
        ({"ALL_PROXY": "p:1", "http_proxy": "q:2"}, HTTP, "http://q:2"),
        ({"http_proxy": "p:1", "no_proxy": "*"}, HTTP, None),
        ({"http_proxy": "p:1", "no_proxy": "example"}, HTTP, None),
        ({"http_proxy": "p:1", "no_proxy": "a, .node.example"}, HTTP, None),
        ({"http_proxy": "p:1", "NO_PROXY": "NODE.example"}, HTTP, None),
        ({"http_proxy": "p:1", "no_proxy": "ode.example"}, HTTP, "http://p:1"),
        ({"http_proxy": "p:1", "no_proxy": "10.0.0.0/8"}, Origin("http", "10.1.2.3", 80), None),
        ({"http_proxy": "p:1", "no_proxy": "10.0.0.0/8"}, Origin("http", "11.1.2.3", 80), "http://p:1"),
        ({"http_proxy": "p:1", "no_proxy": "[::1]"}, Origin("http", "::1", 80), None),
        ({}, HTTP, None),
    ],
)
def test_which_proxy(variables: dict[str, str], origin: Origin, proxy: str | None) -> None:
    found = ProxyRules(variables).for_origin(origin)
    assert (None if found is None else str(found)) == proxy


@pytest.mark.parametrize("url", ["https://p:1", "socks4://p", "http://", "http://p:99999", "http://a b"])
def test_a_proxy_that_cannot_be_used_is_named(url: str, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", url)
    with pytest.raises(BadProxy):
        pull_quickly()


# Somebody else answers


def test_a_redirecting_manifest_says_where_to(node: Node, pull_quickly: Puller) -> None:
    node.answer = lambda seen: (308, [("Location", "https://new.example/model")], b"")
    with pytest.raises(ProtocolViolation, match=r"redirects to https://new\.example/model, which is not followed"):
        pull_quickly()


def test_a_firewalls_page_is_not_taken_for_the_nodes_word(node: Node, pull_quickly: Puller) -> None:
    node.answer = lambda seen: (403, [("Content-Type", "text/html")], b"<html>Blocked by policy</html>")
    with pytest.raises(Forbidden, match=r"text/html, is not a bzstream node's; a proxy or firewall"):
        pull_quickly()


def test_an_entity_tag_that_was_weakened_on_the_way_is_named(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    unit = node.units["partial", 0]

    def weaken(seen: Seen) -> tuple[int, list[tuple[str, str]], bytes] | None:
        if seen.range is None:
            return None
        begin, end = seen.range
        fields = [("ETag", f'W/"{unit.sha256}"'), ("Content-Range", f"bytes {begin}-{end - 1}/{len(payload)}")]
        return 206, fields, payload[begin:end]

    node.answer = weaken
    with pytest.raises(ProtocolViolation, match="weakened the entity tag"):
        pull_quickly()


AUTHORITIES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


@pytest.mark.parametrize("name", AUTHORITIES)
def test_authorities_come_from_the_environment_too(
    name: str,
    secure: Node,  # noqa: F811
    certificate: Path,  # noqa: F811
    payload: bytes,
    tmp_path: Path,
    pull_quickly: Puller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for other in AUTHORITIES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(certificate / "cert.pem"))
    pull_quickly(url=secure.url)
    assert file_of(tmp_path) == payload


def test_a_proxy_is_not_asked_for_what_is_exempt(
    node: Node,
    payload: bytes,
    tmp_path: Path,
    pull_quickly: Puller,
    proxy: ForwardProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node.units["partial", 0] = Unit(payload)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pull_quickly()
    assert file_of(tmp_path) == payload
    assert proxy.requests == []
