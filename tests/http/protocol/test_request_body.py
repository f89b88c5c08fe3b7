"""Request bodies of both framings."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.http import HttpError
from bzstream.http.protocol.request_body import FRAMING_BYTES, ChunkedBody, RequestBody, SizedBody

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
