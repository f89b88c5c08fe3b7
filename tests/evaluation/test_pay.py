"""Rule K: what submissions of one group earn, on gains made up here. Real files: test_settlement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bzstream.evaluation.scoring.pay import GAIN_FLOOR, STEPS, Gains, Pay, lower_bound, settle
from tests.seeds import seeds

WINDOWS, TOKENS = seeds(32, 64), 31
RHO = 0.25


def pays(group: Sequence[Gains], **options: float) -> dict[str, Pay]:
    return {pay.submission_id: pay for pay in settle(group, **{"independent_share": RHO} | options)}


# ---- Gains made up: at step s a work gains s * first - s^2 * second at each token, most near its step 1 --------------

Work = tuple[NDArray[np.float64], NDArray[np.float64]]


@cache
def works(count: int = 4) -> list[Work]:
    """Independent honest works: a part that all have in common, as they learn one text, and a part of their own."""
    rng = np.random.default_rng(0)
    common = 0.06 + 0.3 * rng.standard_normal((WINDOWS, TOKENS)) * rng.exponential(1, (WINDOWS, TOKENS))
    made = []
    for _ in range(count):
        first = 0.93 * common + 0.35 * common.std() * rng.standard_normal(common.shape)
        made.append((first, first / 2 + 0.05 * first.std() * rng.standard_normal(common.shape)))
    return made


def gains(name: str, at: float, work: Work, *, scale: float = 1.0, noise: float = 0.0, seed: int = 0) -> Gains:
    """A work with `scale` times its change, and noise that differs from token to token, relative to its gains."""
    rng = np.random.default_rng(seed)
    steps = np.stack([scale * step * work[0] - (scale * step) ** 2 * work[1] for step in STEPS])
    steps += noise * steps.std() * rng.standard_normal(steps.shape)
    return Gains(name, at, steps.astype(np.float32))


def mixture(name: str, at: float, one: Gains, other: Gains, share: float) -> Gains:
    return Gains(name, at, (share * one.tokens + (1 - share) * other.tokens).astype(np.float32))


HONEST = st.integers(0, 3)
DISGUISE = st.tuples(st.floats(-9, 9), st.floats(0.5, 1.4), st.floats(0, 0.04), st.integers(0, 1000))
"""(when it was sent, the original at 0; how much of the change; noise; seed)"""


@settings(max_examples=seeds(10, 100))
@given(HONEST, st.lists(DISGUISE, min_size=1, max_size=seeds(8, 20)))
def test_copies_and_their_original_earn_what_the_original_alone_would(work: int, disguises: list[Any]) -> None:
    original = gains("original", 0.0, works()[work])
    copies = [
        gains(f"copy{i}", at, works()[work], scale=scale, noise=noise, seed=seed)
        for i, (at, scale, noise, seed) in enumerate(disguises)
    ]
    alone = pays([original])["original"].pay
    together = pays([original, *copies])
    assert alone > 3 * GAIN_FLOOR
    assert sum(pay.pay for pay in together.values()) <= 1.05 * alone
    assert all(pay.marginal >= 0 for pay in together.values()), "what adds nothing is paid nothing, not less"
    assert sum(not pay.copy_of for pay in together.values() if pay.eligible) == 1, "a copy passed as new"


@given(st.permutations(range(4)), st.floats(0.2, 0.8))
def test_mixtures_of_two_earn_nothing_new(order: list[int], share: float) -> None:
    honest = [gains(f"honest{i}", float(i), works()[w]) for i, w in enumerate(order)]
    mixed = [mixture(f"mixture{i}", 4.0 + i, honest[0], honest[1], share) for i in range(3)]
    before, after = pays(honest), pays([*honest, *mixed])
    assert set(after["mixture0"].copy_of) <= {"honest0", "honest1"}
    half = pays([*honest, mixture("half", 9.0, honest[0], honest[1], 0.5)])["half"]
    assert half.copy_of == ("honest0", "honest1"), "neither explains the half of each alone"
    assert all(after[f"mixture{i}"].copy_of for i in range(3))
    assert sum(pay.pay for pay in after.values()) <= 1.05 * sum(pay.pay for pay in before.values())


@given(st.permutations(range(4)))
def test_independent_work_is_no_copy_and_earns_its_share(order: list[int]) -> None:
    found = pays([gains(f"honest{i}", float(i), works()[work]) for i, work in enumerate(order)])
    for pay in found.values():
        assert pay.eligible
        assert not pay.copy_of
        assert pay.unexplained > 0.05
        alone = pays([gains("alone", 0.0, works()[order[int(pay.submission_id[-1])]])])["alone"]
        assert pay.pay >= RHO * alone.pay
        assert alone.pay == alone.alone == pay.alone >= alone.own > 3 * GAIN_FLOOR


HOSTILE = st.sampled_from(["nan", "inf", "huge", "worse", "permuted", "zero", "minus infinity"])


@given(st.lists(st.tuples(HOSTILE, st.floats(-9, 9)), min_size=1, max_size=6))
def test_what_is_not_eligible_changes_nobody_elses_pay(hostile: list[tuple[str, float]]) -> None:
    honest = [gains(f"honest{i}", float(i), work) for i, work in enumerate(works())]
    forged = []
    for index, (kind, at) in enumerate(hostile):
        tokens = honest[0].tokens.copy()
        match kind:
            case "nan":
                tokens[1, 3, 4] = np.nan
            case "inf":
                tokens[2, 0, 0] = np.inf
            case "minus infinity":
                tokens[:, 5, 5] = -np.inf
            case "huge":
                tokens[1, 0, 0] = 3e38
            case "worse":
                tokens = -tokens
            case "permuted":
                tokens[0] = -0.01
            case "zero":
                tokens[:] = 0
        forged.append(Gains(f"forged{index}", at, tokens))
    alone, together = pays(honest), pays([*honest, *forged])
    assert {name: together[name] for name in alone} == alone
    assert all(together[each.submission_id].pay == 0 for each in forged)
    assert not any(together[each.submission_id].eligible for each in forged)


@given(st.randoms(use_true_random=False))
def test_precedence_decides_and_not_the_order_of_arrival(random: Any) -> None:
    group = [gains(f"honest{i}", float(i % 2), work) for i, work in enumerate(works())]
    mixed = list(group)
    random.shuffle(mixed)
    assert settle(mixed, independent_share=RHO) == settle(group, independent_share=RHO)


def test_luck_earns_nothing() -> None:
    """Perturbations that move the losses as much as training does, and in no direction."""
    rng = np.random.default_rng(3)
    honest = pays([gains("honest", 0.0, works()[0])])["honest"].pay
    total, tries = 0.0, seeds(200, 1000)
    for size in np.geomspace(1e-3, 1.0, tries):
        moved = size * works()[0][0].std() * rng.standard_normal((WINDOWS, TOKENS))
        tokens = np.stack([step * moved - 0.5 * (step * size) ** 2 * 0.05 for step in STEPS])
        total += pays([Gains("random", 0.0, tokens.astype(np.float32))])["random"].pay
    assert total / tries < 0.001 * honest


def test_the_share_of_independent_work_is_for_new_work_alone() -> None:
    group = [gains("first", 0.0, works()[0]), gains("again", 1.0, works()[0]), gains("other", 2.0, works()[1])]
    for share in (0.0, 0.1, 1.0):
        found = pays(group, independent_share=share)
        assert found["again"].pay == found["again"].marginal < 0.05 * found["first"].pay
        assert found["other"].pay == max(found["other"].marginal, share * found["other"].alone)


def test_a_group_without_submissions_and_windows_without_number() -> None:
    assert settle([], independent_share=RHO) == []
    assert lower_bound(np.zeros(0)) == lower_bound(np.zeros(1)) == -math.inf
    single = Gains("one window", 0.0, np.ones((3, 1, 5), np.float32))
    assert not pays([single])["one window"].eligible


@pytest.mark.parametrize(("count", "quantile"), [(4, 2.3534), (8, 1.8946), (32, 1.6955), (64, 1.6694)])
def test_the_lower_bound_is_students(count: int, quantile: float) -> None:
    """Against the table of the t distribution, 95% one-sided, count - 1 degrees of freedom."""
    windows = np.linspace(-1.0, 1.0, count)
    expected = -quantile * windows.std(ddof=1) / math.sqrt(count)
    assert lower_bound(windows) == pytest.approx(expected, rel=0.02)
