"""ChainState: what the node knows of the chain at one moment, a plain immutable value.

The chain role makes it, the ledger carries it to every process, and the http workers answer from it. `observed_at` is
the moment at which the chain role last knew this state to be true, not the time of the block. The role confirms a
frozen chain file every few seconds, so that its state stays fresh while the role runs and grows old when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["ChainState"]


@dataclass(frozen=True, slots=True)
class ChainState:
    """One view of the chain."""

    block: int
    """Most recently observed block."""
    observed_at: float
    """Seconds since the epoch, by this machine's clock, when the state was last confirmed."""
    validators: frozenset[str] = frozenset()
    """Hotkeys (SS58) with a validator permit."""
    miners: frozenset[str] | None = None
    """Registered hotkeys (SS58); None: the chain does not say, any hotkey may submit."""
    frozen: bool = False
    """The block does not advance by itself (a chain file with block_seconds 0)."""
    hashes: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    """Hashes (64 hex digits) of finalized blocks that seed recent rounds."""

    def age(self, now: float | None = None) -> float:
        """Seconds since the state was last confirmed; never negative. `now`: seconds since the epoch."""
        return max(0.0, (time.time() if now is None else now) - self.observed_at)

    def is_validator(self, hotkey: str) -> bool:
        """Whether the chain lists `hotkey` with a validator permit."""
        return hotkey in self.validators

    def lists(self, hotkey: str) -> bool:
        """Whether the chain names `hotkey`, as a validator or a miner."""
        return hotkey in self.validators or (self.miners is not None and hotkey in self.miners)

    def is_miner(self, hotkey: str) -> bool:
        """Whether `hotkey` may submit: it is registered, or the chain does not list miners."""
        return self.miners is None or hotkey in self.miners
