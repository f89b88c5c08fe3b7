"""Bittensor's chain, watched through its SDK: heads by subscription, the metagraph now and then, seeds when final.

A node, a network or the SDK can stop answering in ways that raise nothing: a close with 1000 or 1001, a half-open
connection, a node that stays connected and sends no more blocks. So every single wait has a bound, and whatever is
not a head in time ends the session; the next one goes to the next endpoint. The waits are not `asyncio.wait_for`: it
waits for the cancelled coroutine to end, and the SDK's, when cancelled, first asks the silent node to unsubscribe. An
overdue wait is cancelled, given a moment, left behind, and ends when the client is closed.

What is known survives sessions. A node that lags far behind what was seen already is passed over, unless all do: then
the chain was started afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.keys import Key, is_hotkey
from bzstream.chain.sdk_weights import SdkChain
from bzstream.chain.state import ChainState
from bzstream.chain.weight_setter import RoundLedger, WeightSetter
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError

__all__ = ["ChainError", "watch"]

_T = TypeVar("_T")

PAUSE_FIRST_S, PAUSE_MAX_S = 0.5, 15.0
"""Between sessions: short after one that saw heads, doubling while there are none. A block takes 12 s."""
GRACE_S, CLOSE_S = 0.5, 5.0
"""For what was cancelled to say goodbye to the node, and for closing a connection."""
LAG_BLOCKS = 10
"""A node this far behind is still syncing, or cut off."""

_HASH = re.compile(r"0x([0-9a-f]{64})", re.ASCII)
_log = structlog.get_logger("bzstream.chain")


class ChainError(BzstreamError):
    """The chain's node does not answer, lags, or answers nonsense."""


async def watch(
    settings: ChainSettings,
    cycle: Cycle,
    offer: Callable[[ChainState], None],
    *,
    ledger: RoundLedger | None = None,
    key: Key | None = None,
) -> None:
    """Watch the chain of `chain.netuid` at `chain.endpoint` for ever; every new head is offered as a state."""
    watcher = _Watcher(settings, cycle, offer, ledger, key)
    pause = PAUSE_FIRST_S
    try:
        for endpoint in itertools.cycle(settings.endpoint):
            seen = watcher.heads
            reason = await _session_of(watcher, endpoint)
            pause = PAUSE_FIRST_S if watcher.heads > seen else min(2 * pause, PAUSE_MAX_S)
            _log.warning("lost the chain", endpoint=_bare(endpoint), reason=reason, next_try_s=pause)
            await asyncio.sleep(pause)
    finally:
        await watcher.close()


async def _session_of(watcher: _Watcher, endpoint: str) -> str:
    """Run one session; why it ended."""
    try:
        await watcher.session(endpoint)
    except Exception as error:  # the SDK's transport raises its own, asyncio's, the socket's and websockets' kinds
        return f"{type(error).__name__}: {error}"[:300]
    return "the stream of blocks ended"


