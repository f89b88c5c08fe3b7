"""What a transfer tells about itself while it runs, and what it reports in the end: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bzstream.client.manifest import Manifest

__all__ = ["Progress", "PullReport", "RateMeter", "UnitReport", "unit_report"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of one unit. Bytes are of the payload; `rate` is in bytes a second over the last seconds."""

    label: str
    version: str
    stage: str
    """`comparing` an older file, `fetching`, `hashing` the rest, `saving`."""
    size: int
    present: int
    """Bytes in the destination, verified or not."""
    verified: int
    hashed: int
    """Bytes that the whole file's SHA-256 has seen."""
    fetched: int
    """Bytes that crossed the network for this unit."""
    rate: float
    seconds_left: float | None
    connections: int
    gained: int = 0
    """Bytes that need not cross the network because they came coded."""


@dataclass(frozen=True, slots=True)
class UnitReport:
    """One finished unit. `reused`: bytes that were there already (resumed, or unchanged since an older version)."""

    label: str
    version: str
    block: int
    content_hash: str
    size: int
    fetched: int
    reused: int
    seconds: float
    connections: int
    """The most connections that were used at once."""
    chunks_fetched_again: int
    signed_by: str | None
    """The validator whose signature on the manifest was checked."""
    gained: int = 0
    """Bytes that did not cross the network because they came coded."""
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class PullReport:
    """Everything that one call fetched, all of one version."""

    version: str
    units: tuple[UnitReport, ...] = field(default=())

    @property
    def fetched(self) -> int:
        return sum(unit.fetched for unit in self.units)


def unit_report(
    manifest: Manifest,
    *,
    path: Path | None = None,
    fetched: int = 0,
    seconds: float = 0.0,
    connections: int = 0,
    refetched: int = 0,
    gained: int = 0,
) -> UnitReport:
    """The report of a finished unit; without a transfer everything was there already."""
    return UnitReport(
        label=manifest.unit.label,
        version=manifest.version,
        block=manifest.block,
        content_hash=manifest.content_hash,
        size=manifest.size,
        fetched=fetched,
        reused=max(0, manifest.size - fetched - gained),
        seconds=seconds,
        connections=connections,
        chunks_fetched_again=refetched,
        signed_by=manifest.validator_hotkey if manifest.signed else None,
        gained=gained,
        path=path,
    )


class RateMeter:
    """Bytes a second over a sliding window of moments."""

    def __init__(self, window_s: float = 3.0) -> None:
        self._window = window_s
        self._points: list[tuple[float, int]] = []

    def update(self, now: float, total: int) -> float:
        """Note the total so far; the mean rate over the window."""
        self._points.append((now, total))
        while len(self._points) > 2 and self._points[1][0] <= now - self._window:
            del self._points[0]
        began, first = self._points[0]
        return (total - first) / (now - began) if now > began else 0.0
