"""Last-Modified never lies in the future, and no change is missed by a client that compares dates."""

from __future__ import annotations

import pytest

from bzstream.http.protocol.dates import format_date
from bzstream.http.protocol.messages import Headers, HttpError, Representation, Request
from bzstream.http.protocol.response import select
from bzstream.payload import Payload

NOW = 1_700_000_000
SECOND = NOW + 7201
"""A version that was activated by the right clock, after one that was activated by a clock two hours ahead."""


def ask(modified: int, now: int, *conditions: tuple[str, str]) -> tuple[int, str | None]:
    """Status and Last-Modified."""
    request = Request("GET", "/x", "/x", "", Headers(conditions), "127.0.0.1", "127.0.0.1")
    try:
        prepared = select(request, Representation(Payload((b"abc",)), '"e"', modified), now)
    except HttpError as error:
        return error.status, None
    return prepared.status, dict(prepared.headers).get("Last-Modified")


def test_a_time_in_the_future_is_shown_as_now() -> None:
    assert ask(SECOND, NOW) == (200, format_date(NOW))
    assert ask(SECOND, SECOND + 9) == (200, format_date(SECOND))


@pytest.mark.parametrize("now", [NOW, NOW + 7000, SECOND, SECOND + 9])
def test_a_client_with_the_first_version_gets_the_second(now: int) -> None:
    first = SECOND - 1  # what the client was told while the clock was ahead
    assert ask(SECOND, now, ("if-modified-since", format_date(first)))[0] == 200
    assert ask(SECOND, now, ("if-unmodified-since", format_date(first)))[0] == 412
    assert ask(SECOND, now, ("range", "bytes=0-0"), ("if-range", format_date(first)))[0] == 200


def test_a_client_with_the_second_version_does_not_get_it_again() -> None:
    assert ask(SECOND, SECOND + 9, ("if-modified-since", format_date(SECOND)))[0] == 304
