"""Bodies of responses: joined payloads, multipart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.protocol.bodies import Joined, byteranges
from bzstream.http.protocol.ranges import Span
from bzstream.payload import Payload, size_of


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
