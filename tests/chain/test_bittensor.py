"""The Bittensor chain role against a node on loopback: what it sees, and every way of losing sight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

from bzstream.chain.keys import Key
from bzstream.chain.role import run
from bzstream.chain.state import ChainState
from bzstream.config import ChainSettings
from tests.chain.node import FakeNode, hash_of
from tests.submissions.values import in_loop

ALICE, BOB, CAROL = (Key.from_seed(letter * 32).ss58_address for letter in (b"a", b"b", b"c"))


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path / "symbols.json"))
    monkeypatch.setattr("bzstream.chain.bittensor.PAUSE_FIRST_S", 0.05)
    monkeypatch.setattr("bzstream.chain.bittensor.PAUSE_MAX_S", 0.1)
    monkeypatch.setattr("bzstream.chain.bittensor.STEP_TIMEOUT_S", 0.7)
    monkeypatch.setattr("bzstream.chain.bittensor.METAGRAPH_BLOCKS", 3)


class Seen:
    """The states that the role published."""

    def __init__(self) -> None:
        self.states: list[ChainState] = []
        self._new = asyncio.Event()

    async def publish(self, state: ChainState) -> None:
        self.states.append(state)
        self._new.set()

    async def until(self, condition: Callable[[ChainState], bool]) -> ChainState:
        """The newest state, once it fulfils the condition; 20 s at most."""
        async with asyncio.timeout(20):
            while not (self.states and condition(self.states[-1])):
                self._new.clear()
                await self._new.wait()
        return self.states[-1]

    async def at(self, block: int) -> ChainState:
        return await self.until(lambda state: state.block == block)


@asynccontextmanager
async def watching(*nodes: FakeNode, **changes: object) -> AsyncIterator[Seen]:
    given = {"endpoint": tuple(node.url for node in nodes), "netuid": 1}
    seen, stop = Seen(), asyncio.Event()
    role = asyncio.create_task(run(ChainSettings(**{**given, **changes}), seen.publish, stop))  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await role


@in_loop
async def test_heads_registrations_and_seeds_are_seen() -> None:
    async with FakeNode(block=839) as node:
        node.neurons = [(ALICE, True), (BOB, False)]
        async with watching(node) as seen:
            state = await seen.at(839)
            assert state.validators == {ALICE}
            assert state.miners == frozenset({ALICE, BOB})
            assert dict(state.hashes) == {420: hash_of(420)[2:]}
            assert not state.frozen
            await node.subscribed()
            node.finalized = 839
            await node.mine(840)
            state = await seen.at(840)
            assert dict(state.hashes) == {420: hash_of(420)[2:], 840: hash_of(840)[2:]}
            node.neurons = [(CAROL, True)]
            asked = node.asked.count("state_call")
            await node.mine(841)
            assert (await seen.at(841)).validators == {ALICE}  # not read yet: every 3 blocks
            await node.mine(842)
            assert (await seen.at(842)).validators == {CAROL}
            assert node.asked.count("state_call") == asked + 1


@in_loop
async def test_a_validator_has_the_permit_the_stake_and_a_place_on_the_list() -> None:
    dave, erin = (Key.from_seed(letter * 32).ss58_address for letter in (b"d", b"e"))
    async with FakeNode() as node:
        node.neurons = [(ALICE, True), (BOB, True), (CAROL, False), (dave, True), (erin, False)]
        node.chain.stakes = {ALICE: 1_500_000_000, BOB: 1_499_999_999, CAROL: 9_000_000_000, dave: 2_000_000_000}
        cases: list[tuple[dict[str, object], set[str]]] = [
            ({}, {ALICE, BOB, dave}),
            ({"min_validator_stake": 1.5}, {ALICE, dave}),
            ({"validators_allowed": (ALICE, BOB, CAROL)}, {ALICE, BOB}),
            ({"min_validator_stake": 1.5, "validators_allowed": (ALICE, BOB, CAROL)}, {ALICE}),
            ({"validators_allowed": (erin,)}, set()),
        ]
        for changes, expected in cases:
            async with watching(node, **changes) as seen:
                state = await seen.at(100)
                assert state.validators == expected, changes
                assert state.miners == frozenset({ALICE, BOB, CAROL, dave, erin})


@in_loop
async def test_a_seed_waits_for_finality() -> None:
    async with FakeNode(block=839) as node, watching(node) as seen:
        await seen.at(839)
        await node.subscribed()
        await node.mine(841, finalized=839)
        assert 840 not in (await seen.at(841)).hashes
        await node.mine(842, finalized=840)
        assert 840 in (await seen.at(842)).hashes


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012])
@in_loop
async def test_a_closed_connection_is_made_again(code: int) -> None:
    async with FakeNode() as node, watching(node) as seen:
        await seen.at(100)
        await node.subscribed()
        await node.hang_up(code)
        node.block = node.finalized = 105
        await seen.at(105)
        await node.subscribed()
        await node.mine(106)
        await seen.at(106)


@in_loop
async def test_a_silent_node_is_left_for_the_next() -> None:
    async with FakeNode() as first, FakeNode(block=101) as second, watching(first, second) as seen:
        await seen.at(100)
        await first.subscribed()
        first.silent = True
        await seen.at(101)
        await second.subscribed()
        await second.mine(102)
        await seen.at(102)


@in_loop
async def test_a_node_that_never_answers_is_left_for_the_next() -> None:
    async with FakeNode() as first, FakeNode(block=101) as second:
        first.silent = True
        async with watching(first, second) as seen:
            await seen.at(101)
        async with asyncio.timeout(10):
            while first.connections:  # what was cancelled half-way is closed too
                await asyncio.sleep(0.01)


@in_loop
async def test_a_restarted_node_is_found_again() -> None:
    async with FakeNode() as node, watching(node) as seen:
        await seen.at(100)
        await node.stop()
        node.block = node.finalized = 107
        await node.start()
        await seen.at(107)


@in_loop
async def test_a_lagging_node_is_passed_over_unless_all_lag() -> None:
    async with FakeNode(block=500) as first, FakeNode(block=50) as second, watching(first, second) as seen:
        await seen.at(500)
        await first.subscribed()
        await first.hang_up(1012)
        first.block = first.finalized = 501
        await seen.at(501)
        assert all(state.block >= 500 for state in seen.states)
        await first.subscribed()
        first.block = first.finalized = 40  # the chain was started afresh
        await first.hang_up(1012)
        await seen.until(lambda state: state.block in (40, 50))


def test_a_subnet_that_does_not_exist_is_said() -> None:
    async def go() -> list[str]:
        with structlog.testing.capture_logs() as logs:
            async with FakeNode() as node, watching(node, netuid=2) as seen:
                async with asyncio.timeout(20):
                    while not logs:
                        await asyncio.sleep(0.01)
                assert not seen.states
        return [str(entry.get("reason")) for entry in logs]

    assert any("no subnet 2" in reason for reason in asyncio.run(go()))
