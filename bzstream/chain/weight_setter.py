"""Submitting weights: which round, when, and again until the chain confirms.

The rule itself is `weights`; this is its edge. One attempt runs at a time, beside the watching of heads; an attempt
that fails is made again some blocks later, until the chain confirms the extrinsic (which the ledger then remembers,
so that a restarted role does not repeat it) or the cycle ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.keys import Key
from bzstream.chain.weights import Scored, weights_of

__all__ = ["RoundLedger", "RoundResults", "WeightSetter", "submit_weights"]

RETRY_BLOCKS = 5
"""Blocks between two attempts: a minute, in which a full transaction pool or a node empties."""
ATTEMPT_S = 300.0
"""Longest attempt; finality takes about 30 s."""

_FINAL = ("scored", "rejected", "failed")
_log = structlog.get_logger("bzstream.chain")


class RoundResults(Protocol):
    """One round as the ledger tells it."""

    @property
    def results(self) -> Sequence[Scored]: ...


class RoundLedger(Protocol):
    """What the ledger knows of rounds."""

    async def scores(self, round_: int, /) -> RoundResults | None: ...
    async def weights_are_set(self, round_: int, /) -> bool: ...
    async def confirm_weights(self, round_: int, /) -> None: ...


Submit = Callable[[Mapping[str, float]], Awaitable[None]]
"""Submits hotkeys' weights; returns when the chain has confirmed them, raises when it has not."""


class WeightSetter:
    """Decides at each block whether an attempt is due, and makes it."""

    def __init__(self, book: RoundLedger, cycle: Cycle, top_k: int) -> None:
        self._book = book
        self._cycle = cycle
        self._top_k = top_k
        self._done: int | None = None
        self._not_before = 0
        self._attempt: asyncio.Task[None] | None = None

    def consider(self, block: int, submit: Submit) -> None:
        """Called at each new block; starts an attempt when one is due and none is under way."""
        round_ = self._cycle.due_round(block)
        if round_ is None or round_ == self._done or block < self._not_before:
            return
        if self._attempt is None or self._attempt.done():
            self._not_before = block + RETRY_BLOCKS
            self._attempt = asyncio.create_task(self._try(round_, block, submit))

    async def close(self) -> None:
        """Give up an attempt under way."""
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)

    async def _try(self, round_: int, block: int, submit: Submit) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                if not await self._book.weights_are_set(round_):
                    scores = await self._book.scores(round_)
                    results = [] if scores is None else scores.results
                    waiting = any(result.status not in _FINAL for result in results)
                    if waiting and self._cycle.phase(block) in ("distribute", "train"):
                        return
                    weights = weights_of(results, self._top_k)
                    if weights:
                        await submit(weights)
                        await self._book.confirm_weights(round_)
                        _log.info("weights are set", round=round_, hotkeys=len(weights))
                self._done = round_
        except Exception as error:  # the SDK raises many kinds; every one means: not confirmed, try again
            _log.warning("weights are not set yet", round=round_, reason=f"{type(error).__name__}: {error}")


async def submit_weights(
    client: Any, netuid: int, uids: Mapping[str, int], key: Key, weights: Mapping[str, float]
) -> None:
    """Submit weights through the SDK's client and wait for finality; hotkeys that left the subnet drop out.

    Raises the SDK's ChainError when the chain refuses.
    """
    import bittensor

    present = {uids[hotkey]: weight for hotkey, weight in weights.items() if hotkey in uids}
    if present:
        intent = bittensor.SetWeights(netuid=netuid, uids=list(present), weights=list(present.values()))
        result = await client.execute(intent, key)
        result.raise_for_failure()
