"""Range parsing against an independent model that knows single bytes only."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.protocol.ranges import MAX_RANGES, Span, resolve

SPECS = st.one_of(
    st.tuples(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 40))),
    st.tuples(st.none(), st.integers(0, 40)),
)
GAPS = st.sampled_from([",", ", ", " ,", "\t,\t", ",,", ", ,"])


def write(spec: tuple[int | None, int | None]) -> str:
    first, last = spec
    return f"{'' if first is None else first}-{'' if last is None else last}"


def model(specs: list[tuple[int | None, int | None]], size: int) -> list[set[int]] | str | None:
    """Sets of byte positions, one for each run of touching ranges; None for "ignore"; "416"."""
    if len(specs) > 16 or any(a is not None and b is not None and b < a for a, b in specs):
        return None
    wanted = []
    for first, last in specs:
        if first is None:
            wanted.append({n for n in range(size) if n >= size - (last or 0)})
        else:
            wanted.append({n for n in range(size) if n >= first and (last is None or n <= last)})
    if size == 0 and any(first is None and last for first, last in specs):
        return None
    if not any(wanted):
        return "416"
    every = set().union(*wanted)
    runs: list[set[int]] = []
    for n in sorted(every):
        if runs and n - 1 in runs[-1]:
            runs[-1].add(n)
        else:
            runs.append({n})
    return sorted(runs, key=lambda run: min(i for i, w in enumerate(wanted) if w and w <= run))


@given(st.lists(SPECS, min_size=1, max_size=20), GAPS, st.integers(0, 45), st.sampled_from(["bytes", "Bytes"]))
def test_spans_are_those_of_the_model(
    specs: list[tuple[int | None, int | None]], gap: str, size: int, unit: str
) -> None:
    spans = resolve(f"{unit}=" + gap.join(write(spec) for spec in specs), size)
    expected = model(specs, size)
    if expected is None:
        assert spans is None
    elif expected == "416":
        assert spans == []
    else:
        assert spans is not None
        assert [set(range(span.start, span.stop)) for span in spans] == expected


@given(st.text(alphabet="0123456789-, \tbytes=x", max_size=30), st.integers(0, 50))
def test_whatever_is_written_gives_spans_inside_that_do_not_touch(text: str, size: int) -> None:
    for field in (text, "bytes=" + text):
        spans = resolve(field, size)
        if spans:
            ordered = sorted(spans)
            assert all(0 <= a < b <= size for a, b in spans)
            assert all(x.stop < y.start for x, y in pairwise(ordered))


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("bytes=0-0", [Span(0, 1)]),
        ("bytes=-1", [Span(99, 100)]),
        ("bytes=-1000", [Span(0, 100)]),
        ("bytes=99-", [Span(99, 100)]),
        ("bytes=100-", []),
        ("bytes=-0", []),
        ("bytes=-0,5-5", [Span(5, 6)]),
        ("bytes=50-59,0-9", [Span(50, 60), Span(0, 10)]),
        ("bytes=50-59,0-9,10-49", [Span(0, 60)]),
        ("bytes=0-4,5-9", [Span(0, 10)]),
        ("bytes=,,0-4,", [Span(0, 5)]),
        (f"bytes=0-{'9' * 4000}", [Span(0, 100)]),
        (f"bytes=00000{'0' * 4000}5-6", [Span(5, 7)]),
        (f"bytes={'9' * 4000}-", []),
        ("bytes=5-4", None),
        ("bytes=", None),
        ("bytes=,", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes 0-4", None),
        ("bytes=0 -4", None),
        ("bytes= 0-4", None),
        ("bytes=0-4;x", None),
        ("items=0-4", None),
        ("bytes=0-4-5", None),
        ("bytes=+0-4", None),
        ("bytes=\u0661-4", None),
        ("bytes=" + ",".join(["0-0"] * MAX_RANGES), [Span(0, 1)]),
        ("bytes=" + ",".join(["0-0"] * (MAX_RANGES + 1)), None),
        ("bytes=" + " ," * 5000 + "x", None),
    ],
)
def test_the_grammar(field: str, expected: list[Span] | None) -> None:
    assert resolve(field, 100) == expected
