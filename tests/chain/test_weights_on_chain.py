"""Weights from the ledger to the chain: the chain role as `serve` runs it, the unmodified SDK, a node on loopback.

No method of the SDK is replaced. What arrives is an extrinsic that is decoded and whose signature is checked.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from bzstream.chain.keys import Key
from bzstream.chain.role import run
from bzstream.chain.weights import RoundWeights
from bzstream.cli import command_line
from bzstream.config import ChainSettings
from bzstream.submissions.ledger import AsyncLedger, Ledger
from bzstream.submissions.types import GroupPay
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID, PoolError
from tests.submissions.values import HOTKEYS, ROUND, accepted, candidate, in_loop

VALIDATOR = Key.from_seed(b"v" * 32)
DUE = ROUND + 80
"""First block at which the round's weights may be set."""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path / "symbols.json"))


def scored_round(ledger: Ledger, scores: dict[str, float], round_: int = ROUND) -> None:
    """A finished round: each hotkey's submission with its score, which is also its pay."""
    for hotkey in scores:
        accepted(ledger.accept(candidate(hotkey, round_ + 10, round_=round_)))
    for job in ledger.claim("evaluator", lease_s=60, limit=len(scores)):
        job = ledger.advance(ledger.advance(job, "verifying"), "evaluating")
        job = ledger.advance(job, "scored", score=scores[job.record.hotkey], model_version="step_1000")
        ledger.write_pay(GroupPay(round_, {job.record.submission_id: ("scored", scores[job.record.hotkey])}))


def subnet(node: FakeNode, *, commit_reveal: bool, block: int = DUE) -> None:
    """Our validator at UID 0 and the miners after it, on a subnet that takes weights now."""
    node.block = node.finalized = block
    node.neurons = [(VALIDATOR.ss58_address, True), *((hotkey, False) for hotkey in HOTKEYS)]
    node.chain.set("CommitRevealWeightsEnabled", NETUID, value=commit_reveal)
    node.chain.set("MinAllowedWeights", NETUID, value=1)
    node.chain.set("Tempo", NETUID, value=360)


@asynccontextmanager
async def role(node: FakeNode, where: Path, **changes: object) -> AsyncIterator[AsyncLedger]:
    """The chain role over the ledger, with the wallet that `serve` gives it."""
    wallet = where.parent / "hotkey"
    wallet.write_text((b"v" * 32).hex())
    settings = ChainSettings(endpoint=(node.url,), netuid=NETUID, set_weights=True, **changes)  # type: ignore[arg-type]
    ledger, stop = AsyncLedger.open(where), asyncio.Event()
    running = asyncio.create_task(run(settings, ledger.write_chain_state, stop, ledger=ledger, wallet=str(wallet)))
    try:
        yield ledger
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await running
        ledger.close()


async def outcome(ledger: AsyncLedger, expected: str, round_: int = ROUND) -> RoundWeights:
    """What became of a round's weights, once it is that."""
    async with asyncio.timeout(60):
        while (weights := await ledger.round_weights(round_)) is None or weights.outcome != expected:
            await asyncio.sleep(0.02)
    return weights


@in_loop
async def test_plain_weights_arrive_as_u16(tmp_path: Path) -> None:
    gone = HOTKEYS[-1]
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0, HOTKEYS[1]: 1.0, HOTKEYS[2]: 0.0, gone: 2.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        node.neurons = node.neurons[:-1]
        async with role(node, tmp_path / "ledger") as ledger:
            await node.until(lambda: bool(node.chain.pool))
            await node.mine(DUE + 1)
            await outcome(ledger, "set")
    ((block, extrinsic, error),) = node.chain.included
    assert (block, extrinsic.signer, extrinsic.call, error) == (
        DUE + 1,
        VALIDATOR.ss58_address,
        "set_mechanism_weights",
        None,
    )
    assert extrinsic.arguments["dests"] == [1, 2]
    assert extrinsic.arguments["weights"] == [65535, 21845]
    assert node.chain.weights_of(VALIDATOR.ss58_address) == {HOTKEYS[0]: 65535, HOTKEYS[1]: 21845}


