"""Conditional requests."""

from __future__ import annotations

import pytest

from bzstream.http import Headers
from bzstream.http.protocol.conditions import evaluate, range_applies
from bzstream.http.protocol.dates import format_date

NOW = 1_700_000_000
TAG = '"a"'
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
