"""What one HTTP worker knows at this moment; the endpoints answer from it without waiting for anything.

The worker's pollers (`worker.py`) put new values in; endpoints only read. Downloads of slices and shared tensors need
`library` alone: they go on while the chain and the ledger are away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bzstream.api.tokens import TokensFile
from bzstream.chain.clock import Cycle
from bzstream.chain.proofs import NonceCache
from bzstream.chain.state import ChainState
from bzstream.config import Settings
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import AsyncLedger

__all__ = ["RETRY_SOON", "View"]

RETRY_SOON = (("Retry-After", "5"),)
"""Header fields of a 503: what is missing is looked for several times a second, so a few seconds are enough."""


@dataclass(slots=True)
class View:
    """Mutable, owned by the worker's event loop."""

    settings: Settings
    library: SnapshotCache
    tokens: TokensFile
    ledger: AsyncLedger | None
    """None until the ledger could be opened; only /submit, /submissions and /scores need it."""
    loopback: bool
    """Whether the listener's own address is a loopback one: nothing crosses a network in clear."""
    chain: ChainState | None = None
    evaluator_age: float | None = None
    """Seconds since an evaluator's last sign of life, when the ledger was last asked; None: there never was one."""
    damaged: list[str] = field(default_factory=list)
    """Labels of units whose file was cut or changed on disk."""
    draining: bool = False
    nonces: NonceCache = field(default_factory=NonceCache)

    @property
    def cycle(self) -> Cycle:
        return Cycle.of(self.settings.chain)
