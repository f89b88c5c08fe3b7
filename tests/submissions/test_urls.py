"""Checkpoint URLs: one spelling, public places only, and nothing that two URL readers could take differently."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.config import SubmitSettings
from bzstream.submissions.urls import InvalidUrl, check_url, is_public_address

RULES = SubmitSettings()
OPEN = SubmitSettings(allow_http=True, allow_private_urls=True)


def code(url: str, rules: SubmitSettings = RULES) -> str:
    with pytest.raises(InvalidUrl) as caught:
        check_url(url, rules)
    return caught.value.code


@pytest.mark.parametrize(
    "url",
    [
        "https://miner-server.example.com/checkpoint_500_12345.pt",
        "HTTPS://Miner.Example/A%20b/?X-Amz-Signature=ab%2Fcd&e=~(1)!'*",
        "https://my_bucket.s3.eu-central-1.amazonaws.com/key",
        "https://example.com",
        "https://example.com?x",
        "https://example.com./x",
        "https://example.com:8443/x",
        "https://r3---sn-4g5e.example.com/x",
        "https://xn--mnchen-3ya.example/x",
        "https://93.184.216.34/x",
        "https://1.1.1.1.example/x",
        "https://[2606:2800:220:1:248:1893:25c8:1946]:444/x",
    ],
)
def test_ordinary_urls_are_allowed(url: str) -> None:
    check_url(url, RULES)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com/x", "url_scheme_not_allowed"),
        ("ftp://example.com/x", "url_scheme_not_allowed"),
        ("file:///etc/passwd", "url_scheme_not_allowed"),
        ("gopher://example.com/", "url_scheme_not_allowed"),
        ("https://user@example.com/x", "url_has_credentials"),
        ("https://user:secret@example.com/x", "url_has_credentials"),
        ("https://@example.com/x", "url_has_credentials"),
        ("https://example.com\\@127.0.0.1/x", "url_has_credentials"),
        ("https://example.com/x#", "url_has_fragment"),
        ("https://example.com/x#y", "url_has_fragment"),
        ("https://example.com/" + "x" * 2048, "url_too_long"),
        *(
            (url, "invalid_url")
            for url in [
                *("", "example.com/x", "/x", "//example.com/x", "https:/example.com", "https:example.com", "https://"),
                *("https:///x", "https://:443/x", "https://./x", "https://example..com/x", "https://.example.com/x"),
                *(
                    "https://example.com../x",
                    " https://example.com/x",
                    "https://example.com/x ",
                    "https://exa mple.com/",
                ),
                *(
                    "https://example.com/a b",
                    "https://example.com/\n",
                    "https://example.com/\0",
                    "https://example.com\n",
                ),
                *("https://example.com\t/x", "https://example.com/é", "https://exämple.com/", "https://example.com/%"),
                *(
                    "https://example.com/%zz",
                    "https://example.com/\\x",
                    "https://example.com/[",
                    'https://example.com/"',
                ),
                *("https://example.com:/x", "https://example.com:0/x", "https://example.com:65536/x"),
                *("https://example.com:08443/x", "https://example.com:+443/x", "https://example.com:4４3/x"),
                *("https://example.com:443:443/x", "https://ex%61mple.com/", "https://%6c%6fcalhost/"),
                *(
                    "https://-a.example/",
                    "https://a-.example/",
                    f"https://{'a' * 64}.example/",
                    "https://a.b" + ".c" * 130,
                ),
                *("https://xn--/", "https://xn--a.xn--/", "https://xn--example-.com/", "https://xn--abc-.example/"),
                *("https://2130706433/x", "https://0x7f000001/x", "https://0177.0.0.1/x", "https://127.1/x"),
                *("https://127.0.0.01/x", "https://0x7f.1/x", "https://127.0.0.0x1/x", "https://017700000001/"),
                *(
                    "https://256.1.1.1/",
                    "https://1.2.3.4.5/",
                    "https://1.2.3/",
                    "https://example.1/",
                    "https://1.1.1.1../",
                ),
                *("https://[::1", "https://::1/", "https://[]/", "https://[v1.a]/", "https://[fe80::1%25eth0]/"),
                *("https://[2606:2800::1%eth0]/", "https://[1.2.3.4]/", "https://[::1]a/", "https://[[::1]]/"),
                *("https://１２７.0.0.1/", "https://example。com/", "https://ⓔxample.com/"),
            ]
        ),
    ],
)
def test_other_forms_are_refused_whatever_the_policy(url: str, expected: str) -> None:
    assert code(url) == expected
    if expected != "url_scheme_not_allowed":
        assert code(url, OPEN) == expected


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1.", "127.255.255.255", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
        *("192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.2.1", "203.0.113.9", "224.0.0.1"),
        *("240.0.0.1", "255.255.255.255", "192.88.99.1", "192.0.0.8"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:8.8.8.8]", "[::127.0.0.1]", "[fe80::1]", "[fc00::1]"),
        *(
            "[fd12::1]",
            "[ff02::1]",
            "[64:ff9b::7f00:1]",
            "[64:ff9b:1::1]",
            "[2002:7f00:1::]",
            "[2001::1]",
            "[2001:db8::1]",
        ),
        *("[2001:0:7f00:1::]", "[100::1]", "[fec0::1]", "[3fff::1]", "[5f00::1]"),
        *("localhost", "LOCALHOST", "localhost.", "a.localhost", "miner", "miner.local", "metadata.google.internal"),
        *("router.lan", "x.home.arpa", "db.corp", "localhost.localdomain"),
    ],
)
def test_private_places_need_permission(host: str) -> None:
    assert code(f"https://{host}/x") == "url_host_not_public"
    check_url(f"https://{host}/x", OPEN)


def test_http_and_ports_are_settings() -> None:
    check_url("http://example.com/x", OPEN)
    only = SubmitSettings(ports=(443, 8443))
    check_url("https://example.com/x", only)
    check_url("https://example.com:8443/x", only)
    assert code("https://example.com:444/x", only) == "url_port_not_allowed"
    assert code("http://example.com/x", SubmitSettings(ports=(443,), allow_http=True)) == "url_port_not_allowed"


@given(st.text(max_size=80) | st.from_regex(r"https://[a-z0-9.:\[\]@%\\-]{0,40}(/[ -~]*)?", fullmatch=True))
def test_what_is_allowed_reads_alike_elsewhere(url: str) -> None:
    try:
        check_url(url, OPEN)
    except InvalidUrl:
        return
    parts = urlsplit(url)
    assert parts.scheme in ("http", "https")
    assert parts.geturl().lower() == url.lower()
    assert parts.username is None
    assert parts.fragment == ""
    assert parts.hostname
    assert parts.hostname in url.lower()
    assert parts.port is None or 1 <= parts.port <= 65535


@given(st.ip_addresses())
def test_public_is_what_the_library_calls_global_or_stricter(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public_address(str(address)):
        assert address.is_global
        assert not address.is_multicast
    elif isinstance(address, ipaddress.IPv4Address) and address.is_global:
        assert address.is_multicast or address in ipaddress.ip_network("192.0.0.0/24") or "192." in str(address)


def test_no_text_is_a_public_address() -> None:
    assert not any(map(is_public_address, ["", "example.com", "1.2.3", "fe80::1%eth0", "2606:2800::1%1", "1.1.1.1/32"]))
    assert is_public_address("1.1.1.1")
    assert is_public_address("2606:4700:4700::1111")
