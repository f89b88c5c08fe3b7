"""The life of a submission, as one table.

    queued -> fetching -> verifying -> evaluating -> scored
Each state can end early: `rejected` is the miner's fault (score 0), `failed` is ours (no score). A job whose evaluator
died goes back to `queued`. A scored or failed submission can still be rejected: a copy is found out after it was
scored, and a later submission of the same hotkey in the same cycle supersedes the earlier ones.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["FINAL", "LEASED", "STATES", "UNFINISHED", "Status", "may_follow", "predecessors"]

Status = Literal["queued", "fetching", "verifying", "evaluating", "scored", "rejected", "failed"]


class SubmissionState(NamedTuple):
    """One row of the table."""

    following: frozenset[Status]
    leased: bool = False
    """An evaluator holds a lease on the submission, or has lost it."""
    final: bool = False
    """No evaluator will work on it any more."""


STATES: dict[Status, SubmissionState] = {
    "queued": SubmissionState(frozenset({"fetching", "rejected", "failed"})),
    "fetching": SubmissionState(frozenset({"verifying", "rejected", "failed", "queued"}), leased=True),
    "verifying": SubmissionState(frozenset({"evaluating", "rejected", "failed", "queued"}), leased=True),
    "evaluating": SubmissionState(frozenset({"scored", "rejected", "failed", "queued"}), leased=True),
    "scored": SubmissionState(frozenset({"rejected"}), final=True),
    "failed": SubmissionState(frozenset({"rejected"}), final=True),
    "rejected": SubmissionState(frozenset(), final=True),
}

LEASED: frozenset[Status] = frozenset(status for status, state in STATES.items() if state.leased)
FINAL: frozenset[Status] = frozenset(status for status, state in STATES.items() if state.final)
UNFINISHED: tuple[Status, ...] = tuple(status for status in STATES if status not in FINAL)


def may_follow(status: Status, following: Status) -> bool:
    """Whether a submission in `status` may come into `following`."""
    return following in STATES[status].following


def predecessors(following: Status) -> tuple[Status, ...]:
    """Every status from which `following` may be reached."""
    return tuple(status for status in STATES if may_follow(status, following))
