"""What is kept of each evaluation: enough for another validator to repeat it bit for bit, and to tell copies.

A table of the ledger, one row a submission. The row is written before the submission becomes
`scored` and holds nothing that depends on who wrote it, so that an evaluator that loses its lease in between does no
harm: whoever evaluates the submission next writes the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import delete, insert, select

from bzstream.evaluation.scoring import pack_sketch, unpack_sketch
from bzstream.submissions.database import Database
from bzstream.submissions.schema import evaluations, migrate

__all__ = ["Evaluation", "Records"]


class Evaluation(Struct, frozen=True, kw_only=True):
    """One evaluation, as it was done. Losses are per predicted token unless said otherwise."""

    submission_id: str | None
    """None for a local file."""
    round: int | None
    group: int
    model_version: str
    model_hash: str
    """Content hash of the full model."""
    slice_hash: str
    """Content hash of the group's published slice."""
    file_hash: str
    """`sha256:<hex>` of the submitted file."""
    weights: str
    """BLAKE3 of the weights in the published dtype and order."""
    seed: str
    """Hash of the round's seed block."""
    data: str
    tokens_hash: str
    """SHA-256 of the windows' tokens as little-endian 64-bit integers."""
    windows: tuple[int, ...]
    """First token of each window."""
    window_tokens: int
    batch: int
    baseline_windows: tuple[float, ...]
    """Summed loss of each window."""
    loss_windows: tuple[float, ...]
    baseline_loss: float
    loss: float
    score: float
    device: str
    threads: int
    versions: dict[str, str]
    seconds: dict[str, float]


class Records:
    """The evaluations in the ledger. Blocking; may raise LedgerUnavailable."""

    def __init__(self, where: str | Path) -> None:
        """`where`: as for the ledger, which need not exist yet. Raises LedgerError."""
        self._database = Database(where)
        with self._database.write() as connection:
            migrate(connection)

    def close(self) -> None:
        self._database.close()

    def write(self, evaluation: Evaluation, sketch: tuple[float, ...]) -> None:
        """Keep the evaluation of a submission, in place of an earlier one of it."""
        values: dict[str, Any] = {
            "submission_id": evaluation.submission_id,
            "round": evaluation.round,
            "expert_group": evaluation.group,
            "weights": evaluation.weights,
            "sketch": pack_sketch(sketch),
            "record": msgspec.json.encode(evaluation).decode(),
        }
        with self._database.write() as connection:
            connection.execute(delete(evaluations).where(evaluations.c.submission_id == evaluation.submission_id))
            connection.execute(insert(evaluations).values(**values))

    def find(self, submission_id: str) -> Evaluation | None:
        """The evaluation of a submission."""
        statement = select(evaluations.c.record).where(evaluations.c.submission_id == submission_id)
        with self._database.read() as connection:
            text = connection.execute(statement).scalar_one_or_none()
        return None if text is None else msgspec.json.decode(text, type=Evaluation)

    def fingerprints(self, round_: int, group: int) -> dict[str, tuple[str, tuple[float, ...]]]:
        """Submission id -> (weights, sketch) of all that were evaluated in a round for a group."""
        c = evaluations.c
        statement = select(c.submission_id, c.weights, c.sketch).where(c.round == round_, c.expert_group == group)
        with self._database.read() as connection:
            return {row[0]: (row[1], unpack_sketch(row[2])) for row in connection.execute(statement)}
