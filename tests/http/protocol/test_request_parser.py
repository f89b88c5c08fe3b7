"""Request heads: what is refused, found, split and remembered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.http import HttpError
from bzstream.http.protocol.request_parser import check_head, find_head, parse_head, split_target

GOOD = b"GET / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GOOD, None),
        (b"GET / HTTP/1.0\r\n", None),
        (b"GET / HTTP/1.9\r\nHost: x\r\n", None),
        (b"GET / HTTP/2.0\r\nHost: x\r\n", 505),
        (b"GET / HTTP/0.9\r\n", 505),
        (b"GET / http/1.1\r\nHost: x\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: x\r\n", 400),
        (b"GET /\r\nHost: x\r\n", 400),
        (b"GET / HTTP/1.1\r\n", 400),
        (GOOD + b"Host: x\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n", None),
        (b"GET / HTTP/1.1\r\nHost:\r\n", None),
        (GOOD + b"A: 1\r\n b\r\n", 400),
        (GOOD + b"\tA: 1\r\n", 400),
        (GOOD + b"Content-Length: 5\r\n", None),
        (GOOD + b"Content-Length: 5\r\nContent-Length: 5\r\n", 400),
        (GOOD + b"Content-Length: 5, 5\r\n", 400),
        (GOOD + b"Content-Length: +5\r\n", 400),
        (GOOD + b"Content-Length: -5\r\n", 400),
        (GOOD + b"Content-Length: 0x5\r\n", 400),
        (GOOD + b"Content-Length: 5_0\r\n", 400),
        (GOOD + b"Content-Length:\r\n", 400),
        (GOOD + b"Transfer-Encoding: chunked\r\n", None),
        (GOOD + b"transfer-encoding: CHUNKED\r\n", None),
        (GOOD + b"Transfer-Encoding: gzip, chunked\r\n", 400),
        (GOOD + b"Transfer-Encoding: identity\r\n", 400),
        (GOOD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        (GOOD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 400),
        (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", 400),
        (GOOD + b"A: 1\r\n" * 99, None),
        (GOOD + b"A: 1\r\n" * 100, 431),
    ],
)
def test_the_gate(head: bytes, status: int | None) -> None:
    whole = head + b"\r\n"
    assert find_head(whole, 0) == len(whole)
    if status is None:
        check_head(whole, 100)
    else:
        with pytest.raises(HttpError) as refused:
            check_head(whole, 100)
        assert refused.value.status == status


@given(st.lists(st.integers(1, 40), max_size=8))
def test_a_head_is_found_however_it_comes(cuts: list[int]) -> None:
    whole, scanned = GOOD + b"A: b\r\n\r\nrest", 0
    for seen in [*sorted({min(c, len(whole)) for c in cuts}), len(whole)]:
        end = find_head(whole[:seen], scanned)
        assert end == (len(whole) - 4 if seen >= len(whole) - 4 else -1)
        if end > 0:
            break
        scanned = seen


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\nHost: x", b"GET /\n", b"\x16\x03\x01", b" GET /", b"\n"])
def test_what_can_be_no_head_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(HttpError):
        find_head(data, 0)


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/a?b=c", ("/a", "b=c")),
        ("GET", "//a", ("//a", "")),
        ("GET", "/a?b?c", ("/a", "b?c")),
        ("GET", "http://host:80/a?b", ("/a", "b")),
        ("GET", "HTTPS://host", ("/", "")),
        ("GET", "http://host?x", ("/", "x")),
        ("OPTIONS", "*", ("*", "")),
        ("OPTIONS", "http://host", ("*", "")),
        ("CONNECT", "host:80", ("host:80", "")),
        ("GET", "*", None),
        ("GET", "a", None),
        ("GET", "ftp://host/a", None),
        ("GET", "/a#b", None),
        ("GET", "host:80", None),
    ],
)
def test_targets(method: str, target: str, expected: tuple[str, str] | None) -> None:
    if expected is None:
        with pytest.raises(HttpError):
            split_target(method, target)
    else:
        assert split_target(method, target) == expected


@pytest.mark.parametrize(
    ("version", "fields", "persistent"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: keep-alive\r\n", True),
        (b"1.1", b"Connection: foo, Close\r\n", False),
        (b"1.2", b"", True),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_whether_a_client_goes_on(version: bytes, fields: bytes, persistent: bool) -> None:
    assert parse_head(b"GET / HTTP/" + version + b"\r\nHost: x\r\n" + fields + b"\r\n", 10).persistent is persistent


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        (b"", 0),
        (b"Content-Length: 0\r\n", 0),
        (b"Content-Length: 0017\r\n", 17),
        (b"Content-Length: %b\r\n" % (b"9" * 20), int("9" * 19)),
        (b"Transfer-Encoding: chunked\r\n", None),
    ],
)
def test_how_long_the_body_is(fields: bytes, length: int | None) -> None:
    assert parse_head(b"POST / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n", 10).body_length == length


def test_short_heads_are_remembered_and_refusals_are_not_confused() -> None:
    head = b"GET /remembered HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n"
    assert parse_head(head, 10) is parse_head(bytes(bytearray(head)), 10)
    with pytest.raises(HttpError, match="more than 1 header"):
        parse_head(head, 1)
    long = head[:-2] + b"B: " + b"b" * 2000 + b"\r\n\r\n"
    assert parse_head(long, 10) is not parse_head(long, 10)
    assert parse_head(long, 10).headers.get("b") == "b" * 2000
