"""Many connections, one unit: the conductor of the lanes that fetch, check and repair it.

The caller's thread conducts: it opens lanes, and more of them while that makes the whole faster; cuts off those that
hang when others are idle; reports progress; and decides when to give up: when no mirror is left, or when next to
nothing came for `patience_s`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from bzstream.client.errors import Moved, Passing, Stopped
from bzstream.client.follower import Follower
from bzstream.client.journal import Journal
from bzstream.client.lane import Lane
from bzstream.client.manifest import Manifest
from bzstream.client.plan import Plan
from bzstream.client.progress import Progress, Speedometer
from bzstream.client.session import Session
from bzstream.client.sinks import Sink
from bzstream.client.work import Work

__all__ = ["Donor", "Transfer"]


class Donor(Protocol):
    """Where chunks come from that need not cross the network: an older file."""

    def chunks(self) -> Sequence[int]: ...

    def read_into(self, index: int, view: memoryview) -> bool:
        """Fill `view` with what should be the chunk; False if the older file does not have it after all."""


class Transfer:
    """One unit on its way; `run` does it all in the caller's thread and the threads it starts.

    `lanes`: their number, None to find it out. `version`: what requests name. `check`: whether chunks are hashed.
    `donor`: gives the chunks that the plan holds reserved.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        plan: Plan,
        sink: Sink,
        *,
        version: str | None,
        lanes: int | None,
        check: bool,
        follower: Follower | None = None,
        journal: Journal | None = None,
        donor: Donor | None = None,
    ) -> None:
        self._work = Work(
            session, manifest, plan, sink, version=version, check=check, follower=follower, journal=journal
        )
        self._tuning = session.tuning
        self._session = session
        self._donor = donor
        self._fixed = lanes
        self._lanes: list[threading.Thread] = []
        self.most_lanes = 0
        """The most connections at once."""
        self.seconds = 0.0

    @property
    def fetched(self) -> int:
        """Payload bytes that came over the network."""
        return self._work.fetched

    @property
    def again(self) -> int:
        """Chunks that were wrong and fetched again."""
        return self._work.again

    def run(self, on_progress: Callable[[Progress], None]) -> None:
        """Fetch everything. Raises what ended it; whatever is verified is recorded in the journal by then."""
        began = time.monotonic()
        work = self._work
        helpers = []
        if self._donor is not None:
            helpers.append(self._start(partial(self._copy, self._donor), "bzstream-copy"))
        if work.journal is not None:
            helpers.append(self._start(partial(self._scribe, work.journal), "bzstream-state"))
        if work.follower is not None:
            work.follower.start()
        try:
            for index in work.plan.unjudged:
                work.judge(index, None)
            work.follow()
            self._conduct(on_progress)
        finally:
            self._end()
            for helper in helpers:
                helper.join()
            for number, lane in enumerate(self._lanes):
                # A connection attempt cannot be interrupted; it touches nothing of ours when it comes back.
                while lane.is_alive() and number not in work.connecting:
                    lane.join(0.05)
            if work.follower is not None and not work.plan.complete:
                work.follower.stop()
            self.seconds = time.monotonic() - began

    def await_hash(self, on_progress: Callable[[Progress], None]) -> None:
        """After `run`: wait until the SHA-256 has seen everything. Raises Stopped."""
        follower = self._work.follower
        assert follower is not None, "nobody computes the SHA-256"
        began = time.monotonic()
        try:
            while not follower.wait(self._tuning.tick_s):
                on_progress(self.progress("hashing"))
                self._stop_if_told()
        finally:
            follower.stop()
            self.seconds += time.monotonic() - began

    def progress(self, stage: str = "fetching") -> Progress:
        """How it stands."""
        work, manifest = self._work, self._work.manifest
        with work.lock:
            present = work.plan.done_bytes + sum(chunk.covered for chunk in work.plan.chunks.values())
            verified = work.plan.done_bytes if work.check else 0
            fetched, connections = work.fetched, len(work.busy)
        return Progress(
            label=manifest.want.label,
            version=manifest.version,
            stage=stage,
            size=manifest.size,
            present=present,
            verified=verified,
            hashed=work.follower.position if work.follower is not None else 0,
            fetched=fetched,
            rate=work.rate,
            seconds_left=(manifest.size - present) / work.rate if work.rate > 0 else None,
            connections=connections,
        )

    def _conduct(self, on_progress: Callable[[Progress], None]) -> None:
        work, tuning = self._work, self._tuning
        long_meter, short_meter = Speedometer(3.0), Speedometer(1.0)
        self._open_lanes(self._first_lanes())
        quiet_since = time.monotonic()
        seen = (0, -1)
        probe_s = max(tuning.probe_s, tuning.probe_rtts * max(mirror.rtt for mirror in work.mirrors))
        next_probe = quiet_since + probe_s
        rate_before, probing = 0.0, self._fixed is None
        while True:
            with work.changed:
                if work.failure is None and not work.plan.complete:
                    work.changed.wait(tuning.tick_s)
                if work.failure is not None:
                    raise work.failure
                if work.plan.complete:
                    return
            self._stop_if_told()
            now = time.monotonic()
            work.rate = long_meter.update(now, work.fetched)
            recent = short_meter.update(now, work.fetched)
            moment = self.progress()
            on_progress(moment)
            if moment.fetched >= seen[0] + tuning.trickle or moment.verified != seen[1]:
                seen, quiet_since = (moment.fetched, moment.verified), now
            self._give_up_if_hopeless(now, quiet_since)
            self._cut_off_stuck(now)
            if probing and now >= next_probe:
                next_probe = now + probe_s
                probing, rate_before = self._probe(rate_before, recent)

    def _first_lanes(self) -> int:
        if self._fixed is not None:
            return self._fixed
        tuning = self._tuning
        rtts = [mirror.rtt for mirror in self._work.mirrors if mirror.rtt]
        near = not rtts or min(rtts) < tuning.near_rtt_s
        worth = 2 * tuning.min_run if near else tuning.min_run // 4
        most = tuning.far_lanes
        if near:
            most = tuning.near_lanes if self._work.follower is None else tuning.near_hashing_lanes
        return min(most, 1 + self._work.plan.open_bytes // worth)

    def _probe(self, rate_before: float, recent: float) -> tuple[bool, float]:
        """Half as many lanes more, as long as the last ones brought 5%: whether to go on, and the rate to beat."""
        work = self._work
        with work.changed:
            if work.plan.open_bytes < 3 * recent:
                return False, rate_before
            if work.waiting or len(work.busy) < work.target:
                return True, rate_before
            if recent < rate_before * 1.05:
                # The lanes that did not help go home after their run.
                work.target = max(2, work.target * 2 // 3)
                return False, rate_before
            target = work.target
        if target >= self._tuning.max_lanes:
            return False, rate_before
        self._open_lanes(min(self._tuning.max_lanes, target * 3 // 2 + 1))
        return True, recent

    def _open_lanes(self, target: int) -> None:
        with self._work.lock:
            self._work.target = target
        self.most_lanes = max(self.most_lanes, target)
        for number in range(len(self._lanes), target):
            self._lanes.append(self._start(Lane(self._work, number).run, f"bzstream-lane-{number}"))

    def _start(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=self._work.guarded, args=(work,), name=name, daemon=True)
        thread.start()
        return thread

    def _stop_if_told(self) -> None:
        if self._session.stopping.is_set():
            raise Stopped("stopped; the same call goes on from here")

    def _give_up_if_hopeless(self, now: float, quiet_since: float) -> None:
        work = self._work
        with work.lock:
            alive = [mirror for mirror in work.mirrors if mirror.dropped is None]
            if not alive:
                # A move first: with another manifest the mirrors may be good again.
                verdicts = [mirror.dropped for mirror in work.mirrors if mirror.dropped is not None]
                raise next((error for error in verdicts if isinstance(error, Moved)), verdicts[0])
            resume = min(mirror.not_before for mirror in alive)
            trouble = work.last_trouble
        if now - max(quiet_since, min(resume, now)) > self._tuning.patience_s:
            why = f" ({trouble})" if trouble is not None else ""
            raise Passing(
                f"next to nothing came for {self._tuning.patience_s:g} s{why}; the same call goes on from here"
            )

    def _cut_off_stuck(self, now: float) -> None:
        """While others have nothing to do, a lane that receives nothing is cut off, so that they can have its work."""
        work = self._work
        with work.lock:
            if not work.waiting or work.plan.free or work.plan.again:
                return
            late = max(self._tuning.stuck_s, 10 * max(mirror.rtt for mirror in work.mirrors))
            stuck = [segment.lane for segment in work.plan.active if now - segment.moved > late]
            connections = [work.busy[lane] for lane in stuck if lane in work.busy]
        for connection in connections:
            connection.interrupt()

    def _end(self) -> None:
        work = self._work
        with work.changed:
            work.over = True
            # After a complete transfer nobody reads any more, and the connections are good for the next unit.
            connections = [] if work.plan.complete else list(work.busy.values())
            work.changed.notify_all()
        for connection in connections:
            connection.interrupt()

    def _scribe(self, journal: Journal) -> None:
        """Bring the state file to the disk now and then, and in the end."""
        work = self._work
        over = False
        while not over:
            with work.changed:
                over = work.changed.wait_for(lambda: work.over, self._tuning.sync_s)
            journal.sync()

    def _copy(self, donor: Donor) -> None:
        """Chunks from an older file; each is checked like one from the network."""
        work, plan = self._work, self._work.plan
        writer = work.sink.writer(None)
        for index in donor.chunks():
            if work.over:
                return
            length = plan.length(index)
            whole = memoryview(bytearray(length))
            if not donor.read_into(index, whole):
                with work.changed:
                    plan.adopt(index)
                    work.changed.notify_all()
                continue
            writer.begin(index * plan.chunk_size)
            done = 0
            while done < length:
                room = writer.space(min(writer.room(), length - done))
                room[:] = whole[done : done + len(room)]
                done += len(room)
                writer.filled(len(room), last=done == length)
            with work.lock:
                chunk = plan.chunk(index)
                chunk.sources.add(-1)
            if work.check:
                chunk.hasher.update(whole)
                chunk.hashed = length
            work.judge(index, None)
