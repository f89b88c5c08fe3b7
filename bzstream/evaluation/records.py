"""What is kept of each evaluation: enough for another validator to repeat it bit for bit, and to recognise copies.

A table of the ledger, one row a submission. The row is written before the submission becomes `scored`, and nothing in
it depends on the evaluator that wrote it. So an evaluator that loses its lease in between does no harm: the next one
that evaluates the submission writes the same numbers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bzstream.submissions.ledger import Ledger
from bzstream.submissions.types import EvaluationRow

__all__ = ["Evaluation", "Records", "pack_sketch", "unpack_sketch"]


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
    """The evaluations in the ledger, with their numbers decoded. Blocking; may raise LedgerUnavailable."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def write(
        self, evaluation: Evaluation, sketch: tuple[float, ...], gains: NDArray[np.float16] | None = None
    ) -> None:
        """Keep the evaluation of a submission, in place of an earlier one of it.

        `gains`: [steps, windows, tokens]; None when it did not pass the floor, and so earns nothing.
        """
        assert evaluation.submission_id is not None
        assert evaluation.round is not None
        self._ledger.write_evaluation(
            EvaluationRow(
                submission_id=evaluation.submission_id,
                round=evaluation.round,
                expert_group=evaluation.group,
                weights=evaluation.weights,
                sketch=pack_sketch(sketch),
                gains=b"" if gains is None else _pack_array(gains),
                record=msgspec.json.encode(evaluation).decode(),
            )
        )

    def find(self, submission_id: str) -> Evaluation | None:
        """The evaluation of a submission."""
        row = self._ledger.evaluation(submission_id)
        return None if row is None else msgspec.json.decode(row.record, type=Evaluation)

    def fingerprints(self, round_: int, group: int) -> dict[str, tuple[str, tuple[float, ...]]]:
        """Submission id -> (weights, sketch) of all that were evaluated in a round for a group."""
        rows = self._ledger.evaluations(round_, group)
        return {row.submission_id: (row.weights, unpack_sketch(row.sketch)) for row in rows}

    def gains(self, round_: int, group: int) -> dict[str, NDArray[np.float32] | None]:
        """Submission id -> its gains, of all that were evaluated in a round for a group; None: below the floor.

        What is missing was evaluated by an older bzstream, or its gains were deleted after its round was settled.
        """
        packed = self._ledger.gains(round_, group)
        return {name: _unpack_array(raw) if raw else None for name, raw in packed.items()}


def _pack_array(array: NDArray[np.float16]) -> bytes:
    """An array in the .npy format, which tells its shape."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _unpack_array(raw: bytes) -> NDArray[np.float32]:
    array: NDArray[np.float32] = np.load(io.BytesIO(raw), allow_pickle=False).astype(np.float32)
    return array


def pack_sketch(sketch: Sequence[float]) -> str:
    """A sketch as text for the ledger: base64 of little-endian float32."""
    return base64.b64encode(np.asarray(sketch, "<f4").tobytes()).decode()


def unpack_sketch(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in np.frombuffer(base64.b64decode(text), "<f4"))
