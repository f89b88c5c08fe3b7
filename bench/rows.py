"""The one shape that every figure takes: what was measured, of whom, how it spread, what was asked for, was it met.

The benches grew up apart, each with a dictionary of its own. They stay as they are; `read_row` knows their spellings
and `read_outcome` takes what one of them wrote with `--json`: a list of rows, or an object with `rows` and beside them
`notes` (text), `missing` (sentences about peers that are not on this machine) and `series` (numbers for the plots).

Everything here is pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

__all__ = ["Outcome", "Row", "Status", "jain", "margin", "quantile", "read_outcome", "read_row", "row_of", "unjudged"]

Status = Literal["done", "absent", "failed"]

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
) -> dict[str, Any]:
    """A row, as the benches write them, of one value a round; `met` follows from `target`."""
    median = quantile(values, 0.5) if values else None
    row: dict[str, Any] = {
        "name": name,
        "subject": subject,
        "unit": unit,
        "median": median,
        "low": min(values) if len(values) > 1 else None,
        "high": max(values) if len(values) > 1 else None,
        "peer": peer,
        "ratio": ratio,
        "target": target,
    }
    return {**row, "met": _met(ratio if ratio is not None else median, target)}


# The spellings of a member, in the order in which they are looked for.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "name": ("name", "what", "case", "label"),
    "unit": ("unit",),
    "median": ("median", "value"),
    "subject": ("subject", "server", "client", "tool"),
    "low": ("low", "min"),
    "high": ("high", "max"),
    "peer": ("peer", "versus", "against"),
    "ratio": ("ratio",),
    "target": ("target",),
    "met": ("met", "ok"),
}


def read_row(bench: str, raw: Mapping[str, Any]) -> Row:
    """A bench's own row as a `Row`. Members that are not understood go to `more`; none is required but a name."""
    left = dict(raw)
    left.pop("bench", None)
    found: dict[str, Any] = {}
    for member, spellings in _SPELLINGS.items():
        for spelling in spellings:
            if spelling in left:
                found[member] = left.pop(spelling)
                break
    spread = left.pop("spread", None)
    if isinstance(spread, Sequence) and len(spread) == 2:
        found["low"], found["high"] = spread
    elif isinstance(spread, Mapping):
        found["low"], found["high"] = spread.get("min"), spread.get("max")
    target = str(found.get("target") or "")
    median, ratio = _number(found.get("median")), _number(found.get("ratio"))
    met = found.get("met")
    if met is None:
        met = _met(ratio if ratio is not None else median, target)
    return Row(
        bench=bench,
        name=str(found.get("name", "")),
        unit=str(found.get("unit") or ""),
        median=median,
        subject=str(found.get("subject") or ""),
        low=_number(found.get("low")),
        high=_number(found.get("high")),
        peer=str(found.get("peer") or ""),
        ratio=ratio,
        target=target,
        # Some benches call a figure without a target met.
        met=bool(met) if target and met is not None else None,
        more={**left.pop("more", {}), **left},
    )


def read_outcome(bench: str, document: Any, seconds: float) -> Outcome:
    """What a bench wrote with `--json` as an `Outcome`. Raises ValueError when it is neither rows nor has them."""
    if isinstance(document, Sequence) and not isinstance(document, str):
        document = {"rows": document}
    rows = document.get("rows") if isinstance(document, Mapping) else None
    if not isinstance(document, Mapping) or not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError("it wrote neither a list of rows nor an object with one")
    missing = document.get("missing") or ()
    return Outcome(
        bench,
        "done",
        seconds=seconds,
        rows=tuple(read_row(bench, raw) for raw in rows),
        missing=tuple(map(str, missing.items() if isinstance(missing, Mapping) else missing)),
        notes=str(document.get("notes") or ""),
        series=dict(document.get("series") or {}),
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


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, between neighbours in proportion. Raises ValueError for none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all got the same, 1/n when one got everything.

    R. Jain, D. Chiu, W. Hawe: A Quantitative Measure of Fairness, DEC TR-301, 1984. Nothing for anybody counts as fair.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def _met(value: float | None, target: str) -> bool | None:
    match = _TARGET.match(target)
    if match is None or value is None:
        return None
    bound = float(match[2])
    return {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[match[1]]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
