"""What each submission of a round earns in its group: rule "K". Pure arithmetic over per-token gains, in one order.

A submission is measured by its *gains*: how much more log-probability the model gives to each true token of the round's
windows with half, the whole and double the submitted change than without it. `settle` looks at one group's submissions
in order of precedence and decides three things about each:

1. *Eligible.* The lower confidence bound of its own gain is above a floor, and half its change keeps at least half of
   its gain. Weights that were permuted or flipped in sign lose everything at half the change: they could not be merged
   either. No other submission has any influence on this.
2. *Copy.* Its gains are fitted by least squares with those of earlier submissions, at most two of them together, each
   at its three steps. What the fit leaves unexplained is new; a share of at most `copy_share` of it makes a copy. The
   steps 1/2 and 2 find an original behind a weaker disguise that was sent first.
3. *Pay.* A new submission earns the larger of its marginal gain and `independent_share` of what it would earn alone; a
   copy earns its marginal gain and nothing else. The marginal gain is what the mixture of all probabilities accepted
   so far gains when this submission's are mixed in at the best of `MIXING_WEIGHTS`; at weight 1 it replaces them, so
   that nothing earlier can dilute it.

All gains that are paid are lower confidence bounds over the windows, so luck earns nothing and pay is continuous at
zero. Lower bounds are superadditive: the pieces of one work never earn more than the bound of the whole, in whatever
pieces it is sent, except for what `independent_share` pays to work that looks new.

The thresholds were measured on toy models: disguised copies left at most 0.011 unexplained, independent honest work at
least 0.054. A larger `independent_share` pays honest miners who come later, and every hotkey of somebody who can make
work that looks new at little cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["COPY_SHARE", "GAIN_FLOOR", "MIXING_WEIGHTS", "STEPS", "Gains", "Pay", "lower_bound", "settle"]

STEPS = (0.5, 1.0, 2.0)
"""Multiples of the submitted change at which gains are measured."""
GAIN_FLOOR = 0.001
"""Nats a token: three of 168 random perturbations reached it, the best with 8% of an honest gain."""
COPY_SHARE = 0.03
"""Shares of 0.02 to 0.04 decided alike in every case that was tried."""
MIXING_WEIGHTS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
PAIRED_REFERENCES = 8
"""Earlier submissions that are tried in pairs with every other one: those that explain most alone. Of a mixture of two
works, one explains half or more alone."""

_Z95 = 1.6448536269514722
"""The 95% quantile of the normal distribution."""
_HALF, _WHOLE = STEPS.index(0.5), STEPS.index(1.0)


class Gains(NamedTuple):
    """What was measured of one submission."""

    submission_id: str
    precedence: float
    """Seconds since the epoch; the hotkey decides between equal ones, which is the same for every validator."""
    tokens: NDArray[np.float32]
    """[STEPS, windows, tokens]: the gain of each true token in nats at each step."""
    hotkey: str = ""


class Pay(NamedTuple):
    """What one submission earns, and why."""

    submission_id: str
    own: float
    """Lower bound of its own gain, in nats a token."""
    half_kept: float
    """The share of its gain that half its change keeps."""
    eligible: bool
    alone: float
    """What it would earn if nobody else had sent anything: its marginal gain over the baseline."""
    unexplained: float
    """The share of its gains that no two earlier submissions explain."""
    copy_of: tuple[str, ...]
    """The earlier submissions that explain it, when it is a copy."""
    marginal: float
    """Lower bound of what it adds to the submissions before it."""
    pay: float


def lower_bound(windows: NDArray[np.float64]) -> float:
    """One-sided 95% lower confidence bound of the mean of independent windows; minus infinity when there is none.

    Student's t with n - 1 degrees of freedom, by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    """
    count = len(windows)
    if count < 2 or not np.isfinite(windows).all():
        return -math.inf
    z, freedom = _Z95, count - 1
    quantile = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return float(windows.mean() - quantile * windows.std(ddof=1) / math.sqrt(count))


