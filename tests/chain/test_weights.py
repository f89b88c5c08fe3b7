"""The rule from scores to weights, and how the setter goes about it, over a chain and a ledger in memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.clock import Cycle
from bzstream.chain.commitments import RoundCommitments
from bzstream.chain.keys import Key
from bzstream.chain.weight_setter import (
    ERA_BLOCKS,
    REFUSED_RETRY_BLOCKS,
    RETRY_BLOCKS,
    NotingSigner,
    Subnet,
    WeightSetter,
    WeightsRefused,
)
from bzstream.chain.weights import (
    NEGLIGIBLE,
    RoundWeights,
    WeightLimits,
    WeightsImpossible,
    fit,
    smooth,
    weights_of,
    with_burn,
)
from bzstream.config import ChainSettings
from tests.submissions.values import in_loop


@dataclass(frozen=True)
class Result:
    hotkey: str
    status: str = "scored"
    score: float | None = 1.0
    precedence: float = 0.0
    pay: float | None = None
    expert_group: int = 0


SCORES = st.none() | st.floats() | st.just(0.5)
RESULTS = st.lists(
    st.builds(
        Result, st.uuids().map(str), st.sampled_from(["scored", "rejected", "failed"]), SCORES, st.floats(0, 9), SCORES
    ),
    max_size=12,
)
SHARES = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-3, 1), min_size=1).map(
    lambda raw: {hotkey: part / math.fsum(raw.values()) for hotkey, part in raw.items()}
)


@given(RESULTS, st.integers(1, 5))
def test_weights_are_positive_few_and_sum_to_one(results: list[Result], top_k: int) -> None:
    weights = weights_of(results, top_k)
    assert len(weights) <= top_k
    assert all(weight > 0 for weight in weights.values())
    assert not weights or math.isclose(sum(weights.values()), 1)
    scored = {result.hotkey: result for result in results if result.status == "scored"}
    for hotkey in weights:
        worth = scored[hotkey].score if scored[hotkey].pay is None else scored[hotkey].pay
        assert worth is not None
        assert worth > 0
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


def test_pay_counts_once_there_is_one_and_groups_are_paid_alike() -> None:
    results = [
        Result("first", score=4.0, pay=3.0),
        Result("other", score=4.0, pay=1.0),
        Result("clone", score=9.0, pay=0.0),
        Result("small", score=0.01, pay=0.01, expert_group=7),
        Result("nobody", score=5.0, pay=0.0, expert_group=8),
        Result("copy", "rejected", 8.0, pay=8.0, expert_group=9),
    ]
    assert weights_of(results, 64) == pytest.approx({"small": 0.5, "first": 0.375, "other": 0.125})
    assert weights_of(results, 1) == {"first": 0.5, "small": 0.5}
    assert with_burn(weights_of([Result("nobody", pay=0.0)], 64), "x", 0.0) == {"x": 1.0}


def test_burning_by_example() -> None:
    assert with_burn({"a": 0.75, "b": 0.25}, "x", 0.2) == pytest.approx({"a": 0.6, "b": 0.2, "x": 0.2})
    assert with_burn({"a": 0.75, "x": 0.25}, "x", 0.2) == pytest.approx({"a": 0.6, "x": 0.4})
    assert with_burn({}, "x", 0.2) == {"x": 1.0}
    assert with_burn({"a": 1.0}, None, 0.2) == {"a": 1.0}
    assert with_burn({}, None, 0.2) == {}


@given(SHARES, SHARES, st.floats(0.01, 1))
def test_a_moving_average(old: dict[str, float], new: dict[str, float], alpha: float) -> None:
    mixed = smooth(old, new, alpha)
    assert math.isclose(sum(mixed.values()), 1)
    for hotkey in {*old, *new}:
        plain = alpha * new.get(hotkey, 0) + (1 - alpha) * old.get(hotkey, 0)
        assert mixed.get(hotkey, 0) == pytest.approx(plain, abs=10 * NEGLIGIBLE)
    assert smooth({}, new, alpha) == smooth(old, new, 1.0) == new


UIDS = {hotkey: uid for uid, hotkey in enumerate("abcdefghx")}


@given(SHARES, st.integers(1, 9), st.integers(7282, 65535))
def test_limits_are_met_through_the_burn_target(shares: dict[str, float], least: int, most: int) -> None:
    """Nobody but the burn target gets more than the limit, and nothing is lost."""
    if len(shares) + 1 < least:
        with pytest.raises(WeightsImpossible, match=f"at least {least} weights"):
            fit(shares, UIDS, "x", WeightLimits(least, most))
        return
    sent = fit(shares, UIDS, "x", WeightLimits(least, most))
    assert len(sent) >= least
    assert math.isclose(sum(sent.values()), 1, abs_tol=1e-4)
    for hotkey, share in shares.items():
        assert sent[UIDS[hotkey]] == pytest.approx(min(share, most / 65535))


def test_a_hotkey_that_left_gives_its_share_to_the_burn_target() -> None:
    shares = {"a": 0.5, "gone": 0.3, "b": 0.2}
    assert fit(shares, UIDS, "x", WeightLimits()) == pytest.approx({0: 0.5, 1: 0.2, 8: 0.3})
    assert fit(shares, UIDS, None, WeightLimits()) == {0: 0.5, 1: 0.2}
    with pytest.raises(WeightsImpossible, match="none of the hotkeys"):
        fit({"gone": 1.0}, UIDS, None, WeightLimits())
    with pytest.raises(WeightsImpossible, match=r"set chain\.burn"):
        fit({"a": 1.0}, UIDS, None, WeightLimits(2))


def test_weights_are_due_in_the_cycle_after() -> None:
    cycle = Cycle()
    assert cycle.due_round(419) is None
    assert cycle.due_round(420) == 340
    assert cycle.due_round(12599) == 12100
    assert cycle.due_round(12600) == 12520


@dataclass
class Round:
    results: Sequence[Result]
    unfinished: int = 0


@dataclass
class MemoryLedger:
    """A ledger that remembers one round's results and all rounds' weights."""

    round: Round
    kept: dict[int, RoundWeights] = field(default_factory=dict)

    async def scores(self, _: int, /) -> Round:
        return self.round

    async def round_weights(self, round_: int, /) -> RoundWeights | None:
        return self.kept.get(round_)

    async def weights_before(self, round_: int, /) -> RoundWeights | None:
        earlier = [known for known in self.kept if known < round_]
        return self.kept[max(earlier)] if earlier else None

    async def write_round_weights(self, weights: RoundWeights, /) -> None:
        self.kept[weights.round] = weights

    async def write_commitments(self, _: RoundCommitments, /) -> None:
        raise AssertionError("setting weights writes no commitments")


class MemoryChain:
    """A subnet of hotkeys a and b; `answers` says what each attempt meets, the last one again and again."""

    def __init__(self, *answers: Callable[[], int]) -> None:
        self.answers = list(answers)
        self.sent: list[Mapping[int, float]] = []
        self.final = 0
        self.last_update: int | None = 0

    async def subnet(self) -> Subnet:
        return Subnet({"a": 0, "b": 1}, WeightLimits(), None)

    async def settled(self, _: str, /) -> tuple[int, int | None]:
        return self.final, self.last_update

    async def send(self, weights: Mapping[int, float], _: int, signer: NotingSigner, /) -> int:
        await signer.sign(b"")
        self.sent.append(weights)
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()


def lands() -> int:
    return 77


def pool_is_full() -> int:
    raise WeightsRefused("the pool is full", permanent=False)


def no_permit() -> int:
    raise WeightsRefused("NeuronNoValidatorPermit: no permit", permanent=True)


def no_answer() -> int:
    raise ConnectionError("lost")


def setter_of(ledger: MemoryLedger, **settings: object) -> WeightSetter:
    return WeightSetter(ledger, Cycle(), ChainSettings(**settings), Key.from_seed(b"v" * 32))  # type: ignore[arg-type]


async def drive(setter: WeightSetter, chain: MemoryChain, blocks: range, last_update: int | None = None) -> None:
    for block in blocks:
        chain.final = max(0, block - 3)
        setter.consider(block, last_update, chain)
        for _ in range(20):
            await asyncio.sleep(0)
    await setter.close()


@in_loop
async def test_what_passes_is_tried_again_until_it_lands_and_then_never_again() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(pool_is_full, pool_is_full, lands)
    await drive(setter_of(ledger), chain, range(12600, 12700))
    assert chain.sent == [{0: 1.0}] * 3
    assert ledger.kept[12520] == RoundWeights(12520, {"a": 1.0}, "set", None, 3, 77)
    await drive(setter_of(ledger), chain, range(12700, 12720))  # a restarted role
    assert len(chain.sent) == 3


@in_loop
async def test_a_permanent_refusal_is_told_once_and_tried_seldom() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(no_permit)
    with structlog.testing.capture_logs() as logs:
        await drive(setter_of(ledger), chain, range(12600, 12600 + 3 * REFUSED_RETRY_BLOCKS))
    assert len(chain.sent) == 3
    assert ["no permit" in entry["reason"] for entry in logs if entry["log_level"] == "error"] == [True]
    assert (ledger.kept[12520].outcome, ledger.kept[12520].reason) == ("refused", "NeuronNoValidatorPermit: no permit")


@in_loop
async def test_a_refusal_of_one_round_does_not_hold_up_the_next() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(no_permit, lands)
    await drive(setter_of(ledger), chain, range(13010, 13030))
    assert [ledger.kept[round_].outcome for round_ in (12520, 12940)] == ["refused", "set"]


@in_loop
async def test_without_an_answer_the_chain_is_asked_before_another_attempt() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(no_answer, lands)
    await drive(setter_of(ledger), chain, range(12600, 12600 + ERA_BLOCKS))
    assert (len(chain.sent), ledger.kept[12520].outcome) == (1, "sent")
    chain.last_update = 12605  # it landed
    await drive(setter_of(ledger), chain, range(12620, 12700))
    assert len(chain.sent) == 1
    assert (ledger.kept[12520].outcome, ledger.kept[12520].block) == ("set", 12605)


@in_loop
async def test_what_did_not_land_in_its_era_is_sent_again() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(no_answer, lands)
    await drive(setter_of(ledger), chain, range(12600, 12660))
    assert (len(chain.sent), ledger.kept[12520].outcome) == (2, "set")


@in_loop
async def test_an_era_begins_with_the_signature_not_with_the_attempt() -> None:
    """An attempt can take long before it signs: until then the chain goes on."""
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(no_answer, lands)
    setter, asked = setter_of(ledger), asyncio.Event()
    subnet = chain.subnet

    async def slow_subnet() -> Subnet:
        await asked.wait()
        return await subnet()

    chain.subnet = slow_subnet  # type: ignore[method-assign]
    for block in range(12600, 12620):
        setter.consider(block, None, chain)
        await asyncio.sleep(0)
    asked.set()
    while (sent := ledger.kept.get(12520)) is None or sent.outcome != "sent":
        await asyncio.sleep(0)
    assert sent.block == 12619
    await setter.close()


@in_loop
async def test_the_next_round_ends_the_trying_and_the_reason_is_kept() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(pool_is_full)
    await drive(setter_of(ledger), chain, range(13020 - 2 * RETRY_BLOCKS, 13020))
    assert ledger.kept[12520].outcome == "due"
    chain.answers = [lands]
    await drive(setter_of(ledger), chain, range(13020, 13021))
    missed = ledger.kept[12520]
    assert (missed.outcome, missed.reason) == ("missed", "the next round came first; the pool is full")
    assert ledger.kept[12940].outcome == "set"


@pytest.mark.parametrize(("block", "tried"), [(12600, False), (12919, False), (12920, True), (13019, True)])
def test_unfinished_rounds_wait_until_the_commit_phase(block: int, tried: bool) -> None:
    ledger, chain = MemoryLedger(Round([Result("a"), Result("b", "evaluating", None)], 1)), MemoryChain(lands)
    asyncio.run(drive(setter_of(ledger), chain, range(block, block + 1)))
    assert bool(chain.sent) == tried


@in_loop
async def test_nothing_sent_is_never_set() -> None:
    ledger, chain = MemoryLedger(Round([Result("a", "rejected", 0.0)])), MemoryChain(lands)
    await drive(setter_of(ledger), chain, range(12600, 12620))
    assert not chain.sent
    assert ledger.kept[12520].outcome == "refused"
    assert "chain.burn is not set" in str(ledger.kept[12520].reason)


@in_loop
async def test_the_weight_that_nobody_earned_is_burnt() -> None:
    ledger, chain = MemoryLedger(Round([Result("a", "rejected", 0.0)])), MemoryChain(lands)
    await drive(setter_of(ledger, burn="b"), chain, range(12600, 12620))
    assert chain.sent == [{1: 1.0}]


@in_loop
async def test_old_rounds_fade() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(lands)
    ledger.kept[12100] = RoundWeights(12100, {"b": 1.0}, "set", None, 1, 1)
    await drive(setter_of(ledger, weights_alpha=0.25), chain, range(12600, 12620))
    assert chain.sent == [pytest.approx({0: 0.25, 1: 0.75})]


@in_loop
async def test_weights_that_grow_old_are_set_again() -> None:
    ledger, chain = MemoryLedger(Round([Result("a")])), MemoryChain(lands)
    ledger.kept[12520] = RoundWeights(12520, {"a": 1.0}, "set", None, 1, 12600)
    await drive(setter_of(ledger, keep_alive_blocks=100), chain, range(12600, 12699), last_update=12600)
    assert not chain.sent
    chain.last_update = 12690  # the newest metagraph is older than this
    await drive(setter_of(ledger, keep_alive_blocks=100), chain, range(12700, 12701), last_update=12600)
    assert not chain.sent
    chain.last_update = 12600
    await drive(setter_of(ledger, keep_alive_blocks=100), chain, range(12700, 12701), last_update=12600)
    assert len(chain.sent) == 1
