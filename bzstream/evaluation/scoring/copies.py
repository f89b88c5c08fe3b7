"""Which of a round's submissions for one group are copies of which. Pure.

Two submissions for one group are copies when their weights are the same bytes, or when the changes they make
to the baseline, a and b, are nearer than `copy_distance`: |a - b| <= d * max(|a|, |b|). The changes have billions of
elements and may lie on two machines, so each submission leaves a *sketch*: a random projection of its change
to `SKETCH` numbers (Charikar's count sketch, its signs drawn by the round's seed, so that no one can hide
a copy from signs not yet known). Sketching is linear, so |sketch(a) - sketch(b)| estimates |a - b| to within a few
percent. Of two copies the one with precedence stays: the time of the submission if its signed `checkpoint_hash` matched
the file, else the time our fetch of it ended; then the submission id, so that there is always an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["SKETCH", "Fingerprint", "are_copies", "copies"]

SKETCH = 1024
"""Numbers in a sketch. The estimate of a distance then has a relative deviation of about sqrt(2 / 1024) = 4 %."""


class Fingerprint(NamedTuple):
    """What one submission leaves behind for the comparison with the others of its group and round."""

    submission_id: str
    hotkey: str
    precedence: float
    """Seconds since the epoch: of the submission if its signed hash matched, else of the end of our fetch."""
    weights: str
    """BLAKE3 over the weights in the published dtype and order, 64 hex digits: equal whatever the file format."""
    sketch: tuple[float, ...]


def are_copies(a: Fingerprint, b: Fingerprint, distance: float) -> bool:
    """Whether two submissions for one group are the same work, by bytes or by distance.

    A distance that is not finite says nothing, so it never makes a copy.
    """
    if a.weights == b.weights:
        return True
    left, right = np.asarray(a.sketch), np.asarray(b.sketch)
    larger = max(float(np.linalg.norm(left)), float(np.linalg.norm(right)))
    apart = float(np.linalg.norm(left - right))
    return math.isfinite(apart) and math.isfinite(larger) and apart <= distance * larger


def copies(candidates: Sequence[Fingerprint], distance: float) -> dict[str, str]:
    """Submission id of each copy -> id of the submission it is a copy of.

    In order of precedence each submission is compared with those that stand; one hotkey cannot copy itself. Commitments
    of one block have equal precedence. Then the hotkey decides, because it is the same on every validator, whereas each
    validator has submission ids of its own.
    """
    standing: list[Fingerprint] = []
    found: dict[str, str] = {}
    for candidate in sorted(candidates, key=lambda each: (each.precedence, each.hotkey)):
        original = next(
            (s for s in standing if s.hotkey != candidate.hotkey and are_copies(s, candidate, distance)), None
        )
        if original is None:
            standing.append(candidate)
        else:
            found[candidate.submission_id] = original.submission_id
    return found
