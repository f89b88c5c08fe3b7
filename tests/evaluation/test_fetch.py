"""Fetching from honest and hostile servers, over real sockets."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from bzstream.config import SubmitSettings
from bzstream.evaluation.fetching import CancelledFetch, Fetched, Limits, SafeConnector, fetch, safe_connect
from bzstream.evaluation.fetching.safe_connect import parse_url
from bzstream.evaluation.rejection_codes import REJECTED, Failure, Refusal
from bzstream.submissions import urls
from tests.evaluation.servers import BODY, LIMIT, SERVERS, SIZE, Server, serving
from tests.httpclient.conftest import silent_port

server = pytest.fixture(serving)

QUICK = Limits(
    max_bytes=LIMIT, timeout_s=8.0, stall_s=0.6, max_redirects=3, connections=3, part_bytes=64 * 1024, attempts=1
)


@pytest.fixture
def only_our_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 counts as public, so that the rest of the policy can be enforced against a server on it."""
    real = urls.is_public_address

    def public(address: str) -> bool:
        return address == "127.0.0.1" or real(address)

    monkeypatch.setattr(urls, "is_public_address", public)
    monkeypatch.setattr(safe_connect, "is_public_address", public)


def get(url: str, folder: Path, limits: Limits = QUICK, connector: SafeConnector | None = None) -> Fetched:
    connector = connector or SafeConnector(SubmitSettings(allow_http=True))
    return fetch(url, folder / "file", limits, connector, cancelled=threading.Event())


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.usefixtures("only_our_loopback")
def test_every_hostile_server_ends_in_its_code(name: str, server: Server, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Refusal) as caught:
        get(server.url(name), tmp_path)
    assert caught.value.code == SERVERS[name][1], caught.value.detail
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir()), "a refused file was left in the spool"


def test_there_are_many_kinds_of_hostile_server() -> None:
    assert len(SERVERS) >= 15
    assert {code for _, code in SERVERS.values()} <= REJECTED.keys()


@pytest.mark.usefixtures("only_our_loopback")
def test_an_honest_file_comes_whole_over_several_connections(server: Server, tmp_path: Path) -> None:
    server.files["x"] = BODY
    found = get(server.url("files/x"), tmp_path)
    assert (found.size, found.sha256) == (SIZE, hashlib.sha256(BODY).hexdigest())
    assert (tmp_path / "file").read_bytes() == BODY
    assert found.connections == 1 + (SIZE - 65536) // 65536 == len(server.requests)


@pytest.mark.usefixtures("only_our_loopback")
@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 131073, SIZE])
def test_every_size_comes_whole(size: int, server: Server, tmp_path: Path) -> None:
    server.files["x"] = BODY[:size]
    assert get(server.url("files/x"), tmp_path).sha256 == hashlib.sha256(BODY[:size]).hexdigest()


@pytest.mark.usefixtures("only_our_loopback")
def test_a_passing_fault_is_tried_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flaky(request: object) -> None:
        if request.times == 2:  # type: ignore[attr-defined]
            request.answer("200 OK", "Content-Length: 4", body=b"good")  # type: ignore[attr-defined]

    monkeypatch.setitem(SERVERS, "flaky", (flaky, ""))
    assert get(server.url("flaky"), tmp_path, QUICK._replace(attempts=2)).size == 4


