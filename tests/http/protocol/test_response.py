"""Heads of responses."""

from __future__ import annotations

import pytest

from bzstream.http.protocol.response import serialise_head


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\n", "a\r", "\0", "\u20ac"])
def test_a_field_that_would_end_the_head_is_not_written(value: str) -> None:
    with pytest.raises(ValueError, match=r"line end|latin-1"):
        serialise_head(200, (("X", value),))


def test_a_responses_head() -> None:
    assert serialise_head(404, (("A", "1"), ("B", "\xe9"))) == b"HTTP/1.1 404 Not Found\r\nA: 1\r\nB: \xe9\r\n\r\n"
    assert serialise_head(299, ()) == b"HTTP/1.1 299 \r\n\r\n"
