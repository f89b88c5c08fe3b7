"""The endpoints that take submissions in and tell what became of them."""

from __future__ import annotations

import asyncio
import math
import re
from datetime import UTC, datetime

from bzstream.api import documents
from bzstream.api.documents import DuplicateBody, ScoreRow, Scores, SubmissionStatus
from bzstream.api.identity import authorise, claimed_hotkey
from bzstream.api.view import RETRY_SOON, View
from bzstream.http import Endpoint, HttpError, Request, Response
from bzstream.submissions.intake import Refused, Situation, decide, read_body, refusal_of
from bzstream.submissions.ledger import AsyncLedger, LedgerUnavailable
from bzstream.submissions.records import Accepted, Duplicate, Record

__all__ = ["Submissions"]

_ROUND = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_NO_STORE = (("Cache-Control", "no-store"),)


class Submissions:
    """The endpoints over one worker's view."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._lane = asyncio.Lock()
        """One body a turn of the event loop, whoever else wants something in between: a signature costs 0.1 to 0.2 ms,
        and 64 bad ones that come together made /health wait 50 ms."""

    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints by their operation's name."""
        return {
            "submit": Endpoint(self._submit, self._check_submit, reads_body=True),
            "submission": Endpoint(self._status, self._check_status),
            "scores": Endpoint(self._scores, self._check_scores),
        }

    def _check_submit(self, request: Request) -> Request:
        """400 for a malformed X-Hotkey; as a mere claim it need not be the submission's. 403 comes after the body's."""
        claimed_hotkey(request)
        return request

    def _check_status(self, request: Request) -> str:
        """The submission that is asked for."""
        authorise(request, self._view.settings.auth, loopback=self._view.loopback)
        return request.params["submission_id"]

    def _check_scores(self, request: Request) -> int | None:
        """The round that is asked for; None: the latest with results."""
        text = request.query.get("round")
        if text is not None and not _ROUND.fullmatch(text):
            raise HttpError(400, "invalid_round", "round is a whole number: the first block of a submit phase")
        authorise(request, self._view.settings.auth, loopback=self._view.loopback)
        return None if text is None else int(text)

    async def _submit(self, request: Request) -> Response:
        """202 once the submission is durable; the order of refusals is the contract's own for this endpoint."""
        view = self._view
        bound: str | None = request.context.bound
        snapshot = view.library.current
        situation = Situation(
            groups=None if snapshot is None else snapshot.groups,
            chain=view.chain,
            cycle=view.cycle,
            stale_s=view.settings.chain.stale_s,
            identities=() if bound is None else (bound,),
        )
        try:
            async with self._lane:
                await asyncio.sleep(0)
                submission = read_body(request.body, view.settings.submit)
            candidate = decide(submission, situation, view.settings.submit)
        except Refused as refused:
            raise _refusal(refused) from None
        authorise(request, view.settings.auth, loopback=view.loopback)
        assert situation.chain is not None
        block = situation.chain.block
        try:
            outcome = await self._ledger().accept(candidate)
        except LedgerUnavailable:
            raise _unavailable() from None
        if not isinstance(outcome, Accepted):
            wait_blocks = view.cycle.start(block) + view.cycle.length - block
            refusal = refusal_of(outcome, retry_after=math.ceil(wait_blocks * view.settings.chain.block_s))
            same = outcome.submission_id if isinstance(outcome, Duplicate) else None
            if same is None:
                raise _refusal(refusal)
            return Response.json(DuplicateBody(refusal.detail, refusal.code, same), status=refusal.status)
        eta = outcome.eta_blocks(blocks_to_seed=view.cycle.blocks_to_seed(block), block_s=view.settings.chain.block_s)
        return Response.json(documents.Accepted("accepted", outcome.submission_id, eta), status=202, headers=_NO_STORE)

    async def _status(self, submission_id: str) -> Response:
        """One submission's state; never its URL."""
        ledger = self._ledger()
        try:
            record = await ledger.find(submission_id)
        except LedgerUnavailable:
            raise _unavailable() from None
        if record is None:
            raise HttpError(404, "unknown_submission", "there is no submission with this id")
        return Response.json(_describe(record), headers=_NO_STORE)

    async def _scores(self, round_: int | None) -> Response:
        """The results of one round."""
        ledger = self._ledger()
        try:
            found = await ledger.scores(round_)
        except LedgerUnavailable:
            raise _unavailable() from None
        if found is None:
            raise HttpError(404, "unknown_round", "there is no round with results yet, or none of this number")
        rows = [ScoreRow(r.hotkey, r.expert_group, r.submission_id, r.status, r.reason, r.score) for r in found.results]
        return Response.json(Scores(found.round, found.model_version, rows), headers=_NO_STORE)

    def _ledger(self) -> AsyncLedger:
        if self._view.ledger is None:
            raise HttpError(503, "ledger_unavailable", "submissions cannot be read or written now", RETRY_SOON)
        return self._view.ledger


def _refusal(refused: Refused) -> HttpError:
    """A refusal of the intake rules as the HTTP core sends it."""
    headers = () if refused.retry_after is None else (("Retry-After", str(refused.retry_after)),)
    return HttpError(refused.status, refused.code, refused.detail, headers)


def _unavailable() -> HttpError:
    """What a caller is told when the database does not answer: nothing about the database."""
    return HttpError(503, "ledger_unavailable", "submissions cannot be read or written now; try again", RETRY_SOON)


def _describe(record: Record) -> SubmissionStatus:
    return SubmissionStatus(
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
