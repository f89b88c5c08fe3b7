"""The base of a round: noted once, at the last block of the distribute phase, from the real store into the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.role import run
from bzstream.chain.state import ChainState
from bzstream.config import ChainSettings
from bzstream.model import publish_state_dict
from bzstream.model.store import Store
from bzstream.submissions.ledger import AsyncLedger
from tests.submissions.values import in_loop

CYCLE = Cycle()
START, ROUND = 12180, 12520
LAST = START + 19
"""The last block of the distribute phase."""


def publish(store: Path, version: str, block: int = START, keep: int = 3) -> None:
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": np.full((4, 8, 4), hash(version) % 97, np.float32)}
    publish_state_dict(tensors, {"hidden_size": 4}, store, block=block, version=version, groups=2, keep=keep)


class Blocks:
    """A chain file; `at` returns once the ledger has the chain's state of that block."""

    def __init__(self, file: Path, ledger: AsyncLedger) -> None:
        self._file = file
        self._ledger = ledger
        self._written: asyncio.Queue[int] = asyncio.Queue()

    async def publish(self, state: ChainState) -> None:
        await self._ledger.write_chain_state(state)
        self._written.put_nowait(state.block)

    async def at(self, block: int) -> None:
        self._file.with_suffix(".new").write_text(json.dumps({"block": block}))
        self._file.with_suffix(".new").rename(self._file)
        async with asyncio.timeout(20):
            while await self._written.get() != block:
                pass


@asynccontextmanager
async def watching(place: Path) -> AsyncIterator[tuple[Blocks, AsyncLedger]]:
    """The chain role over a store and a ledger in `place`."""
    file, stop, ledger = place / "chain.json", asyncio.Event(), AsyncLedger.open(place / "ledger")
    blocks = Blocks(file, ledger)
    settings = ChainSettings(file=str(file))
    role = asyncio.create_task(run(settings, blocks.publish, stop, ledger=ledger, store=Store(place / "store")))
    try:
        yield blocks, ledger
    finally:
        stop.set()
        await role
        ledger.close()
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


@in_loop
async def test_the_base_is_the_version_of_the_last_distribute_block(tmp_path: Path) -> None:
    publish(tmp_path / "store", "first")
    async with watching(tmp_path) as (blocks, ledger):
        await blocks.at(LAST - 1)
        assert await ledger.round_bases(0) == {}
        publish(tmp_path / "store", "second")
        await blocks.at(LAST)
        assert await ledger.round_bases(0) == {ROUND: "second"}
        publish(tmp_path / "store", "third")
        await blocks.at(LAST + 1)
        await blocks.at(ROUND)
    async with watching(tmp_path) as (blocks, ledger):  # a restart in the submit phase
        await blocks.at(ROUND + 1)
        assert await ledger.round_bases(0) == {ROUND: "second"}
        await blocks.at(LAST + CYCLE.length)
        assert await ledger.round_bases(0) == {ROUND: "second", ROUND + CYCLE.length: "third"}


@in_loop
async def test_a_node_that_was_down_then_takes_what_it_finds_and_says_so(tmp_path: Path) -> None:
    publish(tmp_path / "store", "first")
    with structlog.testing.capture_logs() as logs:
        async with watching(tmp_path) as (blocks, ledger):
            await blocks.at(LAST + 50)
            assert await ledger.round_bases(0) == {ROUND: "first"}
            await blocks.at(LAST + CYCLE.length)
    late = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [(entry["round"], entry["version"], entry["block"], entry["due"]) for entry in late] == [
        (ROUND, "first", LAST + 50, LAST)
    ]


@in_loop
async def test_a_node_without_a_snapshot_notes_the_first_that_it_gets(tmp_path: Path) -> None:
    async with watching(tmp_path) as (blocks, ledger):
        await blocks.at(LAST)
        assert await ledger.round_bases(0) == {}
        publish(tmp_path / "store", "first")
        await blocks.at(LAST + 1)
        assert await ledger.round_bases(0) == {ROUND: "first"}


@in_loop
async def test_the_base_of_an_open_round_is_not_retired(tmp_path: Path) -> None:
    store = tmp_path / "store"
    publish(store, "base")
    async with watching(tmp_path) as (blocks, _):
        await blocks.at(LAST)
        for number in range(3):
            publish(store, f"later-{number}", keep=1)
        assert sorted(Store(store).versions()) == ["base", "later-2"]
        await blocks.at(LAST + CYCLE.length)  # scored now
        publish(store, "next", keep=1)
        assert sorted(Store(store).versions()) == ["base", "later-2", "next"]
        await blocks.at(LAST + 2 * CYCLE.length)
        publish(store, "last", keep=1)
        assert sorted(Store(store).versions()) == ["last", "later-2", "next"]
