"""The chain role: one process that watches the chain and writes what it sees into the ledger.

It watches either a chain file (`chain.file`, simulated) or a real chain over the Bittensor SDK. Both offer states to
`StateWriter`, which writes the newest one into the ledger. A slow or failing ledger therefore never delays the
watching, and a state that is written late carries the moment at which it was seen. HTTP workers never talk to a chain;
they read the ledger. The supervisor starts one such process (`node.child`), and everything runs in its event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.round_base import BaseLedger, BaseRecorder, BaseStore
from bzstream.chain.simulated import SimulatedChain
from bzstream.chain.state import ChainState
from bzstream.chain.weight_setter import RoundLedger
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError
from bzstream.util.warn_once import WarnOnce

__all__ = ["StateWriter", "run"]

POLL_S = 0.2
"""How often the chain file is looked at: a new one is in force within a second, workers' own polling included."""
HEARTBEAT_S = 2.0
"""How often an unchanged state is confirmed: far below `chain.stale_s`, and one small commit."""
RETRY_S = 1.0

_log = structlog.get_logger("bzstream.chain")


async def run(
    settings: ChainSettings,
    publish: Callable[[ChainState], Awaitable[None]],
    stop: asyncio.Event,
    *,
    ledger: RoleLedger | None = None,
    store: BaseStore | None = None,
    wallet: str | None = None,
    certificate: str | None = None,
) -> None:
    """Watch the chain until `stop` is set. `publish` writes a state into the ledger and may raise BzstreamError.

    With a `ledger` and a `store` the base of every round is noted (see `round_base`). With `chain.set_weights` the
    weights of finished rounds are submitted, signed by `wallet`, from what `ledger` tells. With `chain.announce` the
    node's address is announced, with the key of its TLS `certificate` (a PEM file), if it has one.
    Raises KeyUnavailable when that wallet cannot be opened.
    """
    cycle = Cycle.of(settings)
    recorder = None if ledger is None or store is None else BaseRecorder(cycle, ledger, store)
    mailbox = StateWriter(publish, recorder)
    if settings.file is not None:
        watching = _watch_file(Path(settings.file), cycle, mailbox.offer)
    elif settings.endpoint and settings.netuid is not None:
        from bzstream.chain import bittensor  # the SDK: 60 MB and half a second, for this role alone
        from bzstream.chain.keys import load_key

        signs = settings.set_weights or settings.announce
        key = await asyncio.to_thread(load_key, wallet) if signs and wallet is not None else None
        if signs and key is None:
            _log.warning("node.wallet is not set; no weights will be submitted and nothing announced")
        watching = bittensor.watch(settings, cycle, mailbox.offer, ledger=ledger, key=key, certificate=certificate)
    else:
        _log.warning("no chain is configured; set chain.file, or chain.endpoint and chain.netuid")
        await stop.wait()
        return
    tasks = [asyncio.create_task(watching), asyncio.create_task(mailbox.deliver()), asyncio.create_task(stop.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class RoleLedger(RoundLedger, BaseLedger, Protocol):
    """What the role keeps in the ledger besides the chain's state."""


class StateWriter:
    """Holds the newest state until it is written."""

    def __init__(self, publish: Callable[[ChainState], Awaitable[None]], recorder: BaseRecorder | None = None) -> None:
        self._publish = publish
        self._recorder = recorder
        self._newest: ChainState | None = None
        self._arrived = asyncio.Event()

    def offer(self, state: ChainState) -> None:
        """Replace what waits to be written."""
        if self._recorder is not None:
            self._recorder.observe(state.block)
        self._newest = state
        self._arrived.set()

    async def deliver(self) -> None:
        """Write states as they arrive, until cancelled. A failing ledger is reported once, and written to again."""
        failures = WarnOnce(_log.warning)
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            state = self._newest
            assert state is not None
            try:
                if self._recorder is not None:
                    await self._recorder.write()
                await self._publish(state)
            except BzstreamError as error:
                failures.failed("the chain's state cannot be written", reason=str(error))
                self._arrived.set()
                await asyncio.sleep(RETRY_S)
            else:
                failures.succeeded()


async def _watch_file(file: Path, cycle: Cycle, offer: Callable[[ChainState], None]) -> None:
    chain = SimulatedChain(file, cycle, _log.warning)
    last: ChainState | None = None
    while True:
        state = chain.observe(time.time(), time.monotonic())
        if state is not None and (
            last is None
            or state.observed_at - last.observed_at >= HEARTBEAT_S
            or state.observed_at < last.observed_at  # the clock was set back
            or replace(state, observed_at=last.observed_at) != last
        ):
            offer(state)
            last = state
        await asyncio.sleep(POLL_S)
