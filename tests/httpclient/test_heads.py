"""Response heads and chunk framing as pure code: what is accepted, and what any bytes at all cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.httpclient import ProtocolViolation, ResponseHead, parse_content_range
from bzstream.httpclient.chunked import ChunkFraming
from bzstream.httpclient.heads import MAX_HEAD, HeadParser

CPU_S = 0.02
"""Above what a head costs (7 ms for the dearest), far below what one quadratic expression costs (minutes)."""


def parser() -> HeadParser:
    engine = h11.Connection(h11.CLIENT)
    engine.send(h11.Request(method="GET", target="/", headers=[("Host", "h")]))
    engine.send(h11.EndOfMessage())
    return HeadParser(engine)


def parse(data: bytes) -> ResponseHead | None:
    return parser().feed(data)


def cpu_seconds(data: bytes, piece: int) -> float:
    """Processor time of feeding these bytes in pieces; the best of three, as a busy machine only adds."""
    best = 1e9
    for _ in range(3):
        fed = parser()
        began = time.thread_time()
        try:
            for at in range(0, len(data), piece):
                if fed.feed(data[at : at + piece]) is not None:
                    break
        except ProtocolViolation:
            pass
        best = min(best, time.thread_time() - began)
        if best < CPU_S:
            break
    return best


def hostile_heads() -> Iterator[bytes]:
    """The longest head of each repetition of a few bytes that mean something to a parser, in a field, a name and a
    status line, followed by each byte that might make it look back. And a longer one.
    """
    units = [b" ", b"\t", b"a", b"a ", b" \t", b":", b": ", b",", b"1,", b";", b"\x80", b"\x85", b"\xa0", b"\r\n",
             b"\n", b"\r\n ", b"\r\na:", b"a:\r\n", b"a: b\r\n", b"0", b"\r", b"\0", b"\x0b", b"\x0c",
             b"\x1c"]  # fmt: skip
    starts = [b"HTTP/1.1 200 OK\r\nX:", b"HTTP/1.1 200 OK\r\nContent-Length:", b"HTTP/1.1 200 OK\r\nTransfer-Encoding:",
              b"HTTP/1.1 200 OK\r\nConnection: close,", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 ",
              b"HTTP/1.1 ", b""]  # fmt: skip
    ends = [b"", b"\0", b"\x0b", b"\x0c", b"\r", b"\n", b"\x1c", b"x"]
    for start, unit, end in itertools.product(starts, units, ends):
        room = MAX_HEAD - len(start) - len(end) - 4
        yield start + (unit * (room // len(unit))) + end + b"\r\n\r\n"
    yield b"HTTP/1.1 200 OK\r\nX:" + b" " * 65536 + b"\0\r\n\r\n"
    yield b"HTTP/1.1 100 \r\n\r\n" * (MAX_HEAD // 17)
    yield b"HTTP/1.1 103 x\r\n" + b"a:\r\n" * 100 + b"\r\n"


def test_a_head_of_any_bytes_costs_a_bounded_time() -> None:
    worst = max((cpu_seconds(head, 4096), head[:40] + b" ... " + head[-10:]) for head in hostile_heads())
    assert worst[0] < CPU_S, worst
    print(f"{worst[0] * 1e3:.2f} ms: {worst[1]!r}")


@given(
    st.lists(st.sampled_from([b" ", b"\t", b":", b"a", b"\r\n", b"\0", b"\x0b", b"\n", b"\x85", b"1"]), max_size=6),
    st.integers(1, 4096),
)
def test_no_repetition_of_bytes_costs_more(unit: list[bytes], piece: int) -> None:
    whole = b"".join(unit) or b" "
    data = b"HTTP/1.1 200 OK\r\nX: " + whole * (20_000 // len(whole))
    assert cpu_seconds(data + b"\0\r\n\r\n", max(piece, 64)) < CPU_S


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_a_violation(data: bytes) -> None:
    for raw in (data, b"HTTP/1.1 200 OK\r\n" + data + b"\r\n\r\n"):
        try:
            head = parse(raw)
            if head is not None:
                _ = head.persistent, head.encoded, head.chunked, head.content_length, head.get("x")
        except ProtocolViolation:
            pass


def body_framing(head: ResponseHead | None) -> object:
    assert head is not None
    return head.chunked, head.content_length


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 1\n\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \x7f\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"1" * 50 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 129 + b"\r\n",
        b"HTTP/1.1 103 Hint\r\n\r\n" * 9 + b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * MAX_HEAD + b"\r\n\r\n",
    ],
)
def test_what_http_forbids_is_refused(head: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        body_framing(parse(head))


def test_garbage_is_noticed_before_its_head_ends() -> None:
    for start in (b"\x00\x00\x12\x04", b"SSH-2.0", b"HTTP/1.1 200 OK\r\nX: \0", b"HTTP/1.1 200 OK\nX"):
        with pytest.raises(ProtocolViolation):
            parse(start)


@given(st.integers(1, 70))
def test_a_head_is_the_same_in_pieces_of_any_size(piece: int) -> None:
    data = b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 Partial\r\nX: a\tb \xe9\r\nETag: "x"\r\n\r\nbody'
    fed = parser()
    for at in range(0, len(data), piece):
        head = fed.feed(data[at : at + piece])
        if head is not None:
            assert (head.status, head.get("x"), head.get("ETag")) == (206, "a\tb \xe9", '"x"')
            assert (fed.rest + data[at + piece :]) == b"body"
            return
    raise AssertionError("no head was found")


def test_a_field_that_comes_twice_must_say_the_same() -> None:
    head = parse(b"HTTP/1.1 200 OK\r\nETag: a\r\nETag: b\r\nX: 1\r\nX: 1\r\n\r\n")
    assert head is not None
    assert head.get("x") == "1"
    with pytest.raises(ProtocolViolation, match="twice"):
        head.get("etag")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bytes 0-9/10", (0, 10, 10)), ("bytes 5-5/6", (5, 6, 6)), ("bytes 0-10/10", None), ("bytes 5-4/10", None),
        ("bytes 0-9/*", None), ("bytes */10", None), ("Bytes 0-9/10", None), ("bytes 0-9/10 ", None),
        ("bytes ٠-9/10", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_content_range(text: str | None, found: tuple[int, int, int] | None) -> None:
    assert parse_content_range(text) == found


def read_chunks(data: bytes) -> bytes:
    at = 0

    def read_line(limit: int) -> bytes:
        nonlocal at
        end = data.find(b"\r\n", at, at + limit + 2)
        if end < 0:
            raise ProtocolViolation("no line")
        line, at = data[at:end], end + 2
        return line

    framing, found = ChunkFraming(read_line), b""
    while count := framing.available():
        if at + count > len(data):
            raise ProtocolViolation("cut")
        found += data[at : at + count]
        at += count
        framing.took(count)
    return found


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"00A;name=value;x\r\n0123456789\r\n1 \r\nx\r\n0\r\nTrailer: yes\r\n\r\n", b"0123456789x"),
    ],
)
def test_chunks(data: bytes, body: bytes) -> None:
    assert read_chunks(data) == body


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"g\r\n", b"-1\r\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"3\nabc\n0\n\n", b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n", b"1" * 16 + b"\r\n", b"3;a\0\r\nabc\r\n0\r\n\r\n", b"3;a\rb\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"x" * 1100 + b"\r\nabc\r\n0\r\n\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\nX: \0\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 3000 + b"\r\n", b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n",
    ],
)  # fmt: skip
def test_broken_chunks(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        read_chunks(data)


@pytest.mark.parametrize("line", [b"5;" + b" " * 1020 + b"\0", b"5" + b" " * 1020 + b"\0", b"5;" + b"a;" * 510 + b"\0"])
def test_a_chunks_line_costs_a_bounded_time(line: bytes) -> None:
    began = time.thread_time()
    for _ in range(64):
        with pytest.raises(ProtocolViolation):
            ChunkFraming(lambda limit: line).available()
    assert time.thread_time() - began < CPU_S * 2