@in_loop
async def test_a_commit_reveal_subnet_gets_one_timelocked_commit(tmp_path: Path) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0, HOTKEYS[1]: 1.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=True)
        async with role(node, tmp_path / "ledger") as ledger:
            await node.until(lambda: bool(node.chain.pool))
            await node.mine(DUE + 1)
            await outcome(ledger, "set")
            await node.mine(DUE + 8)
            await node.mine(DUE + 16)
    assert [error for _, _, error in node.chain.included] == [None]
    (commit,) = node.chain.commits
    assert commit.hotkey == VALIDATOR.ss58_address
    assert commit.arguments["commit_reveal_version"] == 4
    # drand's quicknet gives a round every 3 s since 1692803367; the reveal is due within two epochs of 361 blocks.
    now = (time.time() - 1692803367) / 3
    assert 0 < commit.arguments["reveal_round"] - now < 2 * 361 * 12 / 3
    assert len(commit.arguments["commit"]) > 100


@in_loop
async def test_they_are_those_that_the_command_prints(tmp_path: Path) -> None:
    """Also with a burn rate, a limit for each UID, and a minimum of weights; the owner gets what nobody may have."""
    owner = HOTKEYS[8]
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0, HOTKEYS[1]: 1.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        node.chain.set("SubnetOwnerHotkey", NETUID, value=owner)
        node.chain.set("MinAllowedWeights", NETUID, value=3)
        node.chain.set("WeightsVersionKey", NETUID, value=7)
        async with role(node, tmp_path / "ledger", burn="owner", burn_rate=0.25) as ledger:
            await node.until(lambda: bool(node.chain.pool))
            await node.mine(DUE + 1)
            await outcome(ledger, "set")
    shown = weights_command(tmp_path / "ledger")
    assert shown == pytest.approx({HOTKEYS[0]: 0.5625, HOTKEYS[1]: 0.1875, owner: 0.25})
    held = node.chain.weights_of(VALIDATOR.ss58_address)
    assert {hotkey: round(share / 0.5625 * 65535) for hotkey, share in shown.items()} == held
    assert node.chain.included[0][1].arguments["version_key"] == 7


@in_loop
async def test_limits_of_the_subnet_are_met_through_the_burn_target(tmp_path: Path) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        node.chain.set("MinAllowedWeights", NETUID, value=2)
        node.chain.set("MaxWeightsLimit", NETUID, value=39321)  # 60%
        async with role(node, tmp_path / "ledger", burn=HOTKEYS[5]) as ledger:
            await node.until(lambda: bool(node.chain.pool))
            await node.mine(DUE + 1)
            await outcome(ledger, "set")
    assert node.chain.weights_of(VALIDATOR.ss58_address) == {HOTKEYS[0]: 65535, HOTKEYS[5]: 43690}


@in_loop
async def test_a_uid_that_changed_hands_gets_nothing(tmp_path: Path) -> None:
    """The metagraph is read every 10 blocks; UIDs are asked for at the moment of the attempt."""
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0, HOTKEYS[1]: 1.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False, block=DUE - 1)
        async with role(node, tmp_path / "ledger") as ledger:
            await node.subscribed()
            node.neurons = [node.neurons[0], (HOTKEYS[1], False), (HOTKEYS[9], False)]
            await mine_until(node, ledger, DUE)
    assert node.chain.weights_of(VALIDATOR.ss58_address) == {HOTKEYS[1]: 65535}


