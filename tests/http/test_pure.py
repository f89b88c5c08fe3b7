"""The parts without I/O: dates, conditions, bodies, routes, peers, deadlines, framing."""

from __future__ import annotations

import email.utils
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.http import Endpoint, Headers, HttpError, Request, Response, Router
from bzstream.http.bodies import Joined, byteranges
from bzstream.http.conditional import evaluate, range_applies
from bzstream.http.dates import format_date, parse_date
from bzstream.http.framing import check_head, find_head, split_target
from bzstream.http.heads import read_head, write_head
from bzstream.http.peers import TrustedProxies, caller_of
from bzstream.http.ranges import Span
from bzstream.http.request_body import FRAMING_BYTES, ChunkedBody, RequestBody, SizedBody
from bzstream.http.wheel import Wheel
from bzstream.payload import Payload, size_of

NOW = 1_700_000_000
TAG = '"a"'


@given(st.integers(0, 253_402_300_799))
def test_dates_go_round_and_agree_with_the_standard_library(seconds: int) -> None:
    text = format_date(seconds)
    assert parse_date(text, NOW) == seconds
    assert text == email.utils.formatdate(seconds, usegmt=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        ("Sun Nov  6 08:49:37 1994", 784111777),
        ("Sunday, 06-Nov-20 08:49:37 GMT", 1604652577),
        ("Sun, 6 Nov 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 24:49:37 GMT", None),
        ("Sun, 31 Nov 1994 08:49:37 GMT", None),
        ("Sun, 00 Nov 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 +0000", None),
        ("784111777", None),
        ("", None),
    ],
)
def test_three_forms_of_dates(text: str, seconds: int | None) -> None:
    assert parse_date(text, NOW) == seconds


BEFORE, AT, AFTER = (format_date(NOW + d) for d in (-100, -50, 50))
MODIFIED = NOW - 50


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"if-match": TAG}, None),
        ({"if-match": "*"}, None),
        ({"if-match": '"b", "a"'}, None),
        ({"if-match": '"b"'}, 412),
        ({"if-match": 'W/"a"'}, 412),
        ({"if-match": "a"}, 412),
        ({"if-match": TAG, "if-unmodified-since": BEFORE}, None),
        ({"if-match": '"b"', "if-none-match": TAG}, 412),
        ({"if-unmodified-since": BEFORE}, 412),
        ({"if-unmodified-since": AT}, None),
        ({"if-unmodified-since": "yesterday"}, None),
        ({"if-none-match": TAG}, 304),
        ({"if-none-match": 'W/"a"'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"x","a"'}, 304),
        ({"if-none-match": '"x , a"'}, None),
        ({"if-none-match": "a"}, None),
        ({"if-none-match": '"b"', "if-modified-since": AFTER}, None),
        ({"if-modified-since": AT}, 304),
        ({"if-modified-since": BEFORE}, None),
        ({"if-modified-since": "nonsense"}, None),
        ({"if-match": TAG, "if-none-match": TAG}, 304),
        ({"if-unmodified-since": AT, "if-modified-since": AT}, 304),
    ],
)
def test_conditions_in_the_order_of_rfc_9110(headers: dict[str, str], expected: int | None) -> None:
    assert evaluate(Headers(list(headers.items())), TAG, MODIFIED, NOW) == expected


@pytest.mark.parametrize(
    ("value", "applies"),
    [(TAG, True), ('"b"', False), ('W/"a"', False), (AT, True), (BEFORE, False), (AFTER, False), ("junk", False)],
)
def test_if_range(value: str, applies: bool) -> None:
    assert range_applies(Headers([("if-range", value)]), TAG, MODIFIED, NOW) == applies
    assert not range_applies(Headers([("if-range", value)] * 2), TAG, MODIFIED, NOW)


def test_a_date_within_its_own_second_is_no_strong_validator() -> None:
    assert not range_applies(Headers([("if-range", format_date(NOW))]), TAG, NOW, NOW)
    assert range_applies(Headers([("if-range", format_date(NOW))]), TAG, NOW, NOW + 1)


@given(st.lists(st.binary(max_size=6), max_size=6))
def test_joined_payloads_read_as_one(pieces: list[bytes]) -> None:
    joined, whole = Joined(tuple(Payload((piece, b"", piece)) for piece in pieces)), b"".join(p + p for p in pieces)
    assert len(joined) == len(whole)
    read, position = b"", 0
    while position < len(joined):
        part = joined.at(position)
        assert isinstance(part, bytes)
        assert size_of(part) > 0
        read, position = read + part, position + len(part)
    assert read == whole
    with pytest.raises(IndexError):
        joined.at(len(whole))


