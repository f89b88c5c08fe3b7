"""The chain role on a chain file, and the writer behind it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
import structlog

from bzstream.chain.role import HEARTBEAT_S, StateWriter, run
from bzstream.chain.state import ChainState
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError
from tests.submissions.values import in_loop


class Collected:
    """What was published, with the moment of each."""

    def __init__(self) -> None:
        self.states: list[tuple[float, ChainState]] = []

    async def publish(self, state: ChainState) -> None:
        self.states.append((time.monotonic(), state))

    async def until(self, block: int) -> float:
        async with asyncio.timeout(10):
            while not (self.states and self.states[-1][1].block == block):
                await asyncio.sleep(0.01)
        return time.monotonic()


@in_loop
async def test_a_new_file_is_in_force_within_a_second_and_confirmed_while_it_stands(tmp_path: Path) -> None:
    file, collected, stop = tmp_path / "chain.json", Collected(), asyncio.Event()
    file.write_text(json.dumps({"block": 1}))
    role = asyncio.create_task(run(ChainSettings(file=str(file)), collected.publish, stop))
    await collected.until(1)
    file.write_text(json.dumps({"block": 2}))
    written = time.monotonic()
    assert await collected.until(2) - written < 1.0
    count = len(collected.states)
    async with asyncio.timeout(3 * HEARTBEAT_S):
        while len(collected.states) == count:
            await asyncio.sleep(0.02)
    assert collected.states[-1][1].block == 2
    assert collected.states[-1][1].observed_at > collected.states[count - 1][1].observed_at
    stop.set()
    await role


@in_loop
async def test_a_node_without_a_chain_says_so_and_waits() -> None:
    stop = asyncio.Event()
    with structlog.testing.capture_logs() as logs:
        role = asyncio.create_task(run(ChainSettings(), Collected().publish, stop))
        await asyncio.sleep(0)
        stop.set()
        await role
    assert "no chain is configured" in logs[0]["event"]


@in_loop
async def test_an_unwilling_ledger_is_reported_once_and_gets_the_newest_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bzstream.chain.role.RETRY_S", 0.01)
    written: list[int] = []
    tries = 0
    done = asyncio.Event()

    async def publish(state: ChainState) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            mailbox.offer(ChainState(8, 0.0))
        if tries < 4:
            raise BzstreamError("the ledger is locked")
        written.append(state.block)
        done.set()

    mailbox = StateWriter(publish)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(mailbox.deliver())
        mailbox.offer(ChainState(7, 0.0))
        await asyncio.wait_for(done.wait(), 10)
        task.cancel()
    assert written == [8]
    assert len(logs) == 1
