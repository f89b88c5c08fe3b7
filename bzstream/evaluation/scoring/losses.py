"""Scores as pure arithmetic: which tokens, what mean, what improvement.

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
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from bzstream.evaluation.rejection_codes import EvaluationError

__all__ = ["choose_windows", "derive", "mean_loss", "score"]


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
