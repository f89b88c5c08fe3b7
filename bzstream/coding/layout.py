"""Which bytes of a unit belong to elements of which width: what the encoder needs to know of a safetensors file. Pure.

The decoder needs none of it: a coded chunk says the width of each of its blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bzstream.tensorfile import Head

__all__ = ["Layout", "Span"]

ELEMENT_WIDTH = {"BF16": 2, "F16": 2, "F32": 4}
"""Dtypes with planes of their own. All others, F8 among them, are coded byte by byte."""


class Span(NamedTuple):
    """Bytes [start, end) hold whole elements of `width` bytes."""

    start: int
    end: int
    width: int


class Layout:
    """The spans of one payload, in order and without a gap. Neighbours of one width are one span."""

    def __init__(self, spans: Iterable[Span]) -> None:
        joined: list[Span] = []
        for span in spans:
            if span.start == span.end:
                continue
            if joined and joined[-1].width == span.width:
                joined[-1] = joined[-1]._replace(end=span.end)
            else:
                joined.append(span)
        self._spans = joined
        self._starts = [span.start for span in joined]

    @classmethod
    def of_file(cls, head: Head) -> Layout:
        """The layout of a whole safetensors file: its head, then its tensors."""
        at = head.data_start
        tensors = (Span(at + t.start, at + t.end, ELEMENT_WIDTH.get(t.dtype, 1)) for t in head.tensors)
        return cls((Span(0, at, 1), *tensors))

    @classmethod
    def of_dtype(cls, dtype: str, size: int) -> Layout:
        """The layout of `size` bytes of one dtype."""
        return cls((Span(0, size, ELEMENT_WIDTH.get(dtype, 1)),))

    def between(self, start: int, end: int) -> Iterator[Span]:
        """The spans of bytes [start, end) of the payload, counted from `start`.

        An element that the cut divides is given as bytes. Bytes beyond the layout's end are bytes.
        """
        position = start
        for span in self._spans[max(0, bisect_right(self._starts, start) - 1) :]:
            if span.start >= end:
                break
            if span.end <= position:
                continue
            stop = min(span.end, end)
            first = min(stop, position + (span.start - position) % span.width)
            last = stop - (stop - first) % span.width
            for piece in (Span(position, first, 1), Span(first, last, span.width), Span(last, stop, 1)):
                if piece.start < piece.end:
                    yield Span(piece.start - start, piece.end - start, piece.width)
            position = stop
        if position < end:
            yield Span(position - start, end - start, 1)
