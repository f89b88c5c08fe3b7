"""From a round's scores to the validator's weights: one documented, pure rule.

    1. Only submissions that were scored above zero count.
    2. The best `top_k` share the weights. Of equal scores the one with precedence is the better: whoever was first.
    3. Each gets its score's part of the sum, so that the weights are positive and sum to 1.
A round's weights are due in the cycle after it, as soon as nobody works on it any more, at the latest from the commit
phase on (what is not scored then never will be in time). They may be submitted until that cycle ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

__all__ = ["Scored", "weights_of"]


class Scored(Protocol):
    """A submission that counts in its round, as the ledger tells it."""

    @property
    def hotkey(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def score(self) -> float | None: ...
    @property
    def precedence(self) -> float:
        """When the submission counts as made, in seconds; the earlier wins."""


def weights_of(results: Iterable[Scored], top_k: int) -> dict[str, float]:
    """Hotkey -> weight, the best first; empty when nobody scored above zero."""
    positive = [
        (result.hotkey, result.score, result.precedence)
        for result in results
        if result.status == "scored" and result.score is not None and math.isfinite(result.score) and result.score > 0
    ]
    positive.sort(key=lambda one: (-one[1], one[2], one[0]))
    best = positive[:top_k]
    # Dividing by the largest first keeps the sum finite, whatever the scores' unit.
    scaled = [(hotkey, score / best[0][1]) for hotkey, score, _ in best]
    total = math.fsum(part for _, part in scaled)
    return {hotkey: part / total for hotkey, part in scaled if part / total > 0}
