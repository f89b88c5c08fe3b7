"""The life of a submission, as one table.

    queued -> fetching -> verifying -> evaluating -> scored
Any of them can end early: `rejected` is the miner's fault (score 0), `failed` is ours (no score). A job whose evaluator
died goes back to `queued`. Whatever is not rejected yet can still be: a later submission of the same hotkey in the same
cycle supersedes it, and a copy is found out after it was scored.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["FINAL", "STATUSES", "TRANSITIONS", "WORKING", "Status", "may_follow", "sources"]

Status = Literal["queued", "fetching", "verifying", "evaluating", "scored", "rejected", "failed"]

TRANSITIONS: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"fetching", "rejected", "failed"}),
    "fetching": frozenset({"verifying", "rejected", "failed", "queued"}),
    "verifying": frozenset({"evaluating", "rejected", "failed", "queued"}),
    "evaluating": frozenset({"scored", "rejected", "failed", "queued"}),
    "scored": frozenset({"rejected"}),
    "failed": frozenset({"rejected"}),
    "rejected": frozenset(),
}
"""Status -> what may come next."""

STATUSES: tuple[Status, ...] = tuple(TRANSITIONS)
WORKING: frozenset[Status] = frozenset({"fetching", "verifying", "evaluating"})
"""Somebody holds, or has lost, a lease."""
FINAL: frozenset[Status] = frozenset({"scored", "rejected", "failed"})
"""Nobody works on it any more."""


def may_follow(status: Status, following: Status) -> bool:
    """Whether a submission in `status` may come into `following`."""
    return following in TRANSITIONS[status]


def sources(following: Status) -> tuple[Status, ...]:
    """Every status from which `following` may be reached."""
    return tuple(status for status in STATUSES if following in TRANSITIONS[status])
