"""HTTP dates."""

from __future__ import annotations

import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.protocol.dates import format_date, parse_date

NOW = 1_700_000_000


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
