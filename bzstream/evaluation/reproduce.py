"""Repeats an evaluation: finds the very file again and compares the numbers of a record with those of its repeat.

`bzstream evaluate --repeat` calls it, in the process of the command.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bzstream.config import Settings
from bzstream.evaluation.fetching import Limits, SafeConnector, fetch
from bzstream.evaluation.records import Evaluation
from bzstream.evaluation.rejection_codes import EvaluationError
from bzstream.evaluation.role import spool_folder
from bzstream.submissions.types import SubmissionRow
from bzstream.util.files import hash_file

__all__ = ["compare", "find_file", "settings_of"]

_INPUTS = {
    "model_hash": "the model",
    "slice_hash": "the group's slice",
    "file_hash": "the file",
    "weights": "the weights",
    "tokens_hash": "the evaluation data",
    "windows": "the windows",
}
"""What a score is computed from: the record's field -> its name in a sentence."""


def find_file(settings: Settings, record: SubmissionRow, kept: Evaluation, scratch: Path) -> Path:
    """The submitted file: from a spool of this machine, else by its URL into `scratch`.

    Raises EvaluationError when neither gives the bytes that were evaluated, Refusal when fetching fails.
    """
    for path in sorted(spool_folder(settings, settings.store_path()).glob(f"*/{record.submission_id}")):
        if f"sha256:{hash_file(path)}" == kept.file_hash:
            return path
    limits = Limits.of(settings.evaluation, settings.evaluation.spool_bytes)
    path = scratch / "checkpoint"
    fetched = fetch(record.checkpoint_url, path, limits, SafeConnector(settings.submit), cancelled=threading.Event())
    if f"sha256:{fetched.sha256}" != kept.file_hash:
        raise EvaluationError("the miner's URL no longer gives the file that was evaluated; pass the file itself")
    return path


def settings_of(settings: Settings, kept: Evaluation) -> Settings:
    """The settings under which the record was made, as far as they change the numbers."""
    evaluation = msgspec.structs.replace(
        settings.evaluation,
        data=settings.evaluation.data or kept.data,
        windows=len(kept.windows),
        window_tokens=kept.window_tokens,
        batch=kept.batch,
    )
    return msgspec.structs.replace(settings, evaluation=evaluation)


def compare(kept: Evaluation, again: Evaluation) -> list[str]:
    """What differs between a record and its repeat, as sentences; [] when every number is the same.

    What explains a difference comes first: other data, another model, other libraries, another device.
    """

    def differing(names: Iterable[str]) -> list[str]:
        return [name for name in names if getattr(kept, name) != getattr(again, name)]

    found = [f"{_INPUTS[name]} is not the same" for name in differing(_INPUTS)]
    wrong = differing(("baseline_windows", "loss_windows", "baseline_loss", "loss", "score"))
    if wrong:
        places = differing(("device", "threads", "versions"))
        reasons = [f"{place} was {getattr(kept, place)}, is {getattr(again, place)}" for place in places]
        found.append(f"{', '.join(wrong)} differ ({'; '.join(reasons) or 'on the same device and libraries'})")
    return found
