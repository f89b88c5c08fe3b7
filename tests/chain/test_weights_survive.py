"""Rounds under bad luck: whatever the node, the chain and the role do, weights land once or it is said why not.

Each seed is a story of connections that drop, extrinsics that are lost, reorganisations, a role that is killed, a pool
that refuses, miners that come and go, and a permit that is lost. `BZ_TEST_LONG=1` runs 200 of them.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bzstream.chain.weights import RoundWeights
from bzstream.submissions.ledger import AsyncLedger
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID, PoolError
from tests.chain.test_weights_on_chain import DUE, VALIDATOR, role, subnet, with_scores
from tests.seeds import seeds
from tests.submissions.values import HOTKEYS, ROUND, in_loop

POOL_ANSWERS = (
    PoolError(1010, "Invalid Transaction", "Transaction would exhaust the block limits"),
    PoolError(1014, "Priority is too low: (1 vs 2)", "The transaction has too low priority"),
    PoolError(1016, "Immediately Dropped", "The transaction couldn't enter the pool because of the limit"),
)
BLOCKS = 45
"""Of the bad luck; then the chain goes on in peace until the round's outcome is known."""


async def misfortune(luck: random.Random, node: FakeNode) -> None:
    """One thing that goes wrong, or none."""
    match luck.choice(["hang_up", "lost", "answer", "reorganise", "pool", "neurons", "permit", "", "", "", ""]):
        case "hang_up":
            await node.hang_up(luck.choice([1000, 1001, 1011]))
        case "lost":
            node.after_submit = "drop"
        case "answer":
            node.after_submit = "hang_up"
        case "reorganise":
            node.chain.reorganise(luck.randint(1, 3))
        case "pool":
            node.pool_answers.append(luck.choice(POOL_ANSWERS))
        case "neurons":
            miners = list(HOTKEYS)
            luck.shuffle(miners)
            node.neurons = [node.neurons[0], *((hotkey, False) for hotkey in miners[: luck.randint(1, 16)])]
        case "permit":
            node.neurons = [(VALIDATOR.ss58_address, luck.random() < 0.7), *node.neurons[1:]]


@pytest.mark.parametrize("seed", range(seeds(3, 200)))
@in_loop
async def test_weights_land_once_or_it_is_said_why(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bzstream.chain.bittensor.PAUSE_FIRST_S", 0.01)
    monkeypatch.setattr("bzstream.chain.bittensor.PAUSE_MAX_S", 0.05)
    luck, where = random.Random(seed), tmp_path / "ledger"
    with_scores(where, {HOTKEYS[0]: 3.0, HOTKEYS[1]: 1.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=luck.random() < 0.5)
        node.chain.set("WeightsSetRateLimit", NETUID, value=luck.choice([0, 10, 100]))
        block = DUE + 1
        while block < DUE + BLOCKS:
            async with role(node, where):
                for _ in range(luck.randint(1, 20)):  # then the role dies
                    await misfortune(luck, node)
                    block = node.block + 1
                    await next_block(node, block)
        node.neurons = [(VALIDATOR.ss58_address, True), *node.neurons[1:]]
        node.after_submit, node.pool_answers = None, []
        async with AsyncExitStack() as stack:
            ledger = await stack.enter_async_context(role(node, where))
            weights = await settled(node, ledger)
    landed = [extrinsic for _, extrinsic, error in node.chain.included if error is None]
    if weights.outcome == "set":
        assert len(landed) == 1
    else:
        assert (weights.outcome, len(landed)) == ("refused", 0)
        assert weights.reason


async def next_block(node: FakeNode, block: int) -> None:
    """Mine, and let the role look at the block if it is connected."""
    await node.mine(block, finalized=max(node.finalized, block - 3))
    await asyncio.sleep(0.03)


async def settled(node: FakeNode, ledger: AsyncLedger) -> RoundWeights:
    """The round's weights once they are final: set, or refused for good."""
    async with asyncio.timeout(120):
        while True:
            weights = await ledger.round_weights(ROUND)
            if weights is not None and weights.outcome in ("set", "refused"):
                return weights
            await node.subscribed()
            await next_block(node, node.block + 1)
