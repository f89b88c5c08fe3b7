"""The Range field (RFC 9110 14): which bytes of a representation were asked for.

    ranges-specifier = range-unit "=" range-set
    range-set        = 1#range-spec
    range-spec       = int-range / suffix-range            ( "other-range" is for units other than bytes )
    int-range        = first-pos "-" [ last-pos ]
    suffix-range     = "-" suffix-length

A field that does not follow this grammar, or whose last-pos is before its first-pos, is as good as absent (14.2), and
so is one that names more than `MAX_RANGES` ranges: no client needs them, and each costs a part of its own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["MAX_RANGES", "Span", "parse", "resolve"]

MAX_RANGES = 16
"""Ranges of one request as written. aria2c and browsers ask for one, PDF readers for a few; RFC 9110 14.2 warns of
many small ones."""

_SPEC = r"(?:[0-9]+-[0-9]*|-[0-9]+)"
# Possessive quantifiers: the grammar is deterministic, so backing up could only cost a hostile client's victim time.
_FIELD = re.compile(rf"(?i:bytes)=((?:{_SPEC})?+(?:[ \t]*+,[ \t]*+(?:{_SPEC})?+)*+)")
_ONE = re.compile(r"([0-9]*)-([0-9]*)")
_HUGE = 10**19
"""Stands for every number of more than 19 digits: beyond any file, and int() of long text is slow."""


class Span(NamedTuple):
    """The half-open range [start, stop) of byte positions."""

    start: int
    stop: int


def parse(field: str) -> tuple[tuple[int | None, int | None], ...] | None:
    """The (first-pos, last-pos) pairs as written, or None for a field to be ignored.

    A suffix range has first-pos None; an open one last-pos None.
    """
    match = _FIELD.fullmatch(field)
    if match is None:
        return None
    pairs = [(_number(first), _number(last)) for first, last in _ONE.findall(match[1])]
    if not 0 < len(pairs) <= MAX_RANGES:
        return None
    if any(first is not None and last is not None and last < first for first, last in pairs):
        return None
    return tuple(pairs)


def resolve(field: str, size: int) -> list[Span] | None:
    """The spans of a representation of `size` bytes to send, merged where they touch or overlap.

    None: ignore the field, send everything. An empty list: nothing that was asked for exists (416). Spans stand in the
    order in which the first of their ranges was written (RFC 9110 15.3.7.2).
    """
    pairs = parse(field)
    if pairs is None:
        return None
    if size == 0 and any(first is None and last for first, last in pairs):
        return None  # 14.1.2: satisfiable, by the whole of nothing, which no Content-Range can say
    spans: list[Span] = []
    for first, last in pairs:
        span = _clip(first, last, size)
        if span is None:
            continue
        # Spans so far are apart from each other, so one new span swallows some and takes the place of the first.
        touching = [other for other in spans if other.start <= span.stop and span.start <= other.stop]
        if touching:
            place = spans.index(touching[0])
            merged = [span, *touching]
            span = Span(min(s.start for s in merged), max(s.stop for s in merged))
            spans = [other for other in spans if other not in touching]
            spans.insert(place, span)
        else:
            spans.append(span)
    return spans


def _clip(first: int | None, last: int | None, size: int) -> Span | None:
    if first is None:
        assert last is not None
        return Span(max(0, size - last), size) if last and size else None
    if first >= size:
        return None
    return Span(first, size if last is None else min(last + 1, size))


def _number(text: str) -> int | None:
    if not text:
        return None
    digits = text.lstrip("0")
    return _HUGE if len(digits) > 19 else int(digits or "0")