def test_a_multipart_body_is_what_the_rfc_shows() -> None:
    body = byteranges(Payload((b"0123456789",)), [Span(0, 2), Span(5, 6)], "text/x", "B")
    text = b"".join(p if isinstance(p := body.at(i), bytes) else b"?" for i in _starts(body))
    assert text == (
        b"--B\r\nContent-Type: text/x\r\nContent-Range: bytes 0-1/10\r\n\r\n01"
        b"\r\n--B\r\nContent-Type: text/x\r\nContent-Range: bytes 5-5/10\r\n\r\n5\r\n--B--\r\n"
    )


def _starts(body: Joined) -> list[int]:
    starts, position = [], 0
    while position < len(body):
        starts.append(position)
        position += size_of(body.at(position))
    return starts


def request(path: str, method: str = "GET", query: str = "") -> Request:
    return Request(method, path, path, query, Headers([]), "1.2.3.4", "1.2.3.4")


def test_routes() -> None:
    router, endpoint, named = Router(), Endpoint(lambda _: Response(200)), Endpoint(lambda _: Response(201))
    router.add("GET", "/a/b", endpoint)
    router.add("GET", "/a/{id}", named)
    router.add("POST", "/a/b", endpoint)
    assert router.match(request("/a/b")) is endpoint
    assert router.match(request("/a/%62", "HEAD")) is endpoint
    found = request("/a/x%2Fy")
    assert router.match(found) is named
    assert (found.params, found.route) == ({"id": "x/y"}, "/a/{id}")
    for unknown in ("/", "/a", "/a/", "/a/b/", "/a/b/c", "//a/b", "/A/b", "a/b", ""):
        with pytest.raises(HttpError) as refused:
            router.match(request(unknown))
        assert refused.value.status == 404
    with pytest.raises(HttpError) as refused:
        router.match(request("/a/b", "PUT"))
    assert (refused.value.status, refused.value.headers) == (405, (("Allow", "GET, HEAD, POST"),))


def test_query_and_headers() -> None:
    assert request("/", query="a=1&b=%C3%A9&c").query == {"a": "1", "b": "é", "c": ""}
    for bad in ("a=1&a=2", "a=%ff"):
        with pytest.raises(HttpError):
            _ = request("/", query=bad).query
    headers = Headers([("a", "1"), ("b", "2"), ("a", "3")])
    assert (headers.get("B"), headers.get("c"), headers.all("A"), headers.list("a")) == ("2", None, ("1", "3"), "1, 3")
    with pytest.raises(HttpError):
        headers.get("a")


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


@dataclass(eq=False)
class Item:
    deadline: float
    slot: int = 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30), st.sampled_from([0.25, 1.0, 3.0]))
def test_every_deadline_comes_up_once_within_a_tick(moves: list[tuple[int, int]], tick: float) -> None:
    wheel, items, now = Wheel(tick, 100.0), [Item(inf) for _ in range(5)], 100.0
    due_at: dict[int, float] = {}
    for n, (advance, ahead) in enumerate(moves):
        item = items[n % 5]
        item.deadline = now + ahead
        wheel.arm(item)
        now += advance
        for late in wheel.due(now):
            assert isinstance(late, Item)
            assert late.deadline <= now
            due_at[id(late)] = now
            late.deadline = inf
        for other in items:
            assert other.deadline == inf or other.deadline > now - 2 * tick, "a deadline was missed"


def test_a_disarmed_item_is_forgotten() -> None:
    wheel, item = Wheel(1.0, 0.0), Item(5.0)
    wheel.arm(item)
    wheel.disarm(item)
    assert wheel.due(100.0) == []


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
    assert read_head(b"GET / HTTP/" + version + b"\r\nHost: x\r\n" + fields + b"\r\n", 10).persistent is persistent


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
    assert read_head(b"POST / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n", 10).body_length == length


def test_short_heads_are_remembered_and_refusals_are_not_confused() -> None:
    head = b"GET /remembered HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n"
    assert read_head(head, 10) is read_head(bytes(bytearray(head)), 10)
    with pytest.raises(HttpError, match="more than 1 header"):
        read_head(head, 1)
    long = head[:-2] + b"B: " + b"b" * 2000 + b"\r\n\r\n"
    assert read_head(long, 10) is not read_head(long, 10)
    assert read_head(long, 10).headers.get("b") == "b" * 2000


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\n", "a\r", "\0", "\u20ac"])
def test_a_field_that_would_end_the_head_is_not_written(value: str) -> None:
    with pytest.raises(ValueError, match=r"line end|latin-1"):
        write_head(200, (("X", value),))


