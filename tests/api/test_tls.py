"""TLS through the whole node: `serve --tls-cert --tls-key`, for curl, for Python's ssl, and for who speaks no TLS."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.conftest import beside
from tests.api.contract import parse_multipart
from tests.api.desk import troubles
from tests.http.certificates import FIRST_CERT, FIRST_KEY, SECOND_CERT, SECOND_KEY
from tests.nodes import Node, eventually, refused, running_node

IN_FORCE_S = 1.0
ANYWHERE = ("--host", "0.0.0.0")
BARE = "/model/partial?format=safetensors"


def write_pem(place: Path, cert: str = FIRST_CERT, key: str = FIRST_KEY) -> tuple[str, ...]:
    """The certificate and its key as files; the flags that name them."""
    (place / "cert.pem").write_text(cert)
    (place / "key.pem").write_text(key)
    return "--tls-cert", str(place / "cert.pem"), "--tls-key", str(place / "key.pem")


@pytest.fixture(scope="module")
def secure(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Two workers that speak TLS, on the session's store and every address."""
    place = beside(node, tmp_path_factory.mktemp("tls"))
    with running_node(place, *write_pem(place), *ANYWHERE, "--workers", "2", trusted=FIRST_CERT) as running:
        yield running
        assert troubles(running) == []


def test_the_same_bytes_as_in_clear(node: Node, secure: Node) -> None:
    # The node is up with its first worker; the other hears of the chain in its own time.
    eventually(lambda: secure.health()["status"] == "healthy", "a worker that answers over TLS is healthy")
    for path, headers, in_clear in (
        ("/model/partial", secure.headers(0), node.headers(0)),
        ("/model/shared?format=safetensors", secure.headers(), node.headers()),
        ("/model/full", secure.as_validator(), node.as_validator()),
    ):
        plain, answer = node.get(path, in_clear), secure.get(path, headers)
        assert (answer.status, answer.headers["ETag"]) == (200, plain.headers["ETag"])
        assert answer.body == plain.body
    whole = secure.get("/model/partial", secure.headers(0)).body
    size = len(whole)
    for asked, start, stop in (("5-", 5, size), ("4095-2000000", 4095, 2_000_001), ("-7", size - 7, size)):
        part = secure.get("/model/partial", {**secure.headers(0), "Range": f"bytes={asked}"})
        assert (part.status, part.headers["Content-Range"]) == (206, f"bytes {start}-{stop - 1}/{size}")
        assert part.body == whole[start:stop]
    several = secure.get("/model/partial", {**secure.headers(0), "Range": "bytes=0-9,1000000-3000000"})
    parts = parse_multipart(several.headers["Content-Type"], several.body)
    assert [body for _, body in parts] == [whole[:10], whole[1_000_000:3_000_001]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_resumes(secure: Node, tmp_path: Path) -> None:
    out = tmp_path / "group-0.safetensors"
    headers = [part for name, value in secure.headers(0).items() for part in ("-H", f"{name}: {value}")]
    trust = ["--cacert", str(secure.folder / "cert.pem"), "--resolve", f"localhost:{secure.port}:127.0.0.1"]
    command = ["curl", "-sS", "-f", "-C", "-", "-o", str(out), *trust, *headers, secure.url + BARE]
    first = subprocess.Popen([*command, "--limit-rate", "4M"])
    eventually(lambda: out.exists() and out.stat().st_size > 1 << 20, "curl has some of it")
    first.kill()
    first.wait()
    had, head = out.stat().st_size, secure.request("HEAD", BARE, secure.headers(0))
    assert had < int(head.headers["Content-Length"]), "it was killed before it was done"
    seen = len(secure.log())
    subprocess.run(command, check=True, timeout=60)
    assert f"sha256:{hashlib.sha256(out.read_bytes()).hexdigest()}" == head.headers["X-Content-Hash"]
    eventually(lambda: re.search(r"method=GET.*status=206", secure.log()[seen:]), "only the rest was fetched")


def test_who_speaks_no_tls_is_closed(secure: Node) -> None:
    for data in (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\0" * 1000):
        with socket.create_connection(("127.0.0.1", secure.port), timeout=20) as client:
            client.sendall(data)
            received = b""
            try:
                while piece := client.recv(4096):
                    received += piece
            except ConnectionResetError:
                pass
            assert b"HTTP/1" not in received, "a TLS alert at the most"
    assert secure.health()["status"] == "healthy"
    assert troubles(secure) == []


def test_a_new_certificate_is_in_force_within_a_second(place: Path) -> None:
    with running_node(place, *write_pem(place), trusted=FIRST_CERT) as node:
        with node.connect() as old:
            node.trusted = SECOND_CERT
            write_pem(place, SECOND_CERT, SECOND_KEY)
            eventually(lambda: healthy(node), "the new certificate", IN_FORCE_S)
            old.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert old.recv(4096).startswith(b"HTTP/1.1 200"), "open connections keep what they began with"
        write_pem(place, SECOND_CERT, "no key")

        def warned() -> bool:
            assert healthy(node), "the last good one stays"
            return "cannot be loaded" in node.log()

        eventually(warned, "the warning", IN_FORCE_S)
        for _ in range(3):
            assert healthy(node)
        assert node.log().count("cannot be loaded") == 1
        node.trusted = FIRST_CERT
        write_pem(place)
        eventually(lambda: healthy(node), "the first one again", IN_FORCE_S)


def healthy(node: Node) -> bool:
    """Whether the node answers with the certificate that is trusted."""
    try:
        return bool(node.health()["status"] == "healthy")
    except ssl.SSLCertVerificationError:
        return False


def test_bound_tokens_cross_a_network_under_tls_alone(secure: Node, place: Path) -> None:
    """A listener on every address is no loopback one, whoever connects."""
    assert secure.get("/model", secure.as_validator()).status == 200
    config = place / "bzstream.toml"
    config.write_text("[auth]\nallow_plaintext_tokens = false\n")
    with running_node(place, *ANYWHERE, "--config", str(config)) as node:
        answer = node.get("/model", node.as_validator())
        assert (answer.status, answer.json["code"]) == (403, "plaintext_token")
        assert node.get("/model", node.headers()).status == 200, "the shared token names nobody"
        config.write_text("[auth]\nallow_plaintext_tokens = true\n")
        node.process.send_signal(signal.SIGHUP)
        eventually(lambda: node.get("/model", node.as_validator()).status == 200, "the owner allows it")


def test_a_download_outlives_sigterm(place: Path) -> None:
    with running_node(place, *write_pem(place), trusted=FIRST_CERT) as node:
        whole = node.get("/model/partial", node.headers(0)).body
        with node.connect() as client:
            fields = "".join(f"{name}: {value}\r\n" for name, value in node.headers(0).items())
            client.sendall(f"GET /model/partial HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
            received = client.recv(4096)
            node.process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(node.port), "new connections are refused")
            while piece := client.recv(1 << 20):
                received += piece
        assert received.partition(b"\r\n\r\n")[2] == whole
        assert node.process.wait(timeout=20) == 0