def settle(
    group: Sequence[Gains], *, independent_share: float, floor: float = GAIN_FLOOR, copy_share: float = COPY_SHARE
) -> list[Pay]:
    """What each of one group's submissions earns, in order of precedence. All have the same windows."""
    references = _References(len(group), group[0].tokens[_WHOLE].size if group else 0)
    accepted: NDArray[np.float64] | None = None
    found: list[Pay] = []
    for each in sorted(group, key=lambda gains: (gains.precedence, gains.hotkey, gains.submission_id)):
        gains = each.tokens.astype(np.float64)
        own, half_kept = lower_bound(gains[_WHOLE].mean(axis=1)), _half_kept(gains)
        if not (np.isfinite(gains).all() and own > floor and half_kept >= 0.5):
            found.append(Pay(each.submission_id, own, half_kept, False, 0.0, 1.0, (), 0.0, 0.0))
            continue
        unexplained, explained_by = references.explain_and_add(each.submission_id, gains, copy_share)
        is_copy = unexplained <= copy_share
        alone, _ = _mix(gains[_WHOLE], None)
        marginal, accepted = _mix(gains[_WHOLE], accepted)
        pay = marginal if is_copy else max(marginal, independent_share * alone)
        copy_of = explained_by if is_copy else ()
        found.append(Pay(each.submission_id, own, half_kept, True, alone, unexplained, copy_of, marginal, pay))
    return found


def _half_kept(gains: NDArray[np.float64]) -> float:
    whole = float(gains[_WHOLE].mean())
    return float(gains[_HALF].mean()) / whole if whole > 0 else 0.0


def _mix(gains: NDArray[np.float64], accepted: NDArray[np.float64] | None) -> tuple[float, NDArray[np.float64] | None]:
    """(lower bound of what mixing these in gains, the mixture after it).

    The mixture is kept as each true token's probability relative to the baseline's; None is the baseline itself.
    """
    before = np.ones_like(gains) if accepted is None else accepted
    ratios = np.exp(np.minimum(gains, 700.0))  # exp(709) is the last that float64 holds
    best, mixture = 0.0, accepted
    for weight in MIXING_WEIGHTS:
        mixed = (1 - weight) * before + weight * ratios
        with np.errstate(divide="ignore"):
            bound = lower_bound(np.log(mixed / before).mean(axis=1))
        if bound > best:
            best, mixture = bound, mixed
    return best, mixture


class _References:
    """The gains of earlier submissions, with the products of all pairs of them: each fit is then a small system."""

    def __init__(self, most: int, tokens: int) -> None:
        """Room for `most` submissions of `tokens` tokens each."""
        rows = len(STEPS) * most
        self._names: list[str] = []
        self._vectors = np.zeros((rows, tokens), np.float32)
        """[step of submission, tokens], each of length 1."""
        self._products = np.zeros((rows, rows))

    def explain_and_add(self, name: str, gains: NDArray[np.float64], enough: float) -> tuple[float, tuple[str, ...]]:
        """(the least share of the whole step's squares that a fit leaves, the submissions of that fit).

        Pairs are tried only while single submissions leave more than `enough`.
        """
        count, steps = len(self._names), len(STEPS)
        here = slice(count * steps, (count + 1) * steps)
        rows = gains.reshape(steps, -1)
        self._vectors[here] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
        products = self._vectors[: here.stop] @ self._vectors[here].T
        self._products[: here.stop, here] = products
        self._products[here, : here.stop] = products.T
        self._names.append(name)
        if count == 0:
            return 1.0, ()
        onto = self._products[: here.start, here.start + _WHOLE]
        alone = self._left(onto, np.arange(count)[:, None])
        least = int(alone.argmin())
        if count == 1 or alone[least] <= enough:
            return float(alone[least]), (self._names[least],)
        likely = np.argsort(alone, kind="stable")[:PAIRED_REFERENCES].tolist()
        pairs = sorted({(min(i, j), max(i, j)) for i in likely for j in range(count) if i != j})
        together = self._left(onto, np.asarray(pairs))
        best = int(together.argmin())
        return float(together[best]), tuple(self._names[i] for i in pairs[best])

    def _left(self, onto: NDArray[np.float64], choices: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each choice of submissions ([choices, submissions of each]) leaves unexplained."""
        steps = len(STEPS)
        rows = (choices[:, :, None] * steps + np.arange(steps)).reshape(len(choices), -1)
        products = self._products[rows[:, :, None], rows[:, None, :]]
        right = onto[rows]
        # The steps of one change are nearly parallel: without the ridge, rounding would decide.
        weights = np.linalg.solve(products + 1e-6 * np.eye(rows.shape[1]), right[..., None])[..., 0]
        fitted = (weights[:, None, :] @ products @ weights[..., None])[:, 0, 0]
        left: NDArray[np.float64] = np.clip(1.0 - 2.0 * (right * weights).sum(axis=1) + fitted, 0.0, 1.0)
        return left
