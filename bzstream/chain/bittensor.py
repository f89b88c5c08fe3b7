"""Watches Bittensor's chain through its SDK: heads by subscription, the metagraph every few blocks, seeds when final.

The chain role runs `watch` in its event loop. A *session* is one connection to one endpoint. A node, a network or the
SDK can stop answering in ways that raise nothing: a close with code 1000 or 1001, a half-open connection, a node that
stays connected and sends no more blocks. So every single wait has a bound. A wait that runs out, or any error, ends the
session, and the next session goes to the next endpoint. `asyncio.wait_for` would not do: it waits until the cancelled
coroutine has ended, and the SDK's coroutines, when cancelled, first ask the silent node to unsubscribe. An overdue wait
is cancelled, given `GRACE_S` to end, and then left alone; it ends when the connection is closed.

What is known of the chain survives sessions. A node that lags far behind the newest block seen is passed over. If all
endpoints lag, the chain was started afresh, and what was known of the old one is forgotten.
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

from bzstream.chain.announcer import Announcer
from bzstream.chain.clock import Cycle
from bzstream.chain.commitments import RoundCommitments
from bzstream.chain.keys import Key, is_hotkey
from bzstream.chain.sdk_commitments import read_commitments
from bzstream.chain.sdk_weights import SdkChain, missing_storage
from bzstream.chain.state import ChainState
from bzstream.chain.weight_setter import RoundLedger, WeightSetter
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError

__all__ = ["ChainError", "watch"]

_T = TypeVar("_T")

PAUSE_FIRST_S, PAUSE_MAX_S = 0.5, 15.0
"""Pause between sessions: short after a session that saw heads, doubled after each that saw none."""
GRACE_S, CLOSE_S = 0.5, 5.0
"""Longest wait for a cancelled call to end, and for a connection to close."""
LAG_BLOCKS = 10
"""A node this far behind is still syncing, or cut off."""
METAGRAPH_BLOCKS = 10
"""Blocks between two reads of who is registered: two minutes, about 200 KB for 256 neurons."""
RAO = 10**9
"""The chain's smallest units of stake in one of TAO or alpha."""
STEP_TIMEOUT_S = 30.0
"""Longest wait for any one answer or block: more than two blocks."""

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
    certificate: str | None = None,
) -> None:
    """Watch the chain of `chain.netuid` at `chain.endpoint` for ever; every new head is offered as a state."""
    watcher = _Watcher(settings, cycle, offer, ledger, key, certificate)
    pause = PAUSE_FIRST_S
    try:
        for endpoint in itertools.cycle(settings.endpoint):
            seen = watcher.heads
            reason = await _run_session(watcher, endpoint)
            pause = PAUSE_FIRST_S if watcher.heads > seen else min(2 * pause, PAUSE_MAX_S)
            _log.warning("lost the chain", endpoint=_host_of(endpoint), reason=reason, next_try_s=pause)
            await asyncio.sleep(pause)
    finally:
        await watcher.close()


async def _run_session(watcher: _Watcher, endpoint: str) -> str:
    """Run one session; the reason why it ended."""
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
        certificate: str | None,
    ) -> None:
        assert settings.netuid is not None
        self._settings = settings
        self._netuid = settings.netuid
        self._cycle = cycle
        self._offer = offer
        self._key = key
        self._ledger = ledger
        self._missing: list[str] = []
        """Storage that weights need and the connected runtime lacks."""
        self._committed: int | None = None
        """The round whose commitments were read last."""
        self._setter = None
        if settings.set_weights and ledger is not None and key is not None:
            self._setter = WeightSetter(ledger, cycle, settings, key)
        self._announcer = Announcer(settings, key, certificate) if settings.announce and key is not None else None
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
        if self._announcer is not None:
            await self._announcer.close()

    async def session(self, endpoint: str) -> None:
        """Follow one node until it fails: returns when its stream of blocks ends, raises what else ends it."""
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
            if self._setter is not None:
                self._missing = await self._step("the runtime's metadata", missing_storage(substrate))
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
        if self._registered_at is None or not 0 <= block - self._registered_at < METAGRAPH_BLOCKS:
            await self._read_metagraph(client, block)
        await self._read_seeds(client, substrate, block)
        await self._read_commitments(client, block)
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
        # One extrinsic at a time: two that are made together would take the same nonce.
        if self._announcer is not None and not (self._setter is not None and self._setter.busy):
            self._announcer.consider(block, client)
        if self._setter is not None and self._key is not None and not (self._announcer and self._announcer.busy):
            last_update = self._last_updates.get(self._key.ss58_address)
            self._setter.consider(block, last_update, SdkChain(client, self._netuid, self._missing))

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
        self._validators = frozenset(neuron.hotkey for neuron in neurons if self._is_validator(neuron))
        self._registered_at = block

    def _is_validator(self, neuron: Any) -> bool:
        """By its permit, `chain.min_validator_stake` and `chain.validators_allowed`. Stakes are in rao, 1e-9 alpha."""
        allowed = self._settings.validators_allowed
        least = round(self._settings.min_validator_stake * RAO)
        return neuron.validator_permit and neuron.total_stake.rao >= least and (not allowed or neuron.hotkey in allowed)

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

    async def _read_commitments(self, client: Any, block: int) -> None:
        """Read what the miners committed for this cycle's round, once the last block of the commit phase is final."""
        import bittensor

        round_, phase = self._cycle.round(block), self._cycle.commit_phase(block)
        if self._ledger is None or round_ == self._committed or not phase or block < phase.stop:
            return
        if await self._step("the finalized block", client.finalized_block()) < phase.stop - 1:
            return
        try:
            first, last = self._cycle.start(block), phase.stop - 1
            found = await self._step("commitments", read_commitments(client, self._netuid, first, last))
            await self._ledger.write_commitments(RoundCommitments(round_, found))
        except bittensor.ChainError as error:  # a node that has dropped the state of that block will not get it again
            _log.warning("the commitments cannot be read; this round has none", round=round_, reason=str(error))
        except BzstreamError as error:
            if isinstance(error, ChainError):
                raise
            _log.warning("the commitments cannot be written yet", round=round_, reason=str(error))
            return
        self._committed = round_

    async def _step(self, what: str, waiting: Awaitable[_T]) -> _T:
        try:
            return await _bounded(waiting, STEP_TIMEOUT_S)
        except TimeoutError:
            raise ChainError(f"no answer to {what} within {STEP_TIMEOUT_S:g} s") from None


async def _bounded(waiting: Awaitable[_T], seconds: float) -> _T:
    """Wait at most `seconds`; a wait that is overdue is cancelled and left alone. Raises TimeoutError."""
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


def _host_of(endpoint: str) -> str:
    """An endpoint's host and port. Its path and query stay out of logs: providers put access keys there."""
    form = re.match(r"[a-z]+://(?:[^/?#@]*@)?([^/?#]*)", endpoint)
    return form[1] if form else "?"
