"""Repeating an evaluation: find the very file again, score it by the record's numbers, and compare to the last bit."""

from __future__ import annotations

import threading
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


def find_file(settings: Settings, record: SubmissionRow, kept: Evaluation, scratch: Path) -> Path:
    """The submitted file: from a spool of this machine, else by its URL into `scratch`.

    Raises EvaluationError when neither gives the bytes that were evaluated, Refusal when fetching fails.
    """
    for path in sorted(spool_folder(settings, settings.store_path()).glob(f"*/{record.submission_id}")):
        if f"sha256:{hash_file(path)}" == kept.file_hash:
            return path
    limits = Limits(
        max_bytes=settings.evaluation.spool_bytes,
        timeout_s=settings.evaluation.fetch_timeout_s,
        stall_s=settings.evaluation.fetch_stall_s,
        max_redirects=settings.evaluation.max_redirects,
        connections=settings.evaluation.fetch_connections,
    )
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
    found: list[str] = []
    for name, what in (
        ("model_hash", "the model"),
        ("slice_hash", "the group's slice"),
        ("file_hash", "the file"),
        ("weights", "the weights"),
        ("tokens_hash", "the evaluation data"),
        ("windows", "the windows"),
    ):
        if getattr(kept, name) != getattr(again, name):
            found.append(f"{what} is not the same")
    numbers = ("baseline_windows", "loss_windows", "baseline_loss", "loss", "score")
    wrong = [name for name in numbers if getattr(kept, name) != getattr(again, name)]
    if wrong:
        places = ("device", "threads", "versions")
        reasons = [
            f"{p} was {getattr(kept, p)}, is {getattr(again, p)}"
            for p in places
            if getattr(kept, p) != getattr(again, p)
        ]
        found.append(f"{', '.join(wrong)} differ ({'; '.join(reasons) or 'on the same device and libraries'})")
    return found
