"""The rule from scores to weights, and the stubbornness with which they are submitted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.clock import Cycle
from bzstream.chain.weight_setter import RETRY_BLOCKS, WeightSetter
from bzstream.chain.weights import weights_of
from tests.submissions.values import in_loop


@dataclass(frozen=True)
class Result:
    hotkey: str
    status: str = "scored"
    score: float | None = 1.0
    precedence: float = 0.0


SCORES = st.none() | st.floats() | st.just(0.5)
RESULTS = st.lists(
    st.builds(Result, st.uuids().map(str), st.sampled_from(["scored", "rejected", "failed"]), SCORES, st.floats(0, 9)),
    max_size=12,
)


@given(RESULTS, st.integers(1, 5))
def test_weights_are_positive_few_and_sum_to_one(results: list[Result], top_k: int) -> None:
    weights = weights_of(results, top_k)
    assert len(weights) <= top_k
    assert all(weight > 0 for weight in weights.values())
    assert not weights or math.isclose(sum(weights.values()), 1)
    scores = {result.hotkey: result.score for result in results if result.status == "scored"}
    for hotkey in weights:
        assert scores[hotkey] is not None
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert weights_of(list(reversed(results)), top_k) == weights


def test_the_rule_by_example() -> None:
    results = [
        Result("late", score=2.0, precedence=9.0),
        Result("best", score=4.0, precedence=99.0),
        Result("early", score=2.0, precedence=1.0),
        Result("zero", score=0.0),
        Result("copy", "rejected", 8.0),
        Result("crash", "failed", None),
    ]
    assert weights_of(results, 64) == {"best": 0.5, "early": 0.25, "late": 0.25}
    assert weights_of(results, 2) == {"best": 2 / 3, "early": 1 / 3}
    assert weights_of([], 64) == {}


def test_weights_are_due_in_the_cycle_after() -> None:
    cycle = Cycle()
    assert cycle.due_round(419) is None
    assert cycle.due_round(420) == 340
    assert cycle.due_round(12599) == 12100
    assert cycle.due_round(12600) == 12520


@dataclass
class Book:
    """A ledger's memory of one round."""

    results: Sequence[Result]
    confirmed: set[int] = field(default_factory=set)
    asked: list[int] = field(default_factory=list)

    async def scores(self, round_: int, /) -> SimpleNamespace:
        self.asked.append(round_)
        return SimpleNamespace(results=self.results)

    async def weights_are_set(self, round_: int, /) -> bool:
        return round_ in self.confirmed

    async def confirm_weights(self, round_: int, /) -> None:
        self.confirmed.add(round_)


async def drive(setter: WeightSetter, submit: Any, blocks: range) -> None:
    for block in blocks:
        setter.consider(block, submit)
        for _ in range(10):
            await asyncio.sleep(0)
    await setter.close()


@in_loop
async def test_it_is_tried_until_confirmed_and_then_never_again() -> None:
    book, submitted = Book([Result("a")]), []

    async def submit(weights: Mapping[str, float]) -> None:
        submitted.append(dict(weights))
        if len(submitted) < 3:
            raise ConnectionError("the pool is full")

    await drive(WeightSetter(book, Cycle(), 64), submit, range(12600, 12700))
    assert submitted == [{"a": 1.0}] * 3
    assert book.confirmed == {12520}
    await drive(WeightSetter(book, Cycle(), 64), submit, range(12700, 12720))  # a restarted role
    assert len(submitted) == 3


@in_loop
async def test_the_cycles_end_ends_the_trying() -> None:
    book, rounds = Book([Result("a")]), []

    async def submit(_: Mapping[str, float]) -> None:
        rounds.append(book.asked[-1])
        raise ConnectionError

    await drive(WeightSetter(book, Cycle(), 64), submit, range(13010, 13030))
    assert rounds == [12520] * (10 // RETRY_BLOCKS) + [12940] * (10 // RETRY_BLOCKS)


@pytest.mark.parametrize(("block", "tried"), [(12600, False), (12919, False), (12920, True), (13019, True)])
def test_unfinished_rounds_wait_until_the_commit_phase(block: int, tried: bool) -> None:
    submitted: list[Mapping[str, float]] = []

    async def submit(weights: Mapping[str, float]) -> None:
        submitted.append(weights)

    book = Book([Result("a"), Result("b", "evaluating", None)])
    asyncio.run(drive(WeightSetter(book, Cycle(), 64), submit, range(block, block + 1)))
    assert bool(submitted) == tried


@in_loop
async def test_a_round_without_scores_submits_nothing() -> None:
    book = Book([Result("a", "rejected", 0.0)])

    async def submit(_: Mapping[str, float]) -> None:
        raise AssertionError("nothing to submit")

    await drive(WeightSetter(book, Cycle(), 64), submit, range(12600, 12620))
    assert len(book.asked) == 1
