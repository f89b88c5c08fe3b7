"""The connection: heads bounded, framing strict, bodies in place; TLS; addresses; what a bench measures."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.client import BadManifest, BadUrl, Unreachable, UsageError, measure
from bzstream.client.address import UnitRef, parse_address
from bzstream.client.manifest import parse_manifest
from bzstream.client.progress import RateMeter
from tests.client.conftest import QUICK, Puller, noise
from tests.client.node import HOTKEY, TOKEN, Node, Seen, Unit


@pytest.mark.parametrize(
    ("url", "text", "authority"),
    [
        ("http://h", "http://h", "h"),
        ("http://h:80/", "http://h", "h"),
        ("https://h:443", "https://h", "h"),
        ("https://H:8443/a/b/", "https://h:8443/a/b", "h:8443"),
        ("http://[::1]:8000", "http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_addresses(url: str, text: str, authority: str) -> None:
    address = parse_address(url)
    assert str(address) == text
    assert address.origin.authority == authority


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_clear_error(text: str) -> None:
    for url in (text, "http://" + text, "https://h/" + text):
        try:
            address = parse_address(url)
        except BadUrl:
            continue
        target = address.prefix + UnitRef("partial", 0).target()
        assert target.isascii()
        assert not set(target + address.origin.authority) & set(" \r\n\t")


def test_targets() -> None:
    assert UnitRef("partial", 3).target() == "/model/partial?format=safetensors"
    assert UnitRef("shared").target("v1") == "/model/shared?format=safetensors&version=v1"
    assert UnitRef("full").target() == "/model/full"
    assert UnitRef("full").target("v1", manifest=True) == "/model/full/manifest?version=v1"


@given(st.binary(max_size=300))
def test_any_bytes_are_a_bad_manifest(raw: bytes) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(raw, UnitRef("partial", 0))


def test_a_manifest_with_a_key_twice_is_refused() -> None:
    with pytest.raises(BadManifest, match="twice"):
        parse_manifest(b'{"unit": "partial", "unit": "full"}', UnitRef("partial", 0))


def test_speed_is_of_the_last_seconds() -> None:
    meter = RateMeter(2.0)
    assert meter.update(0.0, 0) == 0
    assert meter.update(1.0, 100) == 100
    assert meter.update(2.0, 200) == 100
    assert meter.update(5.0, 3200) == 1000


def test_a_node_behind_a_path(node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller) -> None:
    """A reverse proxy that strips its prefix."""
    seen_paths: list[str] = []

    def strip(seen: Seen) -> None:
        seen_paths.append(seen.path)
        seen.target = seen.target.removeprefix("/validators/7")

    node.answer = strip
    pull_quickly(url=node.url + "/validators/7/")
    assert all(path.startswith("/validators/7/model/partial") for path in seen_paths)
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def secure(certificate: Path, payload: bytes) -> Iterator[Node]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with Node({("partial", 0): Unit(payload)}, tls=context) as node:
        yield node


def test_https_is_verified_and_just_as_good(
    secure: Node, certificate: Path, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    with pytest.raises(Unreachable, match="not trusted"):
        pull_quickly(url=secure.url)
    with pytest.raises(Unreachable, match="not trusted"):
        pull_quickly(url=secure.url.replace("127.0.0.1", "localhost"), ca_file=str(certificate / "cert.pem"))
    with pytest.raises(Unreachable, match="cannot be loaded"):
        pull_quickly(url=secure.url, ca_file=os.devnull + "/none")
    assert secure.seen == [], "the token was sent to somebody unverified"
    pull_quickly(url=secure.url, ca_file=str(certificate / "cert.pem"))
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def test_https_survives_lies_too(
    secure: Node, certificate: Path, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    for lie in ("reset", "short", "stall"):
        secure.lie, secure.lies_left = lie, 1
        pull_quickly(url=secure.url, ca_file=str(certificate / "cert.pem"), out=tmp_path / lie)
        assert (tmp_path / lie / "group-0.safetensors").read_bytes() == payload


def test_measuring_a_link(node: Node) -> None:
    sweeps: list[int] = []
    report = measure(
        node.url, group=0, connections=[1, 4], seconds=0.3, hotkey=HOTKEY, token=TOKEN, tuning=QUICK,
        on_sweep=lambda sweep: sweeps.append(sweep.connections),
    )  # fmt: skip
    assert sweeps == [1, 4] == [sweep.connections for sweep in report.sweeps]
    for sweep in report.sweeps:
        assert sweep.rate > 0
        assert 0 < sweep.fairness <= 1
        assert 0 < sweep.first_byte_p50 <= sweep.first_byte_p99
        assert sweep.slowest <= sweep.rate / sweep.connections <= sweep.fastest
    assert 0 < report.range_p50 <= report.range_p99
    node.units["shared", None] = Unit(noise(5000))
    assert measure(
        node.url, connections=[2], seconds=0.1, hotkey=HOTKEY, token=TOKEN, tuning=QUICK
    ).label == "shared"  # fmt: skip
    with pytest.raises(UsageError):
        measure(node.url, connections=[], hotkey=HOTKEY, token=TOKEN)
    with pytest.raises(UsageError):
        measure(node.url, connections=[0], hotkey=HOTKEY, token=TOKEN)
    with pytest.raises(UsageError):
        measure(node.url, seconds=0, hotkey=HOTKEY, token=TOKEN)
