"""What one HTTP worker knows at this moment. Endpoints answer from it without waiting for anything.

The worker's pollers (`worker.py`) put new values in; endpoints only read. All of it belongs to the thread of the
worker's event loop. Downloads of slices and shared tensors need `snapshots` alone, so that they go on while the chain
and the ledger are away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bzstream.api.access import AccessFiles
from bzstream.chain.clock import Cycle
from bzstream.chain.proofs import NonceCache
from bzstream.chain.state import ChainState
from bzstream.chain.weights import RoundWeights
from bzstream.config import Settings
from bzstream.http import HttpError
from bzstream.model import Snapshot, SnapshotCache
from bzstream.submissions.ledger import AsyncLedger

__all__ = ["WorkerState", "unavailable"]


def unavailable(code: str, detail: str) -> HttpError:
    """A 503 for something that is missing at the moment."""
    # It is looked for several times a second, so that a few seconds are enough.
    return HttpError(503, code, detail, (("Retry-After", "5"),))


@dataclass(slots=True)
class WorkerState:
    """Mutable; see the head of this file."""

    settings: Settings
    snapshots: SnapshotCache
    access: AccessFiles
    ledger: AsyncLedger | None
    """None until the ledger could be opened; only /submit, /submissions and /scores need it."""
    loopback: bool
    """Whether the listener's own address is a loopback one: nothing crosses a network in clear."""
    chain: ChainState | None = None
    evaluator_age: float | None = None
    """Seconds since an evaluator's last sign of life, when the ledger was last read; None: there never was one."""
    ledger_problem: str | None = None
    """Why the ledger cannot be used, when it was last read."""
    weights: RoundWeights | None = None
    """What became of the newest round's weights on the chain; None where this node sets none."""
    damaged: list[str] = field(default_factory=list)
    """Labels of units whose file was cut or changed on disk."""
    draining: bool = False
    nonces: NonceCache = field(default_factory=NonceCache)

    def snapshot(self, version: str | None) -> Snapshot:
        """A version that is served, the current one for None. Raises HttpError 503 and 404."""
        if self.snapshots.current is None:
            raise unavailable("model_not_loaded", "no model is published yet; try again later")
        found = self.snapshots.current if version is None else self.snapshots.get(version)
        if found is None:
            raise HttpError(404, "unknown_version", "this version is not kept here; see GET /model for those that are")
        return found

    @property
    def cycle(self) -> Cycle:
        return Cycle.of(self.settings.chain)
