"""What is known of one claimed submission, and the blocking step of each stage: fetch, read, stage.

The steps run in threads of their own and know nothing of the ledger or the event loop; `pipeline.py` decides when they
run and what their exceptions mean.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bzstream.config import EvaluationSettings
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.fetching import CancelledFetch, Limits, SafeConnector, fetch
from bzstream.evaluation.reading.sandbox import Reader
from bzstream.evaluation.reading.specs import TensorLocation, largest_file
from bzstream.evaluation.rejection_codes import Failure
from bzstream.evaluation.spool import Spool, SpoolEntry
from bzstream.submissions.types import Job, SubmissionRow
from bzstream.util.files import hash_file

if TYPE_CHECKING:
    from bzstream.evaluation.scoring.resident_model import Staged
    from bzstream.evaluation.scoring.scorer import Scorer

__all__ = ["EvaluationTask", "StageRunner"]


class EvaluationTask:
    """One claimed submission. The event loop owns it; each stage fills in what the next one needs."""

    def __init__(self, job: Job, entry: SpoolEntry) -> None:
        self.job = job
        self.entry = entry
        """Its place in the spool."""
        self.cancelled = threading.Event()
        self.lost = False
        """The lease is lost; the job is dropped as soon as its stage notices."""
        self.late = False
        """The round's fetches closed while this one was under way."""
        self.waits = False
        """It was waiting for room in the spool at the last look, and the log has said so."""
        self.waited_blocks = 0
        """Blocks for which it waited for our room; they do not count against its miner."""
        self.baseline: BaselineModel | None = None
        self.locations: list[TensorLocation] = []
        self.scorer: Scorer | None = None
        self.staged: Staged | None = None

    @property
    def record(self) -> SubmissionRow:
        return self.job.record

    @property
    def id(self) -> str:
        return self.job.record.submission_id

    def unstage(self) -> None:
        """Give the staging buffer back, if there is one."""
        staged, self.staged = self.staged, None
        if staged is not None:
            staged.close()


class StageRunner:
    """What the steps task with; shared by all threads."""

    def __init__(self, settings: EvaluationSettings, spool: Spool, connector: SafeConnector, reader: Reader) -> None:
        self.settings = settings
        self.spool = spool
        self.connector = connector
        self.reader = reader

    def fetch(self, task: EvaluationTask, baseline: BaselineModel, too_late: Callable[[EvaluationTask], bool]) -> str:
        """The whole file in the spool, from an earlier attempt or by the network; its SHA-256 in hex.

        Raises Refusal, Failure, CancelledFetch.
        """
        record, entry, settings = task.record, task.entry, self.settings
        if entry.find():
            digest = hash_file(entry.path)
            if record.content_hash in (None, f"sha256:{digest}"):
                return digest
            entry.discard()
        if too_late(task):
            raise Failure("fetched_too_late", "the round closed before this evaluator could fetch the file")

        def reserve(size: int) -> float:
            waited = entry.reserve(size, task.cancelled.is_set)
            if waited is None:
                raise CancelledFetch
            return waited

        limits = Limits.of(settings, largest_file(baseline.group(record.expert_group).specs))
        self.reader.warm_up()
        draft = entry.draft()
        found = fetch(record.checkpoint_url, draft, limits, self.connector, cancelled=task.cancelled, reserve=reserve)
        entry.keep()
        return found.sha256

    def read(self, task: EvaluationTask, baseline: BaselineModel) -> None:
        """Check the spooled file, in a process of its own. Raises Refusal, Failure."""
        group = task.record.expert_group
        bound = baseline.value_bound(group)
        with _spooled_file(task) as fd:
            task.locations = self.reader.read(fd, os.fstat(fd).st_size, baseline.group(group).specs, bound)

    def stage(self, task: EvaluationTask, scorer: Scorer) -> None:
        """Put the checked weights into a staging buffer of the scorer's model. Raises Failure, ModelClosed."""
        with _spooled_file(task) as fd:
            task.scorer, task.staged = scorer, scorer.stage(fd, task.locations, task.record.expert_group)


@contextmanager
def _spooled_file(task: EvaluationTask) -> Iterator[int]:
    try:
        fd = os.open(task.entry.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure("spool_error", f"the spooled file cannot be read: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)
