"""The one form that every figure takes: what was measured, of whom, how it spread, what its target is, was it met.

A bench writes with `--json` an object with `rows`, made by `row_of`, and perhaps `missing` (sentences about peers that
are not on this machine), `notes` (text) and `series` (numbers for the plots).

Everything here is pure.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from bzstream.util.statistics import quantile

__all__ = ["Outcome", "Row", "Status", "margin", "ratio_of", "read_outcome", "read_row", "row_of", "unjudged"]

Status = Literal["done", "absent", "failed"]

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_TARGET = re.compile(r"\s*(>=|<=|>|<)\s*([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one bench.

    `median` is in `unit`; `low` and `high` are the extremes of the rounds, None where there was one round. `ratio` is
    the median over that of `peer`. `target` is a sentence such as ">= 1.2", about `ratio` where there is one, else
    about `median`; `met` is None where nothing was asked for.
    """

    bench: str
    name: str
    unit: str
    median: float | None
    subject: str = ""
    low: float | None = None
    high: float | None = None
    peer: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """What a bench says beyond that, as it says it."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one bench. `reason` says why one is absent or failed; `seconds` is what it took in all."""

    bench: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    rows: tuple[Row, ...] = ()
    missing: tuple[str, ...] = ()
    notes: str = ""
    series: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.as_dict() for row in self.rows], "missing": list(self.missing)}


def row_of(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    subject: str = "bzstream",
    peer: str = "",
    ratio: float | None = None,
    target: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A row of one value a round, as it stands in a bench's JSON; `met` follows from `target`."""
    median = quantile(values, 0.5) if values else None
    judged = ratio if ratio is not None else median
    match = _TARGET.match(target)
    met = _COMPARE[match[1]](judged, float(match[2])) if match and judged is not None else None
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    return {
        "name": name, "subject": subject, "unit": unit, "median": median, "low": low, "high": high,
        "peer": peer, "ratio": ratio, "target": target, "met": met, "more": more,
    }  # fmt: skip


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios: the two took turns, so that a slow spell of the machine hits both.

    A round that only one of them finished is left out.
    """
    return quantile([one / other for one, other in zip(ours, theirs, strict=False) if other], 0.5)


def read_row(bench: str, raw: Mapping[str, Any]) -> Row:
    """A row of `row_of`, or one that was in a JSON file, as a `Row`. Raises TypeError for any other member."""
    return Row(**{**raw, "bench": bench})


def read_outcome(bench: str, document: Mapping[str, Any], seconds: float) -> Outcome:
    """What a bench wrote with `--json` as an `Outcome`. Raises KeyError or TypeError for what is not of that form."""
    return Outcome(
        bench,
        "done",
        seconds=seconds,
        rows=tuple(read_row(bench, raw) for raw in document["rows"]),
        missing=tuple(document.get("missing", ())),
        notes=document.get("notes", ""),
        series=document.get("series", {}),
    )


def unjudged(outcome: Outcome) -> Outcome:
    """The same without targets: of a run that is too short to be judged."""
    return replace(outcome, rows=tuple(replace(row, target="", met=None) for row in outcome.rows))


def margin(row: Row) -> float | None:
    """How far a figure lies beyond its target: 1 just meets it, 2 is twice as good, 0.5 half. None without one."""
    match = _TARGET.match(row.target)
    value = row.ratio if row.ratio is not None else row.median
    if match is None or value is None or value <= 0 or float(match[2]) <= 0:
        return None
    return value / float(match[2]) if match[1].startswith(">") else float(match[2]) / value
