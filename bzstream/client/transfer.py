"""Many connections, one unit: starts the workers that fetch, checks on them, and decides when it is over.

`Transfer.run` is called in the thread of `pull` or `fetch_tensors`, the control thread. It starts fetch workers, and
more of them as long as that makes the whole faster; cuts off those that hang while others are idle; reports progress;
and gives up when no mirror is left, or when next to nothing came for `patience_s`. Further threads copy chunks from an
older file, write the journal to the disk, and compute the SHA-256.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from bzstream.client.coded import CodedChunks
from bzstream.client.errors import TransientError, VersionChanged, WrongHash
from bzstream.client.fetch_plan import FetchPlan
from bzstream.client.fetch_worker import FetchWorker
from bzstream.client.journal import Journal
from bzstream.client.manifest import Manifest
from bzstream.client.progress import Progress, RateMeter, UnitReport, unit_report
from bzstream.client.session import Session
from bzstream.client.sinks import Sink
from bzstream.client.streaming_sha256 import StreamingSha256
from bzstream.client.transfer_state import TransferState

__all__ = ["LocalChunkSource", "Transfer", "wrong_file_hash"]


class LocalChunkSource(Protocol):
    """Where chunks come from that need not cross the network: an older file."""

    def chunks(self) -> Sequence[int]: ...

    def read_into(self, index: int, view: memoryview) -> bool:
        """Fill `view` with what should be the chunk; False if the older file does not have it after all."""


class Transfer:
    """One unit on its way; `run` does it all in the caller's thread and the threads it starts.

    `workers`: their number, None to find it out. `version`: what requests name. `check`: whether chunks are hashed.
    `local`: gives the chunks that the plan holds reserved. `coded`: the unit's coded forms, None not to use any.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        plan: FetchPlan,
        sink: Sink,
        *,
        version: str | None,
        workers: int | None,
        check: bool,
        sha256: StreamingSha256 | None = None,
        journal: Journal | None = None,
        local: LocalChunkSource | None = None,
        coded: CodedChunks | None = None,
    ) -> None:
        self._state = TransferState(
            session, manifest, plan, sink, version=version, check=check, sha256=sha256, journal=journal, coded=coded
        )
        self._tuning = session.tuning
        self._session = session
        self._local = local
        self._fixed = workers
        self._workers: list[threading.Thread] = []
        self.most_workers = 0
        """The most connections at once."""
        self.seconds = 0.0

    @property
    def fetched(self) -> int:
        """Bytes that came over the network."""
        return self._state.fetched

    def report(self, path: Path | None = None) -> UnitReport:
        """What is said of the unit after `run`."""
        return unit_report(
            self._state.manifest,
            path=path,
            fetched=self._state.fetched,
            seconds=self.seconds,
            connections=self.most_workers,
            refetched=self._state.refetched,
            gained=self._state.coded.gained if self._state.coded is not None else 0,
        )

    def run(self, on_progress: Callable[[Progress], None]) -> None:
        """Fetch and verify everything. Raises what ended it; the journal has recorded whatever is verified by then."""
        began = time.monotonic()
        state = self._state
        helpers = []
        if self._local is not None:
            helpers.append(self._start(partial(self._copy, self._local), "bzstream-copy"))
        if state.journal is not None:
            helpers.append(self._start(partial(self._flush_journal, state.journal), "bzstream-state"))
        if state.sha256 is not None:
            state.sha256.start()
        try:
            for index in state.plan.unverified:
                state.verify_chunk(index, None)
            state.follow()
            self._control_loop(on_progress)
        finally:
            self._end()
            if state.coded is not None:
                state.coded.close()
            for helper in helpers:
                helper.join()
            for number, worker in enumerate(self._workers):
                # A name that is being looked up cannot be interrupted; the thread touches nothing of ours after it.
                while worker.is_alive() and number not in state.connecting:
                    worker.join(0.05)
            if state.sha256 is not None and not state.plan.complete:
                state.sha256.stop()
            self.seconds = time.monotonic() - began
        if state.sha256 is not None:
            self._check_whole(state.sha256, on_progress)
            self.seconds = time.monotonic() - began

    def _check_whole(self, sha256: StreamingSha256, on_progress: Callable[[Progress], None]) -> None:
        """Wait until the SHA-256 has seen everything. Raises WrongHash and Stopped."""
        try:
            while not sha256.wait(self._tuning.tick_s):
                on_progress(self.progress("hashing"))
                self._session.raise_if_stopped()
        finally:
            sha256.stop()
        if sha256.digest() != self._state.manifest.sha256:
            if self._state.journal is not None:
                self._state.journal.invalidate()
            raise wrong_file_hash(self._state.manifest)

    def progress(self, stage: str = "fetching") -> Progress:
        """How it stands."""
        state, manifest = self._state, self._state.manifest
        with state.lock:
            present = state.plan.done_bytes + sum(chunk.covered for chunk in state.plan.chunks.values())
            verified = state.plan.done_bytes if state.check else 0
            fetched, connections = state.fetched, len(state.busy)
        share = state.coded.share if state.coded is not None and state.coded.active else 1.0
        return Progress(
            label=manifest.unit.label,
            version=manifest.version,
            stage=stage,
            size=manifest.size,
            present=present,
            verified=verified,
            hashed=state.sha256.position if state.sha256 is not None else 0,
            fetched=fetched,
            rate=state.rate,
            seconds_left=share * (manifest.size - present) / state.rate if state.rate > 0 else None,
            connections=connections,
            gained=state.coded.gained if state.coded is not None else 0,
        )

    def _control_loop(self, on_progress: Callable[[Progress], None]) -> None:
        state, tuning = self._state, self._tuning
        long_meter, short_meter = RateMeter(3.0), RateMeter(1.0)
        self._start_workers(self._first_workers())
        quiet_since = time.monotonic()
        seen = (0, -1)
        probe_s = max(tuning.probe_s, tuning.probe_rtts * max(mirror.rtt for mirror in state.mirrors))
        next_probe = quiet_since + probe_s
        rate_before, probing = 0.0, self._fixed is None and tuning.max_rate is None
        while True:
            with state.changed:
                if state.failure is None and not state.plan.complete:
                    state.changed.wait(tuning.tick_s)
                if state.failure is not None:
                    raise state.failure
                if state.plan.complete:
                    return
            self._session.raise_if_stopped()
            now = time.monotonic()
            state.rate = long_meter.update(now, state.fetched)
            if state.coded is not None:
                state.coded.update(state.fetched, now)
            recent = short_meter.update(now, state.fetched)
            moment = self.progress()
            on_progress(moment)
            if moment.fetched >= seen[0] + tuning.trickle or moment.verified != seen[1]:
                seen, quiet_since = (moment.fetched, moment.verified), now
            self._give_up_if_stuck(now, quiet_since)
            self._cut_off_stuck(now)
            if probing and now >= next_probe:
                next_probe = now + probe_s
                probing, rate_before = self._probe(rate_before, recent)

    def _first_workers(self) -> int:
        if self._fixed is not None:
            return self._fixed
        tuning = self._tuning
        if tuning.max_rate is not None:
            return 1 + min(tuning.near_workers - 1, int(tuning.max_rate // tuning.rate_per_worker))
        rtts = [mirror.rtt for mirror in self._state.mirrors if mirror.rtt]
        near = not rtts or min(rtts) < tuning.near_rtt_s
        worth = 2 * tuning.min_run if near else tuning.min_run // 4
        most = tuning.far_workers
        if near:
            most = tuning.near_workers if self._state.sha256 is None else tuning.near_hashing_workers
        return min(most, 1 + self._state.plan.open_bytes // worth)

    def _probe(self, rate_before: float, recent: float) -> tuple[bool, float]:
        """Half as many workers more, as long as the last ones brought 5%: whether to go on, and the rate to beat."""
        state = self._state
        with state.changed:
            if state.plan.open_bytes < 3 * recent:
                return False, rate_before
            if state.waiting or len(state.busy) < state.target:
                return True, rate_before
            if recent < rate_before * 1.05:
                # The workers that did not help go home after their run.
                state.target = max(2, state.target * 2 // 3)
                return False, rate_before
            target = state.target
        if target >= self._tuning.max_workers:
            return False, rate_before
        self._start_workers(min(self._tuning.max_workers, target * 3 // 2 + 1))
        return True, recent

    def _start_workers(self, target: int) -> None:
        with self._state.lock:
            self._state.target = target
        self.most_workers = max(self.most_workers, target)
        for number in range(len(self._workers), target):
            self._workers.append(self._start(FetchWorker(self._state, number).run, f"bzstream-worker-{number}"))

    def _start(self, state: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=self._state.guarded, args=(state,), name=name, daemon=True)
        thread.start()
        return thread

    def _give_up_if_stuck(self, now: float, quiet_since: float) -> None:
        state = self._state
        with state.lock:
            alive = [mirror for mirror in state.mirrors if mirror.dropped is None]
            if not alive:
                # A changed version first: with another manifest the mirrors may be good again.
                errors = [mirror.dropped for mirror in state.mirrors if mirror.dropped is not None]
                raise next((error for error in errors if isinstance(error, VersionChanged)), errors[0])
            resume = min(mirror.not_before for mirror in alive)
            last_error = state.last_error
        if now - max(quiet_since, min(resume, now)) > self._tuning.patience_s:
            why = f" ({last_error})" if last_error is not None else ""
            raise TransientError(
                f"next to nothing came for {self._tuning.patience_s:g} s{why}; the same call goes on from here"
            )

    def _cut_off_stuck(self, now: float) -> None:
        """While others have nothing to do, cut off a worker that receives nothing, so that they can have its work."""
        state = self._state
        with state.lock:
            if not state.waiting or state.plan.free or state.plan.refetch:
                return
            late = max(self._tuning.stuck_s, 10 * max(mirror.rtt for mirror in state.mirrors))
            stuck = [s.worker for s in state.plan.active if not s.coded and now - s.moved > late]
            stuck += state.parts.stuck(now - late)
            connections = [state.busy[worker] for worker in stuck if worker in state.busy]
        for connection in connections:
            connection.interrupt()

    def _end(self) -> None:
        state = self._state
        with state.changed:
            state.over = True
            # After a complete transfer nobody reads any more, and the connections are good for the next unit.
            connections = [] if state.plan.complete else list(state.busy.values())
            state.changed.notify_all()
        for connection in connections:
            connection.interrupt()

    def _flush_journal(self, journal: Journal) -> None:
        """Bring the state file to the disk now and then, and in the end."""
        state = self._state
        over = False
        while not over:
            with state.changed:
                over = state.changed.wait_for(lambda: state.over, self._tuning.sync_s)
            journal.sync()

    def _copy(self, local: LocalChunkSource) -> None:
        """Chunks from an older file; each is checked like one from the network."""
        state, plan = self._state, self._state.plan
        writer = state.sink.writer(None)
        for index in local.chunks():
            if state.over:
                return
            length = plan.length(index)
            whole = memoryview(bytearray(length))
            if not local.read_into(index, whole):
                with state.changed:
                    plan.adopt(index)
                    state.changed.notify_all()
                continue
            writer.begin(index * plan.chunk_size)
            done = 0
            while done < length:
                room = writer.space(min(writer.room(), length - done))
                room[:] = whole[done : done + len(room)]
                done += len(room)
                writer.filled(len(room), last=done == length)
            with state.lock:
                chunk = plan.chunk(index)
                chunk.sources.add(-1)
            if state.check:
                chunk.hasher.update(whole)
                chunk.hashed = length
            state.verify_chunk(index, None)


def wrong_file_hash(manifest: Manifest) -> WrongHash:
    """The whole's SHA-256 differs although every chunk was right: the manifest contradicts itself."""
    return WrongHash(
        f"{manifest.unit.label} has another SHA-256 than its manifest says, although every chunk is right: "
        "the manifest is wrong or was changed on the way"
    )
