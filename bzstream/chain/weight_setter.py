"""Setting weights: which round, when, and again until they have landed in a final block or cannot.

The rule is `weights`; the SDK is behind `SubnetChain` (`sdk_weights`). The chain role calls `consider` at every block,
from its event loop; one attempt runs at a time, beside the watching of blocks.

What becomes of a round's weights is kept in the ledger (`RoundWeights`), so that a role that was killed goes on where
it was. A round is never sent twice: before a signature leaves this process the ledger holds "sent", and from then on
the chain is asked (LastUpdate of our UID, in a final block) until the weights are seen there, or the extrinsic's era is
over and it cannot land any more. Only then is another attempt made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.commitments import RoundCommitments
from bzstream.chain.keys import Key
from bzstream.chain.weights import (
    RoundWeights,
    ScoredResult,
    WeightLimits,
    WeightsImpossible,
    fit,
    smooth,
    weights_of,
    with_burn,
)
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError

__all__ = [
    "ERA_BLOCKS",
    "NotingSigner",
    "RoundLedger",
    "RoundResults",
    "Subnet",
    "SubnetChain",
    "WeightSetter",
    "WeightsRefused",
]

RETRY_BLOCKS = 5
"""Blocks between two attempts: a minute, in which a full transaction pool or a node empties."""
REFUSED_RETRY_BLOCKS = 100
"""Blocks after a permanent refusal, in which an operator may have put the reason right."""
ERA_BLOCKS = 16
"""Blocks in which a signed extrinsic may be included. Finality takes about 3; the SDK's own 128 would leave half an
hour in which an attempt without an answer could still land."""
SLACK_BLOCKS = 8
"""How far the chain may be from the head that we knew when we signed: a node that is ahead, a short reorganisation."""
ATTEMPT_S = 300.0
"""Longest attempt; finality takes about 30 s."""

_log = structlog.get_logger("bzstream.chain")


class WeightsRefused(BzstreamError):
    """The chain or its pool does not take the weights. `permanent`: not until something changes."""

    def __init__(self, detail: str, *, permanent: bool) -> None:
        super().__init__(detail)
        self.permanent = permanent


class RoundResults(Protocol):
    """One round as the ledger tells it."""

    @property
    def results(self) -> Sequence[ScoredResult]: ...
    @property
    def unfinished(self) -> int:
        """Submissions that an evaluator has still to work on."""


class RoundLedger(Protocol):
    """What the ledger knows of rounds. Every method may raise BzstreamError."""

    async def scores(self, round_: int, /) -> RoundResults | None: ...
    async def round_weights(self, round_: int, /) -> RoundWeights | None: ...
    async def weights_before(self, round_: int, /) -> RoundWeights | None:
        """Those of the newest earlier round that has any."""

    async def write_round_weights(self, weights: RoundWeights, /) -> None: ...
    async def write_commitments(self, commitments: RoundCommitments, /) -> None: ...


class Subnet(NamedTuple):
    """The subnet at the moment of an attempt."""

    uids: Mapping[str, int]
    limits: WeightLimits
    owner: str | None
    """The owner's hotkey."""


class SubnetChain(Protocol):
    """The chain, as far as setting weights needs it."""

    async def subnet(self) -> Subnet:
        """The subnet now. Raises WeightsRefused when this chain cannot be asked."""

    async def settled(self, hotkey: str, /) -> tuple[int, int | None]:
        """The newest final block, and the LastUpdate of the hotkey's UID in it; None when it has no UID."""

    async def send(self, weights: Mapping[int, float], version_key: int, signer: NotingSigner, /) -> int:
        """Send weights and wait until they are final; the block that holds them. Raises WeightsRefused."""


class NotingSigner:
    """Our key as the SDK takes a signer, which lets us know of a signature before the SDK has it."""

    def __init__(self, key: Key, note: Callable[[], Awaitable[None]]) -> None:
        self.ss58_address = key.ss58_address
        self.public_key = key.public_key
        self.crypto_type = key.crypto_type
        self.signed = False
        self._key = key
        self._note = note

    async def sign(self, message: bytes) -> bytes:
        """The signature over `message`; the SDK awaits it."""
        await self._note()
        self.signed = True
        return self._key.sign(message)


