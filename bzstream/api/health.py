"""GET /health and GET /ready: how the worker is, for people and for load balancers. Answered on its event loop."""

from __future__ import annotations

import time

from bzstream.api.schemas import HealthBody
from bzstream.api.state import WorkerState
from bzstream.http import Endpoint, Request, Response

__all__ = ["EVALUATOR_SILENCE_S", "HealthEndpoint"]

EVALUATOR_SILENCE_S = 60.0
"""An evaluator writes a sign of life every few seconds; after so long without one it is down."""


class HealthEndpoint:
    """Both endpoints over one worker's state. No limit holds for them: a full or draining worker answers, too."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state

    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints by their operation's name."""
        return {"health": Endpoint(self._health, limited=False), "ready": Endpoint(self._ready, limited=False)}

    def _health(self, _: Request) -> Response:
        """Always 200: the process can answer."""
        return Response.json(self.describe(time.time()))

    def _ready(self, _: Request) -> Response:
        """200 when this worker can serve downloads and take submissions in their phase, else 503."""
        now = time.time()
        ready = not self._state.draining and self._state.snapshots.current is not None and not self._obstacles(now)
        headers = () if ready else (("Retry-After", "1"),)
        return Response.json(self.describe(now), status=200 if ready else 503, headers=headers)

    def describe(self, now: float) -> HealthBody:
        """The health at `now` (epoch seconds)."""
        state = self._state
        reasons = self._obstacles(now) + self._faults()
        loaded = state.snapshots.current is not None
        block = 0 if state.chain is None else state.chain.block
        named = bool(state.settings.chain.phases)
        return HealthBody(
            status="draining" if state.draining else "starting" if not loaded else "degraded" if reasons else "healthy",
            model_loaded=loaded,
            current_block=block,
            phase="distribute" if state.chain is None else state.cycle.phase(block),
            phase_detail=state.cycle.detail(block).name if state.chain is not None and named else None,
            reasons=reasons,
            chain_age_s=None if state.chain is None or not reasons else round(state.chain.age(now), 1),
        )

    def _obstacles(self, now: float) -> list[str]:
        """What keeps submissions out, a sentence each."""
        state, found = self._state, []
        if state.chain is None:
            found.append("the chain is not known")
        elif (age := state.chain.age(now)) > state.settings.chain.stale_s:
            found.append(f"the chain was last heard of {age:.0f} s ago")
        if state.ledger_problem is not None:
            found.append(state.ledger_problem)
        elif state.ledger is None:
            found.append("the ledger cannot be reached")
        return found

    def _faults(self) -> list[str]:
        """What else is wrong, a sentence each, for the operator."""
        state = self._state
        found = [f"the file of {label} was damaged on disk" for label in state.damaged]
        if state.snapshots.problem is not None:
            found.append(state.snapshots.problem)
        if state.weights is not None and state.weights.outcome in ("refused", "missed"):
            found.append(f"the weights of round {state.weights.round} are not set: {state.weights.reason}")
        silence = state.evaluator_age
        if state.settings.evaluation.enabled and (silence is None or silence > EVALUATOR_SILENCE_S):
            found.append("no evaluator is running")
        return found
