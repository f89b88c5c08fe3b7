"""From a round's scores to the validator's weights: one documented rule, pure functions over plain values.

    1. What a submission is worth is its pay: what it adds to the submissions before it in its group (docs/scoring.md).
       Only until its group is settled, it is its score. Those worth more than zero count, the best `top_k` of each
       group; of equal ones the one with precedence is the better. Each group in which somebody earns gets the same part
       of the round, and each submission its worth's part of its group's (`weights_of`).
    2. `burn_rate` of the round goes to the burn target; all of it when nobody is worth anything (`with_burn`).
    3. The shares are averaged with those of the round before: alpha * new + (1 - alpha) * old (`smooth`).
    4. When they are sent, a hotkey that is not registered any more gives its share to the burn target; no miner gets
       more than the subnet's limit, the rest goes to the burn target; and where the subnet wants one weight more than
       there are, the burn target gets the smallest one (`fit`).
A round's weights are due once its submit phase is over, as soon as no evaluator works on it any more, at the latest
from the next cycle's commit phase on (what is not scored then never will be in time). They may be sent until the next
round is due.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from bzstream.errors import BzstreamError

__all__ = [
    "RoundWeights",
    "ScoredResult",
    "WeightLimits",
    "WeightsImpossible",
    "WeightsOutcome",
    "fit",
    "smooth",
    "weights_of",
    "with_burn",
]

U16_MAX = 65535
NEGLIGIBLE = 1e-5
"""A share below this is dropped after averaging: as u16, scaled to the largest, it is nothing or next to nothing."""

WeightsOutcome = Literal["due", "sent", "set", "refused", "missed"]
"""due: to be tried (again). sent: signed, and not known to have landed. set: landed, in a final block. refused: the
chain will not take it until something changes. missed: the next round came first."""


class WeightsImpossible(BzstreamError):
    """The subnet's rules cannot be met with the round's weights; nothing was sent."""


class ScoredResult(Protocol):
    """A submission that counts in its round, as the ledger tells it."""

    @property
    def hotkey(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def expert_group(self) -> int: ...
    @property
    def score(self) -> float | None: ...
    @property
    def pay(self) -> float | None:
        """What it contributes; None until its group is settled."""

    @property
    def precedence(self) -> float:
        """When the submission counts as made, in seconds; the earlier wins."""


@dataclass(frozen=True, slots=True)
class RoundWeights:
    """What became of one round's weights."""

    round: int
    shares: Mapping[str, float] = field(default_factory=dict)
    """Hotkey -> share, together 1; empty until they were worked out."""
    outcome: WeightsOutcome = "due"
    reason: str | None = None
    attempts: int = 0
    """How often they were signed."""
    block: int | None = None
    """The head when they were signed last; once they are set, the block that holds them."""


class WeightLimits(NamedTuple):
    """What the subnet demands of weights."""

    min_weights: int = 1
    max_weight: int = U16_MAX
    """Largest part of all that one UID may have, in 65535ths."""
    version_key: int = 0


def weights_of(results: Iterable[ScoredResult], top_k: int) -> dict[str, float]:
    """Hotkey -> weight, the best first; empty when nobody is worth anything."""
    groups: dict[int, list[tuple[float, float, str]]] = {}
    for result in results:
        worth = result.score if result.pay is None else result.pay
        if result.status == "scored" and worth is not None and math.isfinite(worth) and worth > 0:
            groups.setdefault(result.expert_group, []).append((-worth, result.precedence, result.hotkey))
    shares: list[tuple[float, float, str]] = []
    for group in groups.values():
        best = sorted(group)[:top_k]
        # Dividing by the largest first keeps the sum finite, whatever the unit.
        inside = _normal({hotkey: worth / best[0][0] for worth, _, hotkey in best})
        shares += [(-inside[hotkey], at, hotkey) for _, at, hotkey in best if hotkey in inside]
    return _normal({hotkey: -share for share, _, hotkey in sorted(shares)})


def with_burn(shares: Mapping[str, float], target: str | None, rate: float) -> dict[str, float]:
    """The shares with the burn target's part of them. Without a target they stay as they are."""
    if target is None:
        return dict(shares)
    burnt = rate if shares else 1.0
    kept = {hotkey: share * (1 - burnt) for hotkey, share in shares.items()}
    return _normal({**kept, target: kept.get(target, 0.0) + burnt})


def smooth(old: Mapping[str, float], new: Mapping[str, float], alpha: float) -> dict[str, float]:
    """The moving average of shares, the largest first; the new ones where there are no old ones, or no new ones."""
    if alpha >= 1 or not old or not new:
        return dict(new)
    mixed = {hotkey: alpha * new.get(hotkey, 0.0) + (1 - alpha) * old.get(hotkey, 0.0) for hotkey in {**new, **old}}
    kept = {hotkey: share for hotkey, share in mixed.items() if share >= NEGLIGIBLE}
    return _normal(dict(sorted(kept.items(), key=lambda item: (-item[1], item[0]))))


def fit(
    shares: Mapping[str, float], uids: Mapping[str, int], target: str | None, limits: WeightLimits
) -> dict[int, float]:
    """UID -> weight as the subnet takes it. `uids`: hotkey -> UID now. Raises WeightsImpossible."""
    burn = target if target in uids else None
    present = {hotkey: share for hotkey, share in shares.items() if hotkey in uids}
    if burn is not None:
        limit = limits.max_weight / U16_MAX
        capped = {hotkey: min(share, limit) for hotkey, share in present.items() if hotkey != burn}
        present = {**capped, burn: max(0.0, math.fsum(shares.values()) - math.fsum(capped.values()))}
        if present[burn] < 1 / U16_MAX:
            del present[burn]
            if len(present) < limits.min_weights and present:
                present[burn] = max(present.values()) / U16_MAX
    if not present:
        raise WeightsImpossible("none of the hotkeys to be weighted is registered on the subnet")
    if len(present) < limits.min_weights:
        hint = "" if burn is not None else "; set chain.burn to a registered hotkey, or to owner"
        raise WeightsImpossible(
            f"the subnet wants at least {limits.min_weights} weights and this round has {len(present)}{hint}"
        )
    return {uids[hotkey]: share for hotkey, share in present.items()}


def _normal(shares: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(shares.values())
    return {hotkey: share / total for hotkey, share in shares.items() if share / total > 0}