class WeightSetter:
    """Decides at each block whether an attempt is due, and makes it."""

    def __init__(self, ledger: RoundLedger, cycle: Cycle, settings: ChainSettings, key: Key) -> None:
        self._ledger = ledger
        self._cycle = cycle
        self._settings = settings
        self._key = key
        self._head = 0
        self._done: int | None = None
        self._round: int | None = None
        """The round that was due at the last block; `_not_before` is about this one."""
        self._not_before = 0
        self._told: str | None = None
        """The refusal that was told last."""
        self._attempt: asyncio.Task[None] | None = None

    def consider(self, block: int, last_update: int | None, chain: SubnetChain) -> None:
        """Called at each new block; starts an attempt when one is due and none is under way.

        `last_update`: when our weights were last set, as far as is known.
        """
        self._head = block
        round_ = self._cycle.due_round(block)
        if round_ != self._round:
            self._round, self._not_before = round_, 0
        if round_ is None or block < self._not_before:
            return
        silent = last_update is not None and block - last_update >= self._settings.keep_alive_blocks
        if round_ == self._done and not silent:
            return
        if not self.busy:
            self._not_before = block + RETRY_BLOCKS
            self._attempt = asyncio.create_task(self._try(round_, block, silent, chain))

    @property
    def busy(self) -> bool:
        """Whether an attempt is under way."""
        return self._attempt is not None and not self._attempt.done()

    async def close(self) -> None:
        """Give up an attempt under way."""
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)

    async def _try(self, round_: int, block: int, silent: bool, chain: SubnetChain) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                if await self._close_earlier(round_, chain):
                    await self._advance(round_, block, silent, chain)
        except Exception as error:  # the SDK raises many kinds; every one means: look again at a later block
            _log.warning("weights are not set yet", round=round_, reason=_text(error))

    async def _close_earlier(self, round_: int, chain: SubnetChain) -> bool:
        """Settle what is left of the round before; False while its outcome is not known."""
        weights = await self._ledger.weights_before(round_)
        if weights is not None and weights.outcome == "sent":
            weights = await self._settle(weights, chain)
        if weights is not None and weights.outcome == "due":
            reason = f"the next round came first; {weights.reason or 'no attempt was made'}"
            await self._keep(replace(weights, outcome="missed", reason=reason))
        return weights is None or weights.outcome != "sent"

    async def _advance(self, round_: int, block: int, silent: bool, chain: SubnetChain) -> None:
        weights = await self._ledger.round_weights(round_) or RoundWeights(round_)
        if weights.outcome == "sent":
            weights = await self._settle(weights, chain)
        if weights.outcome == "set" and not (silent and await self._is_silent(block, chain)):
            self._done = round_
        elif weights.outcome != "sent":
            results = await self._ledger.scores(round_)
            if results is not None and results.unfinished and self._may_wait(block):
                self._not_before = block + 1
                return
            await self._send(weights, [] if results is None else results.results, block, chain)

    async def _is_silent(self, block: int, chain: SubnetChain) -> bool:
        """Whether our weights have grown old by the chain's own word: what `consider` was told may be old itself."""
        _, last_update = await chain.settled(self._key.ss58_address)
        return last_update is not None and block - last_update >= self._settings.keep_alive_blocks

    def _may_wait(self, block: int) -> bool:
        return self._cycle.phase(block) in ("distribute", "train")

    async def _send(
        self, weights: RoundWeights, results: Sequence[ScoredResult], block: int, chain: SubnetChain
    ) -> None:
        settings = self._settings
        try:
            subnet = await chain.subnet()
        except WeightsRefused as error:
            await self._refused(weights, error, block)
            return
        burn = subnet.owner if settings.burn == "owner" else settings.burn
        earlier = await self._ledger.weights_before(weights.round)
        fresh = with_burn(weights_of(results, settings.weights_top_k), burn, settings.burn_rate)
        shares = smooth({} if earlier is None else earlier.shares, fresh, settings.weights_alpha)
        weights = replace(weights, shares=shares, reason=None)

        async def note() -> None:
            nonlocal weights
            weights = replace(weights, outcome="sent", attempts=weights.attempts + 1, block=self._head)
            await self._keep(weights)

        signer = NotingSigner(self._key, note)
        version_key = settings.weights_version_key
        if version_key is None:
            version_key = subnet.limits.version_key
        try:
            if not shares:
                raise WeightsImpossible("nobody scored above zero and chain.burn is not set")
            sent = fit(shares, subnet.uids, burn, subnet.limits)
            landed = await chain.send(sent, version_key, signer)
        except (WeightsImpossible, WeightsRefused) as error:
            await self._refused(weights, error, block)
        except Exception as error:
            if not signer.signed:
                await self._keep(replace(weights, outcome="due", reason=_text(error)))
                raise
            await self._keep(replace(weights, reason=f"no answer from the chain: {_text(error)}"))
            raise
        else:
            await self._landed(replace(weights, block=landed))

    async def _refused(self, weights: RoundWeights, error: BzstreamError, block: int) -> None:
        """Keep a refusal, and tell it: a permanent one as an error, once."""
        permanent = not isinstance(error, WeightsRefused) or error.permanent
        await self._keep(replace(weights, outcome="refused" if permanent else "due", reason=str(error)))
        if not permanent:
            _log.warning("weights are not set yet", round=weights.round, reason=str(error))
            return
        self._not_before = block + REFUSED_RETRY_BLOCKS
        if str(error) != self._told:
            self._told = str(error)
            _log.error("weights are refused until this is put right", round=weights.round, reason=str(error))

    async def _settle(self, weights: RoundWeights, chain: SubnetChain) -> RoundWeights:
        """Ask the chain what became of an attempt: set, still open ("sent"), or dead ("due")."""
        assert weights.block is not None
        final, last_update = await chain.settled(self._key.ss58_address)
        if last_update is not None and last_update > weights.block - SLACK_BLOCKS:
            return await self._landed(replace(weights, block=last_update))
        if final < weights.block + ERA_BLOCKS + SLACK_BLOCKS:
            return weights
        dead = replace(weights, outcome="due", reason=weights.reason or "the extrinsic did not land in its era")
        return await self._keep(dead)

    async def _landed(self, weights: RoundWeights) -> RoundWeights:
        self._done, self._told = weights.round, None
        _log.info("weights are set", round=weights.round, hotkeys=len(weights.shares), block=weights.block)
        return await self._keep(replace(weights, outcome="set", reason=None))

    async def _keep(self, weights: RoundWeights) -> RoundWeights:
        await self._ledger.write_round_weights(weights)
        return weights


def _text(error: Any) -> str:
    return str(error) if isinstance(error, BzstreamError) else f"{type(error).__name__}: {error}"[:300]