@pytest.mark.usefixtures("only_our_loopback")
def test_the_whole_fetch_has_a_deadline(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steady(request: object) -> None:
        request.answer("200 OK", f"Content-Length: {SIZE}")  # type: ignore[attr-defined]
        for i in range(100):
            request.send(BODY[i * 100 : i * 100 + 100])  # type: ignore[attr-defined]
            server.closing.wait(0.02)

    monkeypatch.setitem(SERVERS, "steady", (steady, ""))
    with pytest.raises(Refusal) as caught:
        get(server.url("steady"), tmp_path, QUICK._replace(timeout_s=0.5, stall_s=0.4))
    assert caught.value.code in ("fetch_timeout", "stalled")


@pytest.mark.usefixtures("only_our_loopback")
def test_a_server_that_is_slow_but_fair_is_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fair(request: object) -> None:
        request.answer("200 OK", "Content-Length: 16000")  # type: ignore[attr-defined]
        for _ in range(4):
            server.closing.wait(0.4)  # less than stall_s, more than one wait for the socket; all together more
            request.send(BODY[:4000])  # type: ignore[attr-defined]

    monkeypatch.setitem(SERVERS, "fair", (fair, ""))
    assert get(server.url("fair"), tmp_path).size == 16000


@pytest.mark.usefixtures("only_our_loopback")
def test_cancelling_ends_a_fetch_at_once_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    began = time.monotonic()
    with pytest.raises(CancelledFetch):
        fetch(
            server.url("stops_in_the_middle"),
            tmp_path / "file",
            QUICK._replace(stall_s=30, timeout_s=60),
            SafeConnector(SubmitSettings(allow_http=True)),
            cancelled=cancelled,
        )
    assert time.monotonic() - began < 2
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("only_our_loopback")
def test_a_spool_that_cannot_be_written_is_our_fault(server: Server, tmp_path: Path) -> None:
    server.files["x"] = BODY
    with pytest.raises(Failure) as caught:
        get(server.url("files/x"), tmp_path / "missing")
    assert caught.value.code == "spool_error"


def test_a_closed_port_is_unreachable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Refusal) as caught:
        get(
            f"http://127.0.0.1:{port}/x",
            tmp_path,
            connector=SafeConnector(SubmitSettings(allow_http=True, allow_private_urls=True)),
        )
    assert caught.value.code == "unreachable"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Name -> the answers that a scripted DNS gives, one list of addresses a question."""
    answers: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        if host not in answers:
            return real(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
        if not answers[host]:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        found = answers[host].pop(0)
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "168.63.129.16", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1",
     "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::", "fec0::1"],
)  # fmt: skip
def test_a_name_that_leads_inside_is_refused(
    address: str, resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    for answer in ([address], ["93.184.216.34", address]):
        resolver["miner.example.com"] = [answer]
        with pytest.raises(Refusal) as caught:
            get("http://miner.example.com/x", tmp_path)
        assert caught.value.code == "forbidden_address"


def test_a_name_that_does_not_resolve_is_unreachable(resolver: dict[str, list[list[str]]], tmp_path: Path) -> None:
    resolver["miner.example.com"] = []
    with pytest.raises(Refusal) as caught:
        get("http://miner.example.com/x", tmp_path)
    assert caught.value.code == "unreachable"


@pytest.mark.usefixtures("only_our_loopback")
def test_a_name_is_resolved_once_and_that_address_used_for_every_range(
    server: Server, resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    server.files["x"] = BODY
    resolver["miner.example.com"] = [["127.0.0.1"], ["10.0.0.1"]]  # a second question would be answered otherwise
    found = get(f"http://miner.example.com:{server.port}/files/x", tmp_path)
    assert found.connections > 1
    assert resolver["miner.example.com"] == [["10.0.0.1"]]


CERTIFICATE = Path(__file__).with_name("miner.example.com.pem")


def serve_tls(names: list[str | None]) -> int:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            for _ in range(2):
                connection, _ = listener.accept()
                try:
                    with context.wrap_socket(connection, server_side=True) as secure:
                        secure.recv(65536)
                        secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
                except OSError:
                    pass

    threading.Thread(target=run, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.usefixtures("only_our_loopback")
def test_tls_checks_the_name_of_the_url_not_the_address(resolver: dict[str, list[list[str]]], tmp_path: Path) -> None:
    names: list[str | None] = []
    port = serve_tls(names)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    resolver["miner.example.com"] = [["127.0.0.1"]]
    resolver["other.example.com"] = [["127.0.0.1"]]
    connector = SafeConnector(SubmitSettings(), trusting)
    assert get(f"https://miner.example.com:{port}/x", tmp_path, connector=connector).size == 4
    assert names == ["miner.example.com"]
    with pytest.raises(Refusal) as caught:
        get(f"https://other.example.com:{port}/y", tmp_path / "..", connector=connector)
    assert caught.value.code == "unreachable"


@pytest.mark.usefixtures("only_our_loopback")
def test_a_certificate_nobody_signed_is_unreachable(resolver: dict[str, list[list[str]]], tmp_path: Path) -> None:
    port = serve_tls([])
    resolver["miner.example.com"] = [["127.0.0.1"]]
    with pytest.raises(Refusal) as caught:
        get(f"https://miner.example.com:{port}/x", tmp_path, connector=SafeConnector(SubmitSettings()))
    assert caught.value.code == "unreachable"


def test_plain_http_is_refused_unless_allowed() -> None:
    with pytest.raises(Refusal) as caught:
        parse_url("http://miner.example.com/x", SubmitSettings())
    assert caught.value.code == "forbidden_url"
    target = parse_url("http://miner.example.com:8080/x?y=1", SubmitSettings(allow_http=True))
    assert (target.origin.authority, target.path) == ("miner.example.com:8080", "/x?y=1")


def test_an_address_that_answers_nothing_costs_a_moment(
    server: Server, resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    """The second of the checked addresses is tried while the first is silent, and used for the later ranges."""
    server.files["x"] = BODY
    with silent_port("127.0.0.2", server.port):
        resolver["miner.example.com"] = [["127.0.0.2", "127.0.0.1"]]
        connector = SafeConnector(SubmitSettings(allow_http=True, allow_private_urls=True))
        found = get(f"http://miner.example.com:{server.port}/files/x", tmp_path, connector=connector)
    assert found.connections > 1
    assert found.sha256 == hashlib.sha256(BODY).hexdigest()


def test_the_host_field_brackets_ipv6_and_drops_default_ports() -> None:
    origin = parse_url("https://[2606:2800:220:1::1]/x", SubmitSettings()).origin
    assert (origin.authority, origin.host, origin.port) == ("[2606:2800:220:1::1]", "2606:2800:220:1::1", 443)
    assert str(origin) == "https://[2606:2800:220:1::1]"


def test_no_descriptor_is_left_open(server: Server, tmp_path: Path) -> None:
    connector = SafeConnector(SubmitSettings(allow_http=True, allow_private_urls=True))
    server.files["x"] = BODY
    get(server.url("files/x"), tmp_path, connector=connector)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(Refusal):
            get(server.url("ends_early"), tmp_path / "..", connector=connector)
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        pass  # the server's own side closes in its threads
    assert len(os.listdir("/proc/self/fd")) <= before