def test_an_answers_head() -> None:
    assert write_head(404, (("A", "1"), ("B", "\xe9"))) == b"HTTP/1.1 404 Not Found\r\nA: 1\r\nB: \xe9\r\n\r\n"
    assert write_head(299, ()) == b"HTTP/1.1 299 \r\n\r\n"


CHUNKED = b"3\r\nabc\r\n5;ext=1\r\ndefgh\r\n0\r\nTrailer: x\r\n\r\n"


def feed(body: RequestBody, data: bytes) -> bool:
    """Hand bytes to a body until it needs more."""
    done = body.feed(data)
    while body.pending:
        done = body.feed(b"")
    return done


@given(st.lists(st.integers(0, 60), max_size=6), st.sampled_from([b"", b"GET / HTTP/1.1\r\n"]))
def test_a_body_is_read_however_it_comes(cuts: list[int], following: bytes) -> None:
    bodies: list[tuple[RequestBody, bytes]] = [
        (SizedBody(8, keep=True), b"abcdefgh"),
        (ChunkedBody(20, keep=True), CHUNKED),
    ]
    for body, raw in bodies:
        whole = raw + following
        points = [0, *sorted(min(c, len(raw)) for c in cuts), len(whole)]
        done = [feed(body, whole[a:b]) for a, b in pairwise(points) if a < len(raw)]
        assert done[-1]
        assert not any(done[:-1])
        assert bytes(body.content) == b"abcdefgh"
        assert following.endswith(body.leftover)


def test_a_body_that_nobody_reads_is_counted_and_dropped() -> None:
    for body, end in ((SizedBody(8, keep=False), b"defgh"), (ChunkedBody(8, keep=False), b"3\r\nabc\r\n0\r\n\r\n")):
        assert not body.feed(b"abc"[: 3 if end == b"defgh" else 0])
        assert body.feed(end + b"GET")
        assert not body.content
        assert body.leftover == b"GET"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"15\r\n", 413),
        (b"x\r\n", 400),
        (b"3\r\nabcd\r\n", 400),
        (b"3\r\nabc\n", 400),
        (b"3\nabc\r\n", 400),
        (b"0\r\n\n", 400),
        (b"0\r\nTrailer: x\n\n", 400),
        (b"0\r\nTrailer: " + b" " * 15_000 + b"\0\r\n", 400),
        (b"0\r\nTrailer\r\n", 400),
        (b"0\r\nBad name: x\r\n", 400),
        (b"0\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"-3\r\nabc\r\n", 400),
        (b"+3\r\n", 400),
        (b"0x3\r\n", 400),
        (b"3 \r\n", 400),
        (b"\r\n", 400),
        (b"\n", 400),
        (b"ffffffffffffffffffffffff\r\n", 400),
        (b"100000000\r\n", 400),
        (b"ffffffff\r\n", 413),
        (b"5;\r\n", 400),
        (b"5;a=\r\n", 400),
        (b"5;a=b\rc\r\n", 400),
        (b"5;a=\0\r\n", 400),
        (b'5;a="b\r\n', 400),
        (b'5;a="\0"\r\n', 400),
        (b"3;" + b"x" * FRAMING_BYTES, 413),
        (b"0\r\n" + b"A: b\r\n" * (FRAMING_BYTES // 6 + 1), 413),
    ],
)
def test_bodies_that_are_not_chunked_strictly(raw: bytes, status: int) -> None:
    with pytest.raises(HttpError) as refused:
        feed(ChunkedBody(20, keep=True), raw)
    assert refused.value.status == status


@pytest.mark.parametrize("extension", [b";a", b";a=b", b' ; a = "x\\"\ty";b', b";a;a=1"])
def test_extensions_are_dropped(extension: bytes) -> None:
    body = ChunkedBody(20, keep=True)
    assert feed(body, b"0000000000000003" + extension + b"\r\nabc\r\n000" + extension + b"\r\n\r\n")
    assert body.content == b"abc"


def test_small_chunks_are_read_in_bounded_steps_and_up_to_a_bound() -> None:
    body, one, calls = ChunkedBody(65_536, keep=True), b"1\r\nx\r\n", 1
    assert not body.feed(one * 3000)
    while body.pending:
        assert not body.feed(b"")
        calls += 1
    assert len(body.content) == 3000
    assert calls > 20
    with pytest.raises(HttpError) as refused:
        feed(body, one * 300)
    assert refused.value.status == 413
