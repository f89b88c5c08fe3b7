"""The base of each round: the model version that its miners were given, against which their work is scored.

A round's base is the version that the store serves at the last block of its cycle's distribute phase. A version that
is published later, while the miners train, is nobody's base in that round. The chain role notes the base, because it
alone sees every block; it calls `observe` and `write` from its event loop. The base is written into the ledger before
the chain's state of the same block, so that no submission of a round can be accepted, or scored, before its base is
known. It is written once: a restart, or a second chain role, changes nothing.

A node that was down at that block, or had no snapshot, notes the version that is in force at the first block it sees
afterwards, and says so in the log. The versions of rounds that are still open (this cycle's and the one before, whose
submissions are scored now) are pinned in the store, so that publishing does not retire them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

import structlog

from bzstream.chain.clock import Cycle
from bzstream.util.warn_once import WarnOnce

__all__ = ["BaseLedger", "BaseRecorder", "BaseStore", "RoundBase"]

_log = structlog.get_logger("bzstream.chain")


class RoundBase(NamedTuple):
    """The base of one round."""

    round: int
    """First block of the round's submit phase."""
    model_version: str
    block: int
    """The block at which the version was seen in force."""


class BaseLedger(Protocol):
    """Where bases are kept: the ledger. Both methods may raise BzstreamError."""

    async def write_round_base(self, base: RoundBase, /) -> bool:
        """Keep the base unless the round has one; whether it was kept."""

    async def round_bases(self, since: int, /) -> Mapping[int, str]:
        """Round -> version of the rounds from `since` on."""


class BaseStore(Protocol):
    """The store of snapshots, as far as bases need it."""

    def current(self) -> str | None:
        """The version in force; None before the first publish."""

    def pin(self, versions: Collection[str], /) -> None:
        """Keep these versions, and no others that were pinned before, from being retired. Raises OSError."""


class BaseRecorder:
    """Notes the base of every round that the chain role sees."""

    def __init__(self, cycle: Cycle, ledger: BaseLedger, store: BaseStore) -> None:
        self._cycle = cycle
        self._ledger = ledger
        self._store = store
        self._pinning = WarnOnce(_log.warning)
        self._noted: int | None = None
        self._pending: list[RoundBase] = []

    def observe(self, block: int) -> None:
        """Called for every block that is seen, before its state is written. Reads one symbolic link."""
        round_ = self._cycle.round(block)
        if round_ == self._noted or block < self._cycle.last_distribute_block(block):
            return
        version = self._store.current()
        if version is not None:
            self._noted = round_
            self._pending.append(RoundBase(round_, version, block))

    async def write(self) -> None:
        """Write what was noted since the last call. Raises BzstreamError; the next call then tries again."""
        while self._pending:
            base = self._pending[0]
            if await self._ledger.write_round_base(base):
                due = self._cycle.last_distribute_block(base.block)
                if base.block == due:
                    _log.info("base of the round", round=base.round, version=base.model_version)
                else:
                    _log.warning(
                        "this node saw nothing of the last block of the distribute phase; the round is scored against"
                        " the version in force at the first block seen after it",
                        round=base.round,
                        version=base.model_version,
                        block=base.block,
                        due=due,
                    )
            versions = await self._ledger.round_bases(base.round - self._cycle.length)
            try:
                self._store.pin(set(versions.values()))
                self._pinning.succeeded()
            except OSError as error:
                self._noted = None  # the next block tries again
                self._pinning.failed("the base of the round cannot be pinned in the store", reason=error.strerror)
            self._pending.pop(0)
