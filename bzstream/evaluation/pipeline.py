"""The coroutine that turns queued submissions into scores: fetch -> verify -> evaluate, each stage bounded.

    claim --- fetch (threads, `fetches` at once) --- verify (2 processes) --- ready --- stage (1 ahead) --- judge
                 spool: bounded bytes                            waits for the round's seed              1 thread

A submission is fetched as soon as it is queued, because its miner may go away and because the time of the fetch counts;
it is judged once the hash of the first block after the submit phase is known, in the order of rounds and precedence.
While one is judged the next is staged, and those after it are fetched and verified.

The ledger is the only memory. Everything here holds jobs under leases that are renewed four times as often as they
run out; an evaluator that dies simply stops renewing. What a restart finds again is the ledger's queue and whole files
in the spool. A job that was lost (the lease ran out, or a later submission superseded it) is dropped wherever it is.

Verdicts come as exceptions (`codes`): Refusal makes `rejected`, Failure `failed`, anything else is a bug and makes
`failed` with `internal_error`. After a device error the process is of no use (a CUDA context does not recover): the
verdict is written, the other jobs are given back and `run` raises, so that the supervisor starts a fresh process. The
same happens, without a verdict, when the model or the data do not fit: no other submission would fare better.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from bzstream.chain.clock import Cycle
from bzstream.chain.state import ChainState
from bzstream.config import Settings
from bzstream.evaluation.baseline import BaselineModel, UnitTensors
from bzstream.evaluation.duplicates import is_duplicate, reject_copies
from bzstream.evaluation.fetching import CancelledFetch
from bzstream.evaluation.records import Records
from bzstream.evaluation.rejection_codes import EvaluationError, Failure, ModelClosed, Refusal
from bzstream.evaluation.stages import EvaluationTask, StageRunner
from bzstream.evaluation.threads import Worker, in_thread
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


class _Lost(Exception):
    """The job is somebody else's now, or nobody's; drop it without a word."""


class Pipeline:
    """One evaluator. `make_scorer(published)` builds the judge; it is called in the model's thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        ledger: Ledger,
        records: Records,
        library: SnapshotCache,
        tools: StageRunner,
        make_scorer: Callable[[BaselineModel], Scorer],
        name: str,
    ) -> None:
        self._settings = settings.evaluation
        self._cycle = Cycle.of(settings.chain)
        self._ledger = ledger
        self._records = records
        self._library = library
        self._tools = tools
        self._make_scorer = make_scorer
        self._name = name
        self._log = structlog.get_logger("evaluator")
        # The run
        self._stopping = False
        self._fatal: EvaluationError | None = None
        self._chain: ChainState | None = None
        # The jobs
        self._active: set[EvaluationTask] = set()
        """Every job from its claim until `_leave`; also one that was lost, until its stage has noticed."""
        self._preparing: set[asyncio.Task[None]] = set()
        self._verifying = asyncio.Semaphore(_VERIFIERS)
        self._ready: list[EvaluationTask] = []
        self._wake = asyncio.Event()
        self._staged: asyncio.Queue[EvaluationTask] = asyncio.Queue(1)
        # The model
        self._torch = Worker("model")
        self._scorer: Scorer | None = None
        self._published: dict[str, BaselineModel] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Evaluate until `stop` is set; jobs in hand are then given back. Raises EvaluationError, see above."""
        await self._call(self._settle_latest)
        loops = [
            asyncio.create_task(loop())
            for loop in (self._claiming, self._renewing, self._watching, self._staging_loop, self._scoring_loop)
        ]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, *loops], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping = True
            stopped.cancel()
            for work in self._active:
                work.cancelled.set()
            self._tools.reader.close()
            for loop in loops:
                loop.cancel()
            results = await asyncio.gather(*loops, return_exceptions=True)
            await asyncio.gather(*self._preparing, return_exceptions=True)
            await self._give_back()
            if self._scorer is not None and self._fatal is None:
                await self._torch.run(self._scorer.close)
            for published in self._published.values():
                published.close()
        for error in (self._fatal, *results):
            if isinstance(error, Exception):
                raise error

    # ---- Claims, leases, the chain --------------------------------------------------------------------------------

    async def _claiming(self) -> None:
        while True:
            self._library.refresh()
            self._forget_versions()
            free = self._settings.fetches - len(self._preparing)
            if free > 0 and self._library.current is not None:
                claim = partial(self._ledger.claim, self._name, lease_s=self._settings.lease_s, limit=free)
                for job in await self._call(claim):
                    work = EvaluationTask(job, self._tools.spool.open(job.record.submission_id))
                    self._active.add(work)
                    task = asyncio.create_task(self._prepare(work))
                    self._preparing.add(task)
                    task.add_done_callback(self._preparing.discard)
            await asyncio.sleep(self._settings.poll_s)

    async def _renewing(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 4)
            works = [work for work in self._active if not work.lost]
            if works:
                jobs = [work.job for work in works]
                held = await self._call(partial(self._ledger.renew, jobs, lease_s=self._settings.lease_s))
                for work in works:
                    if work.id not in held and work in self._active:
                        self._drop(work)

    def _drop(self, work: EvaluationTask) -> None:
        """The lease is lost: to another evaluator, or because a later submission superseded this one."""
        self._log.info("lost", submission=work.id)
        work.lost = True
        work.cancelled.set()
        if work in self._ready:  # no stage is at work on it that would notice
            self._ready.remove(work)
            self._leave(work)

    async def _watching(self) -> None:
        """Follow the chain: new seeds, and the end of a round's fetches."""
        while True:
            before, self._chain = self._chain, await self._call(self._ledger.chain_state)
            self._wake.set()
            passed = self._chain.block - before.block if self._chain is not None and before is not None else 0
            for work in self._active:
                entry = work.entry
                if entry.waited:  # for our room, now or since the last look: these blocks are ours, not the miner's
                    if not work.waits:
                        self._log.info("waiting for room in the spool", submission=work.id)
                    work.waits = entry.waiting
                    work.waited_blocks += max(0, passed)
                    entry.waited = entry.waiting
                elif work.record.status == "fetching" and self._too_late(work):
                    work.late = True
                    work.cancelled.set()
            await asyncio.sleep(self._settings.poll_s)

    def _too_late(self, work: EvaluationTask) -> bool:
        """Whether the round's fetches have closed for a submission. A signed hash keeps it open: the file is fixed."""
        record = work.record
        if self._chain is None or record.checkpoint_hash is not None:
            return False
        grace = self._settings.fetch_grace_blocks + work.waited_blocks
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

    async def _advance(self, work: EvaluationTask, status: Status, **values: Any) -> None:
        try:
            work.job = await self._call(partial(self._ledger.advance, work.job, status, **values))
        except LeaseLost:
            raise _Lost from None

    async def _give_back(self) -> None:
        for work in list(self._active):
            if work.record.status not in FINAL:  # else the stop came right after the verdict
                with contextlib.suppress(_Lost):
                    await self._advance(work, "queued")
            self._leave(work)

    def _leave(self, work: EvaluationTask) -> None:
        self._active.discard(work)
        work.unstage()
        work.entry.release()

    # ---- Fetch and verify -----------------------------------------------------------------------------------------

    async def _prepare(self, work: EvaluationTask) -> None:
        """From `fetching` to ready."""
        async with self._verdict(work):
            unit = await self._slice(work)
            began = time.monotonic()
            digest = await in_thread(partial(self._tools.fetch, work, unit, self._too_late), "fetch")
            fetched = time.monotonic()
            await self._advance(work, "verifying", content_hash=f"sha256:{digest}")
            if work.record.checkpoint_hash not in (None, work.record.content_hash):
                raise Refusal("hash_mismatch", "the file's SHA-256 is not the signed checkpoint_hash")
            async with self._verifying:
                if work.cancelled.is_set():
                    raise _Lost
                await in_thread(partial(self._tools.read, work), "verify")
            seconds = {"fetch_s": round(fetched - began, 3), "verify_s": round(time.monotonic() - fetched, 3)}
            if work.lost:
                raise _Lost
            self._log.info("verified", submission=work.id, **seconds)
            self._ready.append(work)
            self._wake.set()

    async def _slice(self, work: EvaluationTask) -> UnitTensors:
        """The slice that the submission builds on: that of its round's base (`chain.round_base`).

        A ledger of an older bzstream can hold a round without a base. Then it is the newest version that was published
        before the submit phase, else the oldest that there is.
        """
        base = await self._call(partial(self._ledger.round_base, work.record.round))
        snapshots = self._library.versions()
        if base is not None:
            snapshots = [snapshot for snapshot in snapshots if snapshot.version == base]
        if not snapshots:
            raise Failure("version_gone", f"the store does not hold version {base}" if base else "the store is empty")
        before = [snapshot for snapshot in snapshots if snapshot.block <= work.record.round]
        snapshot = before[0] if before else snapshots[-1]
        if snapshot.version not in self._published:
            self._published[snapshot.version] = BaselineModel(snapshot)
        work.published = self._published[snapshot.version]
        return work.published.group(work.record.expert_group)

    def _forget_versions(self) -> None:
        """Let go of versions that nothing needs, so that the disk gets their room back once the store drops them."""
        needed = {work.published.version for work in self._active if work.published is not None}
        if self._scorer is not None:
            needed.add(self._scorer.version)
        for version in self._published.keys() - needed:
            self._published.pop(version).close()

    # ---- Stage and scorer ------------------------------------------------------------------------------------------

    async def _staging_loop(self) -> None:
        """Put the next submission whose seed is known into a staging buffer, one ahead of the scorer."""
        while self._fatal is None:
            due = [work for work in self._ready if self._seed(work.record) is not None]
            if not due:
                self._wake.clear()
                await self._wake.wait()
                continue
            work = min(due, key=lambda w: (w.record.round, w.record.precedence, w.id))
            self._ready.remove(work)
            async with self._verdict(work):
                scorer = await self._scorer_for(work)
                await in_thread(partial(self._tools.stage, work, scorer), "stage")
                await self._staged.put(work)

    async def _scorer_for(self, work: EvaluationTask) -> Scorer:
        """The scorer for the submission's version, loaded now if another is resident (the old one goes first)."""
        published = work.published
        assert published is not None
        if self._scorer is None or self._scorer.version != published.version:
            await self._staged.join()
            await self._close_scorer()
            self._log.info("loading the model", version=published.version)
            try:
                self._scorer = await self._torch.run(partial(self._make_scorer, published))
            except Failure as failure:  # not this submission's doing
                raise EvaluationError(f"version {published.version} cannot be loaded: {failure.detail}") from None
        return self._scorer

    async def _close_scorer(self) -> None:
        old, self._scorer = self._scorer, None
        if old is not None:
            await self._torch.run(old.close)

    async def _scoring_loop(self) -> None:
        while self._fatal is None:
            work = await self._staged.get()
            try:
                async with self._verdict(work):
                    await self._score(work)
                if self._scorer is not None and not self._scorer.model.is_baseline:
                    await self._close_scorer()
            finally:
                self._staged.task_done()

    async def _score(self, work: EvaluationTask) -> None:
        scorer, staged, record = work.scorer, work.staged, work.record
        seed = self._seed(record)
        assert scorer is not None
        assert staged is not None
        if scorer is not self._scorer or seed is None:
            raise ModelClosed  # it was closed after an error, or the chain went back: stage again
        if await self._call(partial(is_duplicate, self._ledger, self._records, record, staged.weights)):
            raise Refusal("duplicate_weights", "the weights are those of a submission with precedence")
        await self._advance(work, "evaluating", model_version=scorer.version)
        work.staged = None  # the scorer closes it
        judging = partial(
            scorer.score,
            staged,
            seed,
            file_hash=str(record.content_hash),
            submission_id=work.id,
            round_=record.round,
            cancelled=work.cancelled.is_set,
        )
        verdict = await self._bounded(self._torch.run(judging))
        found = verdict.evaluation
        await self._call(partial(self._records.write, found, verdict.sketch))
        await self._advance(work, "scored", baseline_loss=found.baseline_loss, loss=found.loss, score=found.score)
        seconds = round(found.seconds["total"], 3)
        self._log.info("scored", submission=work.id, group=found.group, score=found.score, seconds=seconds)
        distance = self._settings.copy_distance
        settle = partial(reject_copies, self._ledger, self._records, record.round, found.group, distance)
        for copy, original in await self._call(settle):
            self._log.info("rejected", submission=copy, code="duplicate_weights", of=original)
        self._leave(work)

    def _settle_latest(self) -> None:
        """Settle the copies of the latest round: an evaluator may have died between a score and that. Blocking."""
        latest = self._ledger.scores()
        if latest is None:
            return
        for group in {record.expert_group for record in latest.results}:
            reject_copies(self._ledger, self._records, latest.round, group, self._settings.copy_distance)

    async def _bounded(self, judging: Awaitable[ScoredSubmission]) -> ScoredSubmission:
        """The verdict, or a Failure that ends this process when one batch alone takes longer than scoring may."""
        try:
            return await asyncio.wait_for(judging, 2 * self._settings.score_timeout_s)
        except TimeoutError:
            raise Failure("device_error", "the model does not come back from a batch") from None

    # ---- Verdicts -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _verdict(self, work: EvaluationTask) -> AsyncIterator[None]:
        """Turn what a stage raises into the job's end."""
        try:
            yield
        except ModelClosed:
            work.unstage()
            if work.lost:
                self._leave(work)
            else:
                self._ready.append(work)
                self._wake.set()
        except (CancelledFetch, InterruptedError, _Lost):
            if work.late and work.record.status == "fetching":
                await self._end(work, "rejected", "fetch_timeout", "the file had not arrived when the round closed")
            elif not self._stopping:
                self._leave(work)
        except Refusal as refusal:
            await self._end(work, "rejected", refusal.code, refusal.detail)
        except Failure as failure:
            if failure.code == "device_error":
                self._fatal = EvaluationError(f"the evaluator restarts: {failure.detail}")
            if not self._stopping:  # a reader that this process closed itself is nobody's fault
                await self._end(work, "failed", failure.code, failure.detail)
        except EvaluationError as error:
            self._fatal = error
            raise
        except Exception:
            self._log.exception("evaluation failed", submission=work.id)
            await self._end(work, "failed", "internal_error", "a fault of the evaluator")

    async def _end(self, work: EvaluationTask, status: Status, code: str, detail: str) -> None:
        self._log.info(status, submission=work.id, code=code, detail=detail)
        with contextlib.suppress(_Lost):
            await self._advance(work, status, reason=code)
        self._leave(work)
