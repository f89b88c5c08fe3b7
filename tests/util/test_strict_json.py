"""JSON from outside: what is refused, and that reading takes time in proportion to the text."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.util.strict_json import DuplicateKey, JsonError, parse_json, parse_json_object

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(value=values)
def test_what_is_json_is_read_as_the_standard_parser_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text.encode()) == value
        assert parse_json(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' twice"),
        (b'[{"x": {"": 1, "": 2}}]', "the key '' twice"),
        (b"[NaN]", "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b"[1e999]", "beyond every float"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'"\xff"', "not UTF-8"),
        (b"[1,]", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"[" * 65 + b"]" * 65, "more than 64 deep"),
        (b"[" * 1_000_000, "more than 64 deep"),
        (b'{"a":' * 1_000_000, "more than 64 deep"),
    ],
)
def test_what_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(text)


def test_what_only_looks_so_is_taken() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64) is not None
    assert parse_json(json.dumps(["[" * 100, '\\"[[' * 100]), max_depth=1) == ["[" * 100, '\\"[[' * 100]
    assert parse_json(json.dumps([[]] * 1000)) == [[]] * 1000
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]


def test_size_kind_and_own_numbers() -> None:
    with pytest.raises(JsonError, match="larger than 3 bytes"):
        parse_json(b"1234", max_bytes=3)
    with pytest.raises(JsonError, match="not a JSON object"):
        parse_json_object(b"[]")
    assert parse_json_object(b'{"a": 1.5}', parse_float=str) == {"a": "1.5"}
    with pytest.raises(DuplicateKey):
        parse_json_object(b'{"a": 1, "a": 2}')


def test_values_of_pythons_own_writer_are_taken_when_asked_for() -> None:
    found = parse_json(b'{"a": Infinity, "b": [NaN, 1e999], "c": "\\ud800"}', python_values=True)
    assert found["a"] == found["b"][1] == math.inf
    assert math.isnan(found["b"][0])
    assert found["c"] == "\ud800"
    with pytest.raises(DuplicateKey):
        parse_json(b'{"a": 1, "a": 2}', python_values=True)


@pytest.mark.parametrize(
    "piece", [b'"', b'\\"', b'"\\', b"[", b"[]", b'{"', b'"a":', b"\\", b'["\\ud800"],', b"1", b"-", b"e", b" "]
)
def test_time_is_linear_in_the_text(piece: bytes) -> None:
    def cost(count: int) -> float:
        text = b"[" + piece * (count // len(piece))
        times = []
        for _ in range(3):
            began = time.thread_time()
            with pytest.raises(JsonError):
                parse_json(text)
            times.append(time.thread_time() - began)
        return min(times)

    assert cost(1 << 20) < 32 * max(cost(1 << 16), 0.002)  # 16 times the text; a quadratic reader takes 256 times
