"""The endpoints that take submissions in and tell what became of them. They run on the worker's event loop.

POST /submit has an order of checks of its own (docs/api.md): most of them need the body, and so are `handle`'s.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

from bzstream.api.identity import authorise, claimed_hotkey, refuse_denied
from bzstream.api.schemas import (
    AcceptedBody,
    DuplicateBody,
    InvalidSignatureBody,
    ScoreRow,
    ScoresBody,
    SubmissionStatusBody,
)
from bzstream.api.state import WorkerState, unavailable
from bzstream.http import Endpoint, HttpError, Request, Response
from bzstream.submissions.intake import ChainContext, SubmissionRefused, decide, read_body, refusal_of
from bzstream.submissions.ledger import AsyncLedger, LedgerUnavailable
from bzstream.submissions.types import Admitted, Duplicate, SubmissionRow

__all__ = ["Submissions"]

T = TypeVar("T")

_ROUND = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_NO_STORE = (("Cache-Control", "no-store"),)


class Submissions:
    """The endpoints over one worker's state."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._one_at_a_time = asyncio.Lock()
        """One body a turn of the event loop, with whatever else is due in between: a signature costs 0.1 to 0.2 ms, and
        64 bad ones that came together made /health wait 50 ms."""

    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints by their operation's name."""
        return {
            "submit": Endpoint(self._submit, self._check_submit, reads_body=True),
            "submission": Endpoint(self._status, lambda request: request.params["submission_id"]),
            "scores": Endpoint(self._scores, _read_round),
        }

    def _check_submit(self, request: Request) -> Request:
        """400 for a malformed X-Hotkey, and 403 for a caller that is denied. The other 403s come after the body."""
        refuse_denied(request, self._state, claimed_hotkey(request))
        return request

    async def _submit(self, request: Request) -> Response:
        """202 once the submission is durable."""
        state = self._state
        bound: str | None = request.context.bound
        snapshot = state.snapshots.current
        context = ChainContext(
            groups=None if snapshot is None else snapshot.groups,
            chain=state.chain,
            cycle=state.cycle,
            stale_s=state.settings.chain.stale_s,
            identities=() if bound is None else (bound,),
        )
        try:
            async with self._one_at_a_time:
                await asyncio.sleep(0)
                submission = read_body(request.body, state.settings.submit)
            refuse_denied(request, state, submission.hotkey)
            candidate = decide(submission, context, state.settings.submit)
        except SubmissionRefused as refused:
            if refused.signed_text is None:
                raise _refusal(refused) from None
            body = InvalidSignatureBody(refused.detail, refused.code, refused.signed_text)
            return Response.json(body, status=refused.status)
        authorise(request, state)
        assert context.chain is not None
        block = context.chain.block
        outcome = await self._ask(lambda ledger: ledger.accept(candidate))
        if not isinstance(outcome, Admitted):
            wait_blocks = state.cycle.start(block) + state.cycle.length - block
            refusal = refusal_of(outcome, retry_after=math.ceil(wait_blocks * state.settings.chain.block_s))
            same = outcome.submission_id if isinstance(outcome, Duplicate) else None
            if same is None:
                raise _refusal(refusal)
            return Response.json(DuplicateBody(refusal.detail, refusal.code, same), status=refusal.status)
        eta = outcome.eta_blocks(blocks_to_seed=state.cycle.blocks_to_seed(block), block_s=state.settings.chain.block_s)
        return Response.json(AcceptedBody("accepted", outcome.submission_id, eta), status=202, headers=_NO_STORE)

    async def _status(self, submission_id: str) -> Response:
        """One submission's state; never its URL."""
        record = await self._ask(lambda ledger: ledger.find(submission_id))
        if record is None:
            raise HttpError(404, "unknown_submission", "there is no submission with this id")
        return Response.json(_describe(record), headers=_NO_STORE)

    async def _scores(self, round_: int | None) -> Response:
        """The results of one round."""
        found = await self._ask(lambda ledger: ledger.scores(round_))
        if found is None:
            raise HttpError(404, "unknown_round", "there is no round with results yet, or none of this number")
        rows = [
            ScoreRow(r.hotkey, r.expert_group, r.submission_id, r.status, r.reason, r.score, r.pay)
            for r in found.results
        ]
        return Response.json(ScoresBody(found.round, found.model_version, rows), headers=_NO_STORE)

    async def _ask(self, question: Callable[[AsyncLedger], Awaitable[T]]) -> T:
        """The ledger's answer. Raises HttpError 503, which says nothing about the database."""
        try:
            if self._state.ledger is None:
                raise LedgerUnavailable("it is not open yet")
            return await question(self._state.ledger)
        except LedgerUnavailable:
            raise unavailable("ledger_unavailable", "submissions cannot be read or written now; try again") from None


def _read_round(request: Request) -> int | None:
    """The round that is asked for; None: the latest with results. Raises HttpError 400."""
    text = request.query.get("round")
    if text is not None and not _ROUND.fullmatch(text):
        raise HttpError(400, "invalid_round", "round is a whole number: the first block of a submit phase")
    return None if text is None else int(text)


def _refusal(refused: SubmissionRefused) -> HttpError:
    """A refusal of the intake rules as the HTTP core sends it."""
    headers = () if refused.retry_after is None else (("Retry-After", str(refused.retry_after)),)
    return HttpError(refused.status, refused.code, refused.detail, headers)


def _describe(record: SubmissionRow) -> SubmissionStatusBody:
    return SubmissionStatusBody(
        submission_id=record.submission_id,
        hotkey=record.hotkey,
        expert_group=record.expert_group,
        block_number=record.block_number,
        status=record.status,
        reason=record.reason,
        baseline_loss=record.baseline_loss,
        loss=record.loss,
        score=record.score,
        received_at=_time(record.received_at),
        finished_at=None if record.finished_at is None else _time(record.finished_at),
    )


def _time(seconds: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
