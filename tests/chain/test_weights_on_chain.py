"""Weights from the ledger to the chain: the chain role as `serve` runs it, the unmodified SDK, a node on loopback.

No method of the SDK is replaced. What arrives is an extrinsic that is decoded and whose signature is checked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bzstream.chain.keys import Key
from bzstream.chain.role import run
from bzstream.config import ChainSettings
from bzstream.submissions.ledger import AsyncLedger, Ledger
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID
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
    """A finished round: each hotkey's submission with its score."""
    for hotkey in scores:
        accepted(ledger.accept(candidate(hotkey, round_ + 10, round_=round_)))
    for job in ledger.claim("evaluator", lease_s=60, limit=len(scores)):
        job = ledger.advance(ledger.advance(job, "verifying"), "evaluating")
        ledger.advance(job, "scored", score=scores[job.record.hotkey], model_version="step_1000")


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
    running = asyncio.create_task(run(settings, ledger.write_chain_state, stop, book=ledger, wallet=str(wallet)))
    try:
        yield ledger
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await running
        ledger.close()


async def confirmed(ledger: AsyncLedger, round_: int = ROUND) -> None:
    async with asyncio.timeout(20):
        while not await ledger.weights_are_set(round_):
            await asyncio.sleep(0.02)


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
            await confirmed(ledger)
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
            await confirmed(ledger)
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


def with_scores(where: Path, scores: dict[str, float]) -> None:
    ledger = Ledger.open(where)
    scored_round(ledger, scores)
    ledger.close()