class _Watcher:
    """What is known of the chain, and one session at a time that adds to it."""

    def __init__(
        self,
        settings: ChainSettings,
        cycle: Cycle,
        offer: Callable[[ChainState], None],
        ledger: RoundLedger | None,
        key: Key | None,
    ) -> None:
        assert settings.netuid is not None
        self._settings = settings
        self._netuid = settings.netuid
        self._cycle = cycle
        self._offer = offer
        self._key = key
        self._setter = WeightSetter(ledger, cycle, settings, key) if ledger is not None and key is not None else None
        self.heads = 0
        """Heads seen, over all sessions."""
        self._block = 0
        self._lagging = 0
        self._last_updates: dict[str, int] = {}
        """Hotkey -> block of its last weights, of everybody who is registered."""
        self._validators: frozenset[str] = frozenset()
        self._registered_at: int | None = None
        self._hashes: dict[int, str] = {}

    async def close(self) -> None:
        if self._setter is not None:
            await self._setter.close()

    async def session(self, endpoint: str) -> None:
        """Follow one node until it fails. Returns or raises whatever ended it."""
        import bittensor

        connections: list[Any] = []

        class Substrate(bittensor.RpcSubstrate):  # type: ignore[misc]
            """Remembers the connections it makes: the SDK forgets one whose `connect` is cancelled half-way."""

            def _interface(self, *arguments: Any, **named: Any) -> Any:
                connections.append(super()._interface(*arguments, **named))
                return connections[-1]

        substrate = Substrate(endpoint)  # without the SDK's own fall-backs: they are mainnet's
        client = bittensor.Client(endpoint, substrate=substrate)
        try:
            await self._step("connecting", client.connect())
            await self._observe(client, substrate, await self._step("the current block", client.block()))
            heads = client.blocks()
            while True:
                header = await self._step("the next block", anext(heads))
                await self._observe(client, substrate, header.number)
        finally:
            for connection in connections:
                with contextlib.suppress(Exception):
                    await _bounded(connection.close(), CLOSE_S)

    async def _observe(self, client: Any, substrate: Any, block: int) -> None:
        self._check_lag(block)
        self._block = block
        if self._registered_at is None or not 0 <= block - self._registered_at < self._settings.metagraph_blocks:
            await self._read_metagraph(client, block)
        await self._read_seeds(client, substrate, block)
        self.heads += 1
        self._offer(
            ChainState(
                block=block,
                observed_at=time.time(),
                validators=self._validators,
                miners=frozenset(self._last_updates),
                frozen=False,
                hashes=dict(self._hashes),
            )
        )
        if self._setter is not None and self._key is not None:
            last_update = self._last_updates.get(self._key.ss58_address)
            self._setter.consider(block, last_update, SdkChain(client, self._netuid))

    def _check_lag(self, block: int) -> None:
        if block >= self._block - LAG_BLOCKS:
            self._lagging = 0
            return
        self._lagging += 1
        if self._lagging <= len(self._settings.endpoint):
            raise ChainError(f"the node is at block {block}, {self._block - block} behind what was seen already")
        self._lagging, self._registered_at, self._hashes = 0, None, {}  # every node says so: it is another chain

    async def _read_metagraph(self, client: Any, block: int) -> None:
        graph = await self._step("the metagraph", client.subnets.metagraph(self._netuid, commitments=False))
        if graph is None:
            raise ChainError(f"there is no subnet {self._netuid} on this chain; check chain.netuid and chain.endpoint")
        neurons = [neuron for neuron in graph if is_hotkey(neuron.hotkey)]
        self._last_updates = {neuron.hotkey: neuron.last_update for neuron in neurons}
        self._validators = frozenset(neuron.hotkey for neuron in neurons if neuron.validator_permit)
        self._registered_at = block

    async def _read_seeds(self, client: Any, substrate: Any, block: int) -> None:
        """Learn the hashes that seed recent rounds, once their blocks are final."""
        wanted = self._cycle.recent_seeds(block)
        self._hashes = {seed: value for seed, value in self._hashes.items() if seed in wanted}
        missing = [seed for seed in wanted if seed not in self._hashes]
        if not missing:
            return
        final = await self._step("the finalized block", client.finalized_block())
        for seed in missing:
            if seed <= final:
                form = _HASH.fullmatch(await self._step("a block's hash", substrate.block_hash(seed)))
                if form is None:
                    raise ChainError(f"the node's hash of block {seed} is not one")
                self._hashes[seed] = form[1]

    async def _step(self, what: str, waiting: Awaitable[_T]) -> _T:
        try:
            return await _bounded(waiting, self._settings.step_timeout_s)
        except TimeoutError:
            raise ChainError(f"no answer to {what} within {self._settings.step_timeout_s:g} s") from None


async def _bounded(waiting: Awaitable[_T], seconds: float) -> _T:
    """Wait so long and no longer; what is overdue is cancelled and left behind. Raises TimeoutError."""
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE_S)


def _bare(endpoint: str) -> str:
    """An endpoint without the path and query, where providers put their keys."""
    form = re.match(r"[a-z]+://(?:[^/?#@]*@)?([^/?#]*)", endpoint)
    return form[1] if form else "?"