@pytest.mark.parametrize(
    ("item", "value", "name"),
    [
        ("ValidatorPermit", [False] * 17, "NeuronNoValidatorPermit"),
        ("WeightsVersionKey", 9, "IncorrectWeightVersionKey"),
        ("MinAllowedWeights", 5, "at least 5 weights"),
    ],
)
@in_loop
async def test_what_no_attempt_can_change_is_told_once(tmp_path: Path, item: str, value: object, name: str) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0})
    with structlog.testing.capture_logs() as logs:
        async with FakeNode() as node:
            subnet(node, commit_reveal=False)
            node.chain.set(item, NETUID, value=value)
            async with role(node, tmp_path / "ledger", weights_version_key=1) as ledger:
                await mine_until(node, ledger, DUE + 1, "refused")
                refused = await outcome(ledger, "refused")
                assert name in str(refused.reason)
                for block in range(node.block + 1, node.block + 30):
                    await node.mine(block)
    assert [entry["round"] for entry in logs if entry["log_level"] == "error"] == [ROUND]
    assert len(node.chain.included) <= 1
    assert node.chain.weights_of(VALIDATOR.ss58_address) == {}


@in_loop
async def test_a_runtime_that_the_sdk_does_not_fit_is_named_and_stops_nothing_else(tmp_path: Path) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0})
    async with FakeNode() as node:
        node.as_recorded = True
        subnet(node, commit_reveal=False)
        async with role(node, tmp_path / "ledger") as ledger:
            await node.subscribed()
            assert "lacks SubnetEpochConsensus" in str((await outcome(ledger, "refused")).reason)
            await node.mine(DUE + 1)
            async with asyncio.timeout(20):
                while (state := await ledger.chain_state()) is None or state.block != DUE + 1:
                    await asyncio.sleep(0.02)
            assert state.validators == {VALIDATOR.ss58_address}


@in_loop
async def test_a_refusal_that_passes_is_tried_again(tmp_path: Path) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        node.pool_answers = [PoolError(1010, "Invalid Transaction", "Transaction would exhaust the block limits")]
        async with role(node, tmp_path / "ledger") as ledger:
            assert "ExhaustsResources" in str((await outcome(ledger, "due")).reason)
            await mine_until(node, ledger, DUE + 1)
    assert len(node.chain.included) == 1


@pytest.mark.parametrize("lost", ["hang_up", "drop", "killed"])
@in_loop
async def test_an_unknown_outcome_is_settled_by_the_chain(tmp_path: Path, lost: str) -> None:
    """The connection ends, or the role is killed, after the extrinsic was handed over. It lands once, or is sent
    again once its era is over; never both."""
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        node.after_submit = None if lost == "killed" else lost
        async with role(node, tmp_path / "ledger") as ledger:
            await outcome(ledger, "sent")
            await node.until(lambda: "author_submitAndWatchExtrinsic" in node.asked)
            if lost != "killed":
                await mine_until(node, ledger, DUE + 1)
        if lost == "killed":
            assert len(node.chain.pool) == 1
            async with role(node, tmp_path / "ledger") as ledger:
                await mine_until(node, ledger, DUE + 1)
    assert [error for _, _, error in node.chain.included] == [None]
    assert node.chain.weights_of(VALIDATOR.ss58_address) == {HOTKEYS[0]: 65535}


async def mine_until(node: FakeNode, ledger: AsyncLedger, block: int, expected: str = "set") -> None:
    """Mine block after block, each final after three more, until the round's weights have an outcome."""
    async with asyncio.timeout(120):
        while (weights := await ledger.round_weights(ROUND)) is None or weights.outcome != expected:
            await node.subscribed()
            await node.mine(block, finalized=block - 3)
            block += 1
            await asyncio.sleep(0.05)  # the role looks at each block


def weights_command(ledger: Path) -> dict[str, float]:
    result = CliRunner().invoke(command_line(), ["weights", "--ledger", str(ledger), "--json"])
    shown: dict[str, float] = json.loads(result.output)["weights"]
    return shown


def with_scores(where: Path, scores: dict[str, float]) -> None:
    ledger = Ledger.open(where)
    scored_round(ledger, scores)
    ledger.close()
