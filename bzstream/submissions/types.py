"""The plain values that intake, the ledger and the evaluator hand to each other. Immutable; any thread."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from bzstream.submissions.states import FINAL, Status

__all__ = [
    "AdmissionResult",
    "Admitted",
    "Candidate",
    "Duplicate",
    "EvaluationRow",
    "GroupPay",
    "Job",
    "LimitReached",
    "RoundScores",
    "Submission",
    "SubmissionRow",
]


BEFORE_ALL_TIMES = 1e10
"""Taken from a block's number it gives a precedence below every time in seconds since the epoch (2e9 in 2033)."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What a miner's request says, read and checked."""

    hotkey: str
    expert_group: int
    checkpoint_url: str
    block_number: int
    checkpoint_hash: str | None
    """`sha256:<64 hex digits>` of the file behind the URL, when the miner signed one."""
    signature: str
    """As sent: URL-safe base64."""
    signed: bytes
    """The canonical JSON that the signature covers."""

    @property
    def digest(self) -> str:
        """SHA-256 of the signed bytes in hex: two requests with the same one say the same."""
        return hashlib.sha256(self.signed).hexdigest()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A submission that passed every check but those that only the ledger can make."""

    submission: Submission
    round: int
    """First block of the submit phase that it came in."""
    max_per_cycle: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """The submission is durable and queued."""

    submission_id: str
    ahead: int
    """Unfinished submissions before it."""
    evaluators: int
    """Evaluators at work, at least 1."""
    mean_seconds: float | None
    """Mean seconds of recent evaluations; None without history."""

    def eta_blocks(self, *, blocks_to_seed: int, block_s: float) -> int:
        """`evaluation_eta_blocks`: the wait for the round's seed, then the queue at the pace of recent evaluations.

        Without history an evaluation counts as one block. At least 1.
        """
        seconds = block_s if self.mean_seconds is None else self.mean_seconds
        return max(1, blocks_to_seed + math.ceil((self.ahead / self.evaluators + 1) * seconds / block_s))


@dataclass(frozen=True, slots=True)
class Duplicate:
    """(hotkey, block_number) was accepted before; `submission_id` when it was with the very same signed body."""

    submission_id: str | None


@dataclass(frozen=True, slots=True)
class LimitReached:
    """The hotkey has had `limit` submissions accepted in this cycle."""

    limit: int


AdmissionResult = Admitted | Duplicate | LimitReached


@dataclass(frozen=True, slots=True)
class SubmissionRow:
    """A submission as the ledger holds it. Times are seconds since the epoch by the database's clock."""

    submission_id: str
    hotkey: str
    expert_group: int
    checkpoint_url: str
    """For the evaluator alone; never shown."""
    block_number: int
    checkpoint_hash: str | None
    round: int
    status: Status
    reason: str | None
    received_at: float
    fetched_at: float | None
    finished_at: float | None
    content_hash: str | None
    """`sha256:<hex>` of the bytes that were fetched."""
    model_version: str | None
    baseline_loss: float | None
    loss: float | None
    score: float | None
    """The own improvement."""
    pay: float | None
    """What it contributes to its round, in the score's unit; None until its group is settled."""
    attempts: int
    committed_block: int | None
    """The block of a commitment on the chain to the file that was fetched."""

    @property
    def precedence(self) -> float:
        """When this one counts as made, for telling the first from a copy: the lower wins.

        The block of a commitment on the chain to this file, before everything else; else the time of the submission if
        it signed a hash that the file turned out to have; else the time our fetch ended.
        """
        if self.committed_block is not None:
            return self.committed_block - BEFORE_ALL_TIMES
        if self.checkpoint_hash is not None and self.checkpoint_hash == self.content_hash:
            return self.received_at
        return math.inf if self.fetched_at is None else self.fetched_at


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed submission: the record as it was when claimed or last advanced, and the lease's token."""

    record: SubmissionRow
    token: str
    """Every change is conditional on it, so that an evaluator that lost the lease can change nothing."""


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """What is kept of one evaluation. The ledger stores the texts and does not read them."""

    submission_id: str
    round: int
    expert_group: int
    weights: str
    """Hash of the evaluated weights."""
    sketch: str
    record: str
    """JSON: the whole evaluation."""
    gains: bytes
    """Gains of each token; empty when there are none to pay."""


@dataclass(frozen=True, slots=True)
class GroupPay:
    """What the submissions of one group earned in one round."""

    round: int
    pays: Mapping[str, tuple[Status, float]]
    """Submission id -> (the status it was settled with, pay)."""


@dataclass(frozen=True, slots=True)
class RoundScores:
    """The submissions that count in one round, in the order of their acceptance; superseded ones do not."""

    round: int
    model_version: str | None
    results: tuple[SubmissionRow, ...]

    @property
    def unfinished(self) -> int:
        """Submissions that an evaluator has still to work on: to score, or to settle what they earn."""
        return sum(
            result.status not in FINAL or (result.status == "scored" and result.pay is None) for result in self.results
        )
