"""Scores as pure arithmetic: which tokens, what mean, which of two equal submissions came first.

Every validator must reach the same number, so nothing here reads a clock, a file or a device.

*Windows.* The data is one long run of N tokens. It is cut into N // T windows of T tokens that do not overlap; a score
is the mean loss over `count` different ones, drawn by the round's seed: a Fisher-Yates shuffle of the window numbers,
stopped after `count` steps, whose i-th choice is SHA-256(`bzstream-windows-1` ‖ seed ‖ i as 8 bytes little-endian)
read as a little-endian integer, modulo the numbers left. (The bias of that modulo is below 2^-190.) The seed is a block
hash that nobody knew when the submissions closed, so nobody can have trained for the windows.

*Loss.* Cross-entropy alone, in float32, of each token but a window's first, given those before it in the window. Router
losses are no part of it: a submission controls them. The mean is over a fixed number of tokens, count * (T - 1); a
window whose loss is not finite ends the submission instead of leaving the mean, for leaving it out rewards NaN.

*Score.* max(0, baseline - loss), with the baseline from the same windows and the same code.

*Copies.* Two submissions for one group are copies when their weights are the same bytes, or when the changes they make
to the baseline, a and b, are nearer than `copy_distance`: |a - b| <= d * max(|a|, |b|). The changes have billions of
elements and may lie on two machines, so each submission leaves a *sketch*: a random projection of its change
to `SKETCH` numbers (Charikar's count sketch, its signs drawn by the round's seed, so that no one can hide
a copy from signs not yet known). Sketching is linear, so |sketch(a) - sketch(b)| estimates |a - b| to within a few
percent. Of two copies the one with precedence stays: the time of the submission if its signed `checkpoint_hash` matched
the file, else the time our fetch of it ended; then the submission id, so that there is always an answer.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bzstream.evaluation.rejection_codes import EvaluationError

__all__ = [
    "SKETCH",
    "Fingerprint",
    "are_copies",
    "choose_windows",
    "copies",
    "derive",
    "mean_loss",
    "pack_sketch",
    "score",
    "unpack_sketch",
]

SKETCH = 1024
"""Numbers in a sketch. The estimate of a distance then has a relative deviation of about sqrt(2 / 1024) = 4 %."""


def derive(label: str, seed: str, index: int = 0) -> int:
    """A 256-bit number that depends on a label, the round's seed (hex digits, as the chain writes it) and an index."""
    raw = bytes.fromhex(seed.removeprefix("0x"))
    return int.from_bytes(hashlib.sha256(label.encode() + raw + index.to_bytes(8, "little")).digest(), "little")


def choose_windows(seed: str, tokens: int, *, count: int, length: int) -> list[int]:
    """First tokens of `count` different windows of `length` tokens in data of `tokens` tokens, in the order drawn.

    Raises EvaluationError when the data holds fewer windows than that.
    """
    available = tokens // length
    if available < count:
        raise EvaluationError(
            f"the evaluation data has {tokens} tokens, but {count} windows of {length} need {count * length}; "
            "give more data or lower evaluation.windows or evaluation.window_tokens"
        )
    moved: dict[int, int] = {}  # the shuffled list of window numbers, kept only where it differs from 0, 1, 2, ...
    chosen: list[int] = []
    for i in range(count):
        j = i + derive("bzstream-windows-1", seed, i) % (available - i)
        chosen.append(moved.get(j, j) * length)
        moved[j] = moved.get(i, i)
    return chosen


def mean_loss(window_losses: Sequence[float], length: int) -> float | None:
    """Mean cross-entropy per predicted token from each window's summed loss; None when any is not finite.

    `math.fsum` rounds once, so the order of the windows cannot change the last bit.
    """
    if not window_losses or not all(math.isfinite(loss) for loss in window_losses):
        return None
    return math.fsum(window_losses) / (len(window_losses) * (length - 1))


def score(baseline: float, loss: float) -> float:
    """What an improvement is worth: nats per token, never negative."""
    return max(0.0, baseline - loss)


class Fingerprint(NamedTuple):
    """What one submission leaves behind for the comparison with the others of its group and round."""

    submission_id: str
    hotkey: str
    precedence: float
    """Seconds since the epoch: of the submission if its signed hash matched, else of the end of our fetch."""
    weights: str
    """SHA-256 over the weights in the published dtype and order, 64 hex digits: equal whatever the file format."""
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

    In order of precedence each submission is compared with those that stand; one hotkey cannot copy itself.
    """
    standing: list[Fingerprint] = []
    found: dict[str, str] = {}
    for candidate in sorted(candidates, key=lambda each: (each.precedence, each.submission_id)):
        original = next(
            (s for s in standing if s.hotkey != candidate.hotkey and are_copies(s, candidate, distance)), None
        )
        if original is None:
            standing.append(candidate)
        else:
            found[candidate.submission_id] = original.submission_id
    return found


def pack_sketch(sketch: Sequence[float]) -> str:
    """A sketch as text for the ledger: base64 of little-endian float32."""
    return base64.b64encode(np.asarray(sketch, "<f4").tobytes()).decode()


def unpack_sketch(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in np.frombuffer(base64.b64decode(text), "<f4"))
