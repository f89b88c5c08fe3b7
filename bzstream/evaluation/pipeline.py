"""Turns queued submissions into scores: fetch, verify, stage, score, each stage bounded. Runs in the evaluator's loop.

    claim --- fetch (threads, `fetches` at once) --- verify (2 processes) --- ready --- stage (1 ahead) --- score
                 spool: bounded bytes                            waits for the round's seed              1 thread

A submission is fetched as soon as it is queued, because its miner may go away and because the time of the fetch counts;
it is scored once the hash of the first block after the submit phase is known, in the order of rounds and precedence.
Once every submission of a round's group is final, the group is settled: what each of them earns is written.
While one is scored the next is staged, and those after it are fetched and verified.

The ledger is the only memory. The pipeline holds tasks under leases that are renewed four times as often as they run
out; an evaluator that dies simply stops renewing. A restart finds the ledger's queue and the whole files in the spool.
A task whose lease was lost (it ran out, or a later submission superseded this one) is dropped by the stage that it is
in. Every task ends in `_forget`, which gives back its buffer and its room in the spool.

A stage ends a task by raising, and `_outcome` is the table of what each exception means:

    Refusal                      rejected, with the code of the miner's fault (`rejection_codes`)
    Failure                      failed, with the code of our fault
    any other Exception          failed, `internal_error`: a bug
    ModelClosed                  ready again: the model was replaced while the task waited for it
    cancelled, or lease lost     forgotten; rejected `fetch_timeout` when the round closed while it was fetched
    EvaluationError              the run ends: the model or the data do not fit, and no other task would fare better

After a `device_error` the process is of no use (a CUDA context does not recover): the task fails, the others are given
back to the queue and `run` raises, so that the supervisor starts a fresh process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.state import ChainState
from bzstream.config import Settings
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.duplicates import is_duplicate, reject_copies
from bzstream.evaluation.fetching import CancelledFetch
from bzstream.evaluation.records import Records
from bzstream.evaluation.rejection_codes import EvaluationError, Failure, ModelClosed, Refusal
from bzstream.evaluation.settlement import settle_group
from bzstream.evaluation.stages import EvaluationTask, StageRunner
from bzstream.evaluation.threads import WorkerThread, in_thread
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import LeaseLost, Ledger, LedgerUnavailable
from bzstream.submissions.states import FINAL, Status
from bzstream.submissions.types import SubmissionRow

if TYPE_CHECKING:
    from bzstream.evaluation.scoring.scorer import ScoredSubmission, Scorer

__all__ = ["Pipeline"]

_T = TypeVar("_T")
_VERIFIERS = 2
"""Files verified at once: reading runs at the speed of memory, so more would only take it from the model."""


_SETTLE_S = 5.0
"""How often the evaluator looks for groups to settle whose last submission another process ended."""


class _LeaseLost(Exception):
    """The job is somebody else's now, or nobody's; drop it without a word."""


class Pipeline:
    """One evaluator. `make_scorer(baseline)` builds the scorer; it is called in the model's thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        ledger: Ledger,
        records: Records,
        snapshots: SnapshotCache,
        runner: StageRunner,
        make_scorer: Callable[[BaselineModel], Scorer],
        name: str,
    ) -> None:
        self._settings = settings.evaluation
        self._scoring = settings.scoring
        self._cycle = Cycle.of(settings.chain)
        self._ledger = ledger
        self._records = records
        self._snapshots = snapshots
        self._runner = runner
        self._make_scorer = make_scorer
        self._name = name
        self._log = structlog.get_logger("evaluator")
        # The run
        self._stopping = False
        self._fatal: EvaluationError | None = None
        self._chain: ChainState | None = None
        # The jobs
        self._active: set[EvaluationTask] = set()
        """Every job from its claim until `_forget`; also one that was lost, until its stage has noticed."""
        self._preparations: set[asyncio.Task[None]] = set()
        self._verifying = asyncio.Semaphore(_VERIFIERS)
        self._ready: list[EvaluationTask] = []
        self._ready_changed = asyncio.Event()
        self._finished = asyncio.Event()
        """Something ended since the settling loop looked last."""
        self._staged: asyncio.Queue[EvaluationTask] = asyncio.Queue(1)
        # The model
        self._model_thread = WorkerThread("model")
        self._scorer: Scorer | None = None
        self._baselines: dict[str, BaselineModel] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Evaluate until `stop` is set; jobs in hand are then given back. Raises EvaluationError, see above."""
        await self._call(self._reject_latest_copies)
        every = (
            self._claim_loop,
            self._renew_loop,
            self._chain_loop,
            self._staging_loop,
            self._scoring_loop,
            self._settling_loop,
        )
        loops = [asyncio.create_task(loop()) for loop in every]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, *loops], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping = True
            stopped.cancel()
            for task in self._active:
                task.cancelled.set()
            self._runner.reader.close()
            for loop in loops:
                loop.cancel()
            results = await asyncio.gather(*loops, return_exceptions=True)
            await asyncio.gather(*self._preparations, return_exceptions=True)
            await self._give_back()
            if self._scorer is not None and self._fatal is None:
                await self._model_thread.run(self._scorer.close)
            for baseline in self._baselines.values():
                baseline.close()
        for error in (self._fatal, *results):
            if isinstance(error, Exception):
                raise error

    # ---- Claims, leases, the chain --------------------------------------------------------------------------------

    async def _claim_loop(self) -> None:
        while True:
            self._snapshots.refresh()
            self._release_baselines()
            free = self._settings.fetches - len(self._preparations)
            if free > 0 and self._snapshots.current is not None:
                claim = partial(self._ledger.claim, self._name, lease_s=self._settings.lease_s, limit=free)
                for job in await self._call(claim):
                    task = EvaluationTask(job, self._runner.spool.open(job.record.submission_id))
                    self._active.add(task)
                    preparation = asyncio.create_task(self._prepare(task))
                    self._preparations.add(preparation)
                    preparation.add_done_callback(self._preparations.discard)
            await asyncio.sleep(self._settings.poll_s)

    async def _renew_loop(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 4)
            tasks = [task for task in self._active if not task.lost]
            if tasks:
                jobs = [task.job for task in tasks]
                held = await self._call(partial(self._ledger.renew, jobs, lease_s=self._settings.lease_s))
                for task in tasks:
                    if task.id not in held and task in self._active:
                        self._drop(task)

    def _drop(self, task: EvaluationTask) -> None:
        """The lease is lost: to another evaluator, or because a later submission superseded this one."""
        self._log.info("lost", submission=task.id)
        task.lost = True
        task.cancelled.set()
        if task in self._ready:  # no stage is at task on it that would notice
            self._ready.remove(task)
            self._forget(task)

    async def _chain_loop(self) -> None:
        """Follow the chain: new seeds, and the end of a round's fetches."""
        while True:
            before, self._chain = self._chain, await self._call(self._ledger.chain_state)
            self._ready_changed.set()
            passed = self._chain.block - before.block if self._chain is not None and before is not None else 0
            for task in self._active:
                entry = task.entry
                if entry.waited:  # for our room, now or since the last look: these blocks are ours, not the miner's
                    if not task.waits:
                        self._log.info("waiting for room in the spool", submission=task.id)
                    task.waits = entry.waiting
                    task.waited_blocks += max(0, passed)
                    entry.waited = entry.waiting
                elif task.record.status == "fetching" and self._too_late(task):
                    task.late = True
                    task.cancelled.set()
            await asyncio.sleep(self._settings.poll_s)

    def _too_late(self, task: EvaluationTask) -> bool:
        """Whether the round's fetches have closed for a submission. A signed hash keeps it open: the file is fixed."""
        record = task.record
        if self._chain is None or record.checkpoint_hash is not None:
            return False
        grace = self._settings.fetch_grace_blocks + task.waited_blocks
        return self._chain.block > self._cycle.seed_block(record.round) + grace

    def _seed(self, record: SubmissionRow) -> str | None:
        return None if self._chain is None else self._chain.hashes.get(self._cycle.seed_block(record.round))

    async def _call(self, function: Callable[[], _T]) -> _T:
        """A call of the ledger, off the loop, repeated while the ledger does not answer."""
        while True:
            try:
                return await asyncio.to_thread(function)
            except LedgerUnavailable as error:
                self._log.warning("the ledger does not answer", reason=str(error))
                await asyncio.sleep(1.0)

    async def _advance(self, task: EvaluationTask, status: Status, **values: Any) -> None:
        try:
            task.job = await self._call(partial(self._ledger.advance, task.job, status, **values))
        except LeaseLost:
            raise _LeaseLost from None

    async def _give_back(self) -> None:
        for task in list(self._active):
            if task.record.status not in FINAL:  # else the stop came right after the end
                with contextlib.suppress(_LeaseLost):
                    await self._advance(task, "queued")
            self._forget(task)

    def _forget(self, task: EvaluationTask) -> None:
        self._active.discard(task)
        self._finished.set()
        task.unstage()
        task.entry.release()

    # ---- Fetch and verify -----------------------------------------------------------------------------------------

    async def _prepare(self, task: EvaluationTask) -> None:
        """From `fetching` to ready."""
        async with self._outcome(task):
            baseline = task.baseline = await self._baseline_of(task)
            began = time.monotonic()
            digest = await in_thread(partial(self._runner.fetch, task, baseline, self._too_late), "fetch")
            fetched = time.monotonic()
            if task.late and not task.lost:  # the last byte came in the moment in which the round closed: it counts
                task.late = False
                task.cancelled.clear()
            await self._advance(task, "verifying", content_hash=f"sha256:{digest}")
            if task.record.checkpoint_hash not in (None, task.record.content_hash):
                raise Refusal("hash_mismatch", "the file's SHA-256 is not the signed checkpoint_hash")
            async with self._verifying:
                if not task.cancelled.is_set():
                    await in_thread(partial(self._runner.read, task, baseline), "verify")
            if task.cancelled.is_set():
                raise _LeaseLost
            seconds = {"fetch_s": round(fetched - began, 3), "verify_s": round(time.monotonic() - fetched, 3)}
            self._log.info("verified", submission=task.id, **seconds)
            self._make_ready(task)

    def _make_ready(self, task: EvaluationTask) -> None:
        self._ready.append(task)
        self._ready_changed.set()

    async def _baseline_of(self, task: EvaluationTask) -> BaselineModel:
        """The version that the submission builds on: its round's base (`chain.round_base`).

        A ledger of an older bzstream can hold a round without a base. Then it is the newest version that was published
        before the submit phase, else the oldest that there is.
        """
        base = await self._call(partial(self._ledger.round_base, task.record.round))
        snapshots = self._snapshots.versions()
        if base is not None:
            snapshots = [snapshot for snapshot in snapshots if snapshot.version == base]
        if not snapshots:
            raise Failure("version_gone", f"the store does not hold version {base}" if base else "the store is empty")
        before = [snapshot for snapshot in snapshots if snapshot.block <= task.record.round]
        snapshot = before[0] if before else snapshots[-1]
        if snapshot.version not in self._baselines:
            self._baselines[snapshot.version] = BaselineModel(snapshot)
        return self._baselines[snapshot.version]

    def _release_baselines(self) -> None:
        """Let go of versions that nothing needs, so that the disk gets their room back once the store drops them."""
        needed = {task.baseline.version for task in self._active if task.baseline is not None}
        if self._scorer is not None:
            needed.add(self._scorer.version)
        for version in self._baselines.keys() - needed:
            self._baselines.pop(version).close()

    # ---- Stage and score -------------------------------------------------------------------------------------------

    async def _staging_loop(self) -> None:
        """Put the next submission whose seed is known into a staging buffer, one ahead of the scorer."""
        while self._fatal is None:
            due = [task for task in self._ready if self._seed(task.record) is not None]
            if not due:
                self._ready_changed.clear()
                await self._ready_changed.wait()
                continue
            task = min(due, key=lambda w: (w.record.round, w.record.precedence, w.id))
            self._ready.remove(task)
            async with self._outcome(task):
                scorer = await self._scorer_for(task)
                await in_thread(partial(self._runner.stage, task, scorer), "stage")
                await self._staged.put(task)

    async def _scorer_for(self, task: EvaluationTask) -> Scorer:
        """The scorer for the submission's version, loaded now if another is resident (the old one goes first)."""
        baseline = task.baseline
        assert baseline is not None
        if self._scorer is None or self._scorer.version != baseline.version:
            await self._staged.join()
            await self._close_scorer()
            self._log.info("loading the model", version=baseline.version)
            try:
                self._scorer = await self._model_thread.run(partial(self._make_scorer, baseline))
            except Failure as failure:  # not this submission's doing
                raise EvaluationError(f"version {baseline.version} cannot be loaded: {failure.detail}") from None
        return self._scorer

    async def _close_scorer(self) -> None:
        old, self._scorer = self._scorer, None
        if old is not None:
            await self._model_thread.run(old.close)

    async def _scoring_loop(self) -> None:
        while self._fatal is None:
            task = await self._staged.get()
            try:
                async with self._outcome(task):
                    await self._score(task)
                if self._scorer is not None and not self._scorer.model.is_baseline:
                    await self._close_scorer()
            finally:
                self._staged.task_done()

    async def _score(self, task: EvaluationTask) -> None:
        scorer, staged, record = task.scorer, task.staged, task.record
        seed = self._seed(record)
        assert scorer is not None
        assert staged is not None
        if scorer is not self._scorer or seed is None:
            raise ModelClosed  # it was closed after an error, or the chain went back: stage again
        if await self._call(partial(is_duplicate, self._ledger, self._records, record, staged.weights)):
            raise Refusal("duplicate_weights", "the weights are those of a submission with precedence")
        await self._advance(task, "evaluating", model_version=scorer.version)
        task.staged = None  # the scorer closes it
        scoring = partial(
            scorer.score,
            staged,
            seed,
            file_hash=str(record.content_hash),
            submission_id=task.id,
            round_=record.round,
            cancelled=task.cancelled.is_set,
        )
        scored = await self._bounded(self._model_thread.run(scoring))
        found = scored.evaluation
        await self._call(partial(self._records.write, found, scored.sketch, scored.gains))
        await self._advance(task, "scored", baseline_loss=found.baseline_loss, loss=found.loss, score=found.score)
        seconds = round(found.seconds["total"], 3)
        self._log.info("scored", submission=task.id, group=found.group, score=found.score, seconds=seconds)
        distance = self._settings.copy_distance
        reject = partial(reject_copies, self._ledger, self._records, record.round, found.group, distance)
        for copy, original in await self._call(reject):
            self._log.info("rejected", submission=copy, code="duplicate_weights", of=original)
        self._forget(task)

    def _reject_latest_copies(self) -> None:
        """Reject the copies of the latest round: an evaluator may have died between a score and that. Blocking."""
        latest = self._ledger.scores()
        if latest is None:
            return
        for group in {record.expert_group for record in latest.results}:
            reject_copies(self._ledger, self._records, latest.round, group, self._settings.copy_distance)

    async def _bounded(self, scoring: Awaitable[ScoredSubmission]) -> ScoredSubmission:
        """The result, or a Failure that ends this process when one batch alone takes longer than scoring may."""
        try:
            return await asyncio.wait_for(scoring, 2 * self._settings.score_timeout_s)
        except TimeoutError:
            raise Failure("device_error", "the model does not come back from a batch") from None

    async def _settling_loop(self) -> None:
        """Settle each group of a round once nobody works on it any more, whoever finished its last submission."""
        while True:
            self._finished.clear()
            chain = self._chain
            if chain is not None:
                since = self._cycle.round(chain.block) - 2 * self._cycle.length
                for round_, group in await self._call(partial(self._ledger.unsettled, since)):
                    if self._cycle.seed_block(round_) not in chain.hashes:
                        continue  # more may come
                    share = self._scoring.independent_share
                    work = partial(settle_group, self._ledger, self._records, round_, group, share)
                    paid = {pay.submission_id: round(pay.pay, 6) for pay in await self._call(work)}
                    self._log.info("settled", round=round_, group=group, pay=paid)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    await self._finished.wait()

    # ---- Outcomes -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _outcome(self, task: EvaluationTask) -> AsyncIterator[None]:
        """Turn what a stage raises into the job's end."""
        try:
            yield
        except ModelClosed:
            task.unstage()
            if task.lost:
                self._forget(task)
            else:
                self._make_ready(task)
        except (CancelledFetch, InterruptedError, _LeaseLost):
            if task.late and task.record.status == "fetching":
                await self._finish(task, "rejected", "fetch_timeout", "the file had not arrived when the round closed")
            elif not self._stopping:
                self._forget(task)
        except Refusal as refusal:
            await self._finish(task, "rejected", refusal.code, refusal.detail)
        except Failure as failure:
            if failure.code == "device_error":
                self._fatal = EvaluationError(f"the evaluator restarts: {failure.detail}")
            if not self._stopping:  # a reader that this process closed itself is nobody's fault
                await self._finish(task, "failed", failure.code, failure.detail)
        except EvaluationError as error:
            self._fatal = error
            raise
        except Exception:
            # The traceback as text: rendering it with the values of all variables would hold the loop, and the leases.
            self._log.error("evaluation failed", submission=task.id, exception=traceback.format_exc())
            await self._finish(task, "failed", "internal_error", "a fault of the evaluator")

    async def _finish(self, task: EvaluationTask, status: Status, code: str, detail: str) -> None:
        self._log.info(status, submission=task.id, code=code, detail=detail)
        with contextlib.suppress(_LeaseLost):
            await self._advance(task, status, reason=code)
        self._forget(task)
