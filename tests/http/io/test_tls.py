"""TLS: the same answers, certificates that change while it runs, clients that speak something else."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from bzstream.config import HttpSettings
from bzstream.http import Certificate, Observer, Server, TlsError
from bzstream.http.send.sender import Sender
from tests.http.certificates import FIRST_CERT, FIRST_KEY, SECOND_CERT, SECOND_KEY
from tests.http.support import AUTH, Client, Running, no_descriptor_leak, wait_until

Serve = Callable[..., Running]
FILE = "GET /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n"
PEER = "GET /peer HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n"


@pytest.fixture
def pem(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(FIRST_CERT)
    key.write_text(FIRST_KEY)
    return cert, key


@contextmanager
def secure(server: Running, trusted: str = FIRST_CERT, **options: int) -> Iterator[Client]:
    context = ssl.create_default_context(cadata=trusted)
    with server.connect(**options) as client:
        client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
        yield client


def test_the_same_answers(serve: Serve, pem: tuple[Path, Path]) -> None:
    server = serve(tls_cert=str(pem[0]), tls_key=str(pem[1]))
    content = server.application.content
    with secure(server) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        assert client.socket.version() == "TLSv1.3"
        client.send(PEER)
        assert client.read().body == b'["127.0.0.1","127.0.0.1",true]'
        for _ in range(2):
            client.send(FILE)
            assert client.read().body == content
        client.send(FILE[:-2] + "Range: bytes=5-6,4090-4100000\r\n\r\n" + PEER)
        assert content[4090:4100001] in client.read().body
        assert client.read().status == 200
        client.send("nonsense\n")
        assert client.read().status == 400
        assert client.ends()


def test_a_slow_reader_gets_every_byte(serve: Serve, pem: tuple[Path, Path]) -> None:
    server = serve(tls_cert=str(pem[0]), tls_key=str(pem[1]), parts={"make_sender": partial(Sender, quantum=50_000)})
    with secure(server, receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: server.server.downloads == 1)
        assert client.read().body == server.application.content


def test_who_does_not_speak_tls_is_closed_without_noise(serve: Serve, pem: tuple[Path, Path]) -> None:
    server = serve(tls_cert=str(pem[0]), tls_key=str(pem[1]))
    with no_descriptor_leak():
        for data in (PEER.encode(), b"\x16\x03\x01\x00\x05hello", b"\0" * 1000):
            with server.connect() as client:
                client.send(data)
                wait_until(lambda: server.server.connections == 0)
        with secure(server, receive_buffer=4096) as client:
            client.send(FILE)
            wait_until(lambda: server.server.downloads == 1)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_until(lambda: server.server.connections == 0)
    assert server.observer.errors == []


def test_a_new_certificate_is_in_force_for_new_connections(serve: Serve, pem: tuple[Path, Path]) -> None:
    server = serve(tls_cert=str(pem[0]), tls_key=str(pem[1]))

    def answers(trusted: str) -> bool:
        try:
            with secure(server, trusted) as client:
                client.send(PEER)
                return client.read().status == 200
        except ssl.SSLCertVerificationError:
            return False

    with secure(server) as old:
        pem[0].write_text(SECOND_CERT)
        pem[1].write_text(SECOND_KEY)
        wait_until(lambda: answers(SECOND_CERT))
        old.send(PEER)
        assert old.read().status == 200, "open connections go on"
    pem[1].write_text("no key")
    wait_until(lambda: answers(SECOND_CERT) and bool(server.observer.warnings))
    for _ in range(2):
        assert answers(SECOND_CERT), "the last good one stays"
    (warning,) = server.observer.warnings
    assert "cannot be loaded" in warning
    assert server.observer.errors == [], "a bad file is no bug"


def test_a_new_certificate_is_in_force_within_a_second(pem: tuple[Path, Path]) -> None:
    now, warnings = 0.0, list[str]()
    certificate = Certificate(str(pem[0]), str(pem[1]), clock=lambda: now)
    first = certificate.context(warnings.append)
    pem[0].write_text(SECOND_CERT)
    pem[1].write_text(SECOND_KEY)
    now = 1.0
    second = certificate.context(warnings.append)
    assert second is not first
    pem[0].unlink()
    for later in (2.0, 3.0):
        now = later
        assert certificate.context(warnings.append) is second, "the last good one stays"
    assert len(warnings) == 1


def test_a_certificate_that_cannot_be_used(pem: tuple[Path, Path]) -> None:
    pem[1].write_text(SECOND_KEY)
    for cert, key in ((pem[0], pem[1]), (pem[0], pem[0].parent / "none"), (pem[1], pem[1])):
        with pytest.raises(TlsError, match="cannot be loaded"):
            Certificate(str(cert), str(key))


def test_a_key_without_a_certificate(pem: tuple[Path, Path]) -> None:
    async def make() -> None:
        Server(HttpSettings(tls_key=str(pem[1])), object(), Observer())  # type: ignore[arg-type]

    with pytest.raises(TlsError):
        asyncio.run(make())


def test_suites_without_authenticated_encryption_are_refused(serve: Serve, pem: tuple[Path, Path]) -> None:
    server = serve(tls_cert=str(pem[0]), tls_key=str(pem[1]))
    context = ssl.create_default_context(cadata=FIRST_CERT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    for suites, works in (("ECDHE+AESGCM", True), ("ECDHE+AES:!AESGCM:!AESCCM", False)):
        context.set_ciphers(suites)
        with server.connect() as client:
            if works:
                client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
                client.send(PEER)
                assert client.read().status == 200
            else:
                with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
                    context.wrap_socket(client.socket, server_hostname="localhost")
