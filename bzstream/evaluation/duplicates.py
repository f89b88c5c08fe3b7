"""Finds copies among all of a round's submissions in the ledger, by the rules of `scoring.copies`.

Any evaluator may finish a round's last submission, so each looks at all submissions that are there whenever it has
finished one. Blocking: the pipeline calls it in a thread.
"""

from __future__ import annotations

from bzstream.evaluation.records import Records
from bzstream.evaluation.scoring.copies import Fingerprint, copies
from bzstream.submissions.ledger import Ledger
from bzstream.submissions.types import SubmissionRow

__all__ = ["is_duplicate", "reject_copies"]


def is_duplicate(ledger: Ledger, records: Records, record: SubmissionRow, weights: str) -> bool:
    """Whether a submission of another hotkey has precedence and the very same weights; then scoring is not needed."""
    known = records.fingerprints(record.round, record.expert_group)
    twins = [ledger.find(name) for name, (theirs, _) in known.items() if theirs == weights]
    mine = (record.precedence, record.hotkey)
    return any(
        other.hotkey != record.hotkey and other.reason != "superseded" and (other.precedence, other.hotkey) < mine
        for other in twins
        if other is not None
    )


def reject_copies(ledger: Ledger, records: Records, round_: int, group: int, distance: float) -> list[tuple[str, str]]:
    """Reject what turned out to be a copy, whichever of the two was scored first; (copy, original) of each."""
    prints = records.fingerprints(round_, group)
    scores = ledger.scores(round_)
    counted = [r for r in scores.results if r.submission_id in prints] if scores is not None else []
    candidates = [
        Fingerprint(r.submission_id, r.hotkey, r.precedence, *prints[r.submission_id])
        for r in counted
        if r.status == "scored" or r.reason == "duplicate_weights"
    ]
    scored = {r.submission_id for r in counted if r.status == "scored"}
    found = copies(candidates, distance)
    return [(c, o) for c, o in found.items() if c in scored and ledger.reject(c, "duplicate_weights")]
