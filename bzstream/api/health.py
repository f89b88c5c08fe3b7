"""GET /health: always 200 while the process can answer, whatever state it is in."""

from __future__ import annotations

import time

from bzstream.api.documents import Health
from bzstream.api.view import View
from bzstream.http import Request, Response

__all__ = ["EVALUATOR_SILENCE_S", "Healthy"]

EVALUATOR_SILENCE_S = 60.0
"""An evaluator writes a sign of life every few seconds; silent for so long, it is down."""


class Healthy:
    """The handler, over one worker's view."""

    def __init__(self, view: View) -> None:
        self._view = view

    def health(self, request: Request) -> Response:
        """Status, whether a model is loaded, block and phase; the reasons when the status is not healthy."""
        return Response.json(self.describe(time.time()))

    def describe(self, now: float) -> Health:
        """The health at `now` (epoch seconds)."""
        view = self._view
        reasons = self.reasons(now)
        loaded = view.library.current is not None
        block = 0 if view.chain is None else view.chain.block
        return Health(
            status="draining" if view.draining else "starting" if not loaded else "degraded" if reasons else "healthy",
            model_loaded=loaded,
            current_block=block,
            phase="distribute" if view.chain is None else view.cycle.phase(block),
            reasons=reasons,
            chain_age_s=None if view.chain is None or not reasons else round(view.chain.age(now), 1),
        )

    def reasons(self, now: float) -> list[str]:
        """What is wrong, a sentence each, for the operator who looks."""
        view, found = self._view, []
        if view.chain is None:
            found.append("the chain is not known")
        elif (age := view.chain.age(now)) > view.settings.chain.stale_s:
            found.append(f"the chain was last heard of {age:.0f} s ago")
        if view.ledger is None:
            found.append("the ledger cannot be reached")
        silence = view.evaluator_age
        if view.settings.evaluation.enabled and (silence is None or silence > EVALUATOR_SILENCE_S):
            found.append("no evaluator is running")
        found += [f"the file of {label} was damaged on disk" for label in view.damaged]
        return found
