"""A lane: one thread with one connection that fetches run after run.

It takes a run of bytes from the plan, receives it into the sink's memory, feeds BLAKE3 while the bytes are in the
processor's cache, and has each chunk judged in the moment in which it is complete. Trouble with its connection costs
the lane a moment; trouble with a mirror keeps everybody from asking it for a while; a mirror that lies is dropped.
"""

from __future__ import annotations

import os
import random
import time

from bzstream.client.errors import ClientError, DiskTrouble, Misbehaved, Moved, Passing, Stopped
from bzstream.client.mirror import Mirror, backoff
from bzstream.client.plan import Segment
from bzstream.client.sinks import Writer
from bzstream.client.wire import Connection
from bzstream.client.work import Work

__all__ = ["Lane"]

NICE = 5
"""Beside a SHA-256, which cannot be split and sets the pace, lanes stand back on full cores: 7% on two. (On Linux a
thread has a nice value of its own.)"""
WAIT_S = 0.05
"""How long a lane without work sleeps before it looks whether a theft pays now."""


class Lane:
    """Lane `number` of a transfer; `run` is its thread."""

    def __init__(self, work: Work, number: int) -> None:
        self._work = work
        self._number = number
        self._connection: Connection | None = None
        self._writer: Writer = work.sink.writer(work.follower.hand_over if work.follower is not None else None)
        self._slot: int | None = None
        """The journal's slot for the range that is being received."""
        self._slot_begin = 0
        self._pace = 0.0
        """Bytes a second of the last run; 0 before there was one."""

    def run(self) -> None:
        """Fetch until there is nothing more to do. Raises DiskTrouble."""
        failures = 0
        if self._work.follower is not None:
            os.nice(NICE)
        try:
            while (job := self._next_job()) is not None:
                segment, mirror = job
                trouble: ClientError | None = None
                try:
                    connection = self._connect(mirror)
                    self._fetch(connection, mirror, segment)
                    failures = 0
                except DiskTrouble:
                    raise
                except ClientError as error:
                    trouble = error
                    self._hang_up()
                    failures += 1
                finally:
                    self._finish(segment, mirror)
                if trouble is not None:
                    self._suffer(mirror, trouble, failures)
        finally:
            with self._work.lock:
                self._work.busy.pop(self._number, None)
            if self._connection is not None:
                self._work.session.keep(self._connection)

    # What to do next

    def _next_job(self) -> tuple[Segment, Mirror] | None:
        """Wait for something to do; None when there will be nothing more for this lane."""
        work = self._work
        waited = False
        with work.changed:
            try:
                while True:
                    if work.over or work.failure is not None or work.plan.complete or self._number >= work.target:
                        return None
                    now = time.monotonic()
                    mirror = self._choose(now)
                    if mirror is not None and not self._held_back():
                        segment = work.plan.take(self._number, self._goal(mirror), now) or self._steal(mirror, now)
                        if segment is not None:
                            mirror.lanes += 1
                            return segment, mirror
                    if not waited:
                        waited = True
                        work.waiting += 1
                        work.busy.pop(self._number, None)
                    work.changed.wait(WAIT_S)
            finally:
                if waited:
                    work.waiting -= 1
                if self._connection is not None and not work.over:
                    work.busy[self._number] = self._connection

    def _choose(self, now: float) -> Mirror | None:
        """The mirror to ask: the one the lane is connected to, else the one with the fewest lanes."""
        able = [m for m in self._work.mirrors if m.dropped is None and m.not_before <= now]
        connection = self._connection
        if connection is not None and connection.reusable:
            for mirror in able:
                if mirror.address == connection.address:
                    return mirror
        return min(able, key=lambda m: m.lanes, default=None)

    def _goal(self, mirror: Mirror) -> int:
        """Bytes of the next run: a few seconds' worth, less near the end so that all lanes finish together."""
        work, tuning = self._work, self._work.tuning
        lanes = max(1, work.target)
        if mirror.rtt < tuning.near_rtt_s:
            # A request costs next to nothing, so that the prefix that the SHA-256 follows can grow in short runs.
            run = work.plan.chunk_size if work.follower is not None else tuning.max_run
        else:
            run = int(work.rate / lanes * max(tuning.run_s, tuning.run_rtts * mirror.rtt))
        share = work.plan.open_bytes // (2 * lanes)
        if mirror.rtt < tuning.near_rtt_s:
            return max(work.plan.chunk_size, min(run, share))
        # On a far link one chunk may take seconds. It is shared out before anybody begins with it: a theft later would
        # cost a connection that has its window open.
        return max(tuning.min_run, min(run or share, share) // 4096 * 4096)

    def _steal(self, mirror: Mirror, now: float) -> Segment | None:
        """Work of another lane, if that saves more than a request (one round trip, two with a connection) costs."""
        work, tuning = self._work, self._work.tuning
        return work.plan.steal(
            self._number,
            now,
            pace=self._pace or work.rate / max(1, work.target),
            least=tuning.min_steal,
            least_s=3 * mirror.rtt + tuning.theft_s,
            stuck_s=tuning.stuck_s,
        )

    def _held_back(self) -> bool:
        """Whether to receive no more now, as the SHA-256 would only have to read it back from the disk later.

        That is so when it is behind, and needs longer for what it has to do than the network does.
        """
        work, follower = self._work, self._work.follower
        if follower is None or follower.backlog <= work.tuning.backlog or work.rate <= 0:
            return False
        return work.plan.open_bytes / work.rate < (work.plan.size - follower.position) / follower.rate

    # Doing it

    def _connect(self, mirror: Mirror) -> Connection:
        """The lane's connection, if it is good for another request to this mirror, else a new one."""
        work = self._work
        if self._connection is not None:
            if self._connection.reusable and self._connection.address == mirror.address:
                return self._connection
            self._hang_up()
        with work.lock:
            work.connecting.add(self._number)
        try:
            self._connection = work.session.connect(mirror)
        finally:
            with work.lock:
                work.connecting.discard(self._number)
        with work.lock:
            if not work.over:
                work.busy[self._number] = self._connection
                return self._connection
        raise Stopped("stopped")

    def _hang_up(self) -> None:
        if self._connection is not None:
            with self._work.lock:
                self._work.busy.pop(self._number, None)
            self._work.session.discard(self._connection)
            self._connection = None

    def _fetch(self, connection: Connection, mirror: Mirror, segment: Segment) -> None:
        """Receive one segment. What was received when it ends early is in the sink all the same."""
        work, plan, writer = self._work, self._work.plan, self._writer
        asked = segment.end
        began = time.monotonic()
        # What is claimed cannot be stolen, so that a slow lane claims little.
        hunger, appetite = work.tuning.claim_s, work.tuning.first_claim
        if self._pace:
            appetite = max(appetite, int(self._pace * hunger))
        elif mirror.rtt < work.tuning.near_rtt_s:
            appetite = work.tuning.buffer
        work.session.open_range(connection, mirror, work.manifest, work.version, segment.pos, asked)
        writer.begin(segment.pos)
        self._slot = None
        try:
            while True:
                with work.lock:
                    allowed = plan.claim(segment, min(writer.room(), appetite))
                    chunk = plan.chunk(segment.received // plan.chunk_size) if allowed else None
                if chunk is None:
                    break
                view = writer.space(allowed)
                count = connection.read_into(view)
                inside = segment.received % plan.chunk_size
                if work.check and chunk.hashed == inside:
                    chunk.hasher.update(view[:count])
                    chunk.hashed = inside + count
                segment.received += count
                if count == allowed:
                    pace = (segment.received - segment.start) / (time.monotonic() - began + 1e-6)
                    appetite = max(work.tuning.first_claim, int(pace * hunger))
                # What fills a buffer, a chunk or the segment goes to the sink now; other bytes when the writer likes.
                self._store(segment, mirror, count, last=count == allowed)
        except Passing:
            if segment.pos < segment.received:
                self._store(segment, mirror, 0, last=True)
            raise
        finally:
            self._pace = (segment.received - segment.start) / (time.monotonic() - began + 1e-6)
            if segment.received < asked:
                connection.reusable = False  # a thief has the rest, and it is still on its way to us here

    def _store(self, segment: Segment, mirror: Mirror, count: int, *, last: bool) -> None:
        """Pass received bytes on to the sink, note what is in it, have the chunk judged when it is complete."""
        work, plan = self._work, self._work.plan
        written = self._writer.filled(count, last=last)
        full: int | None = None
        with work.lock:
            work.fetched += count
            mirror.bytes += count
            if written:
                if self._slot is None or segment.pos % plan.chunk_size == 0:
                    self._slot, self._slot_begin = None, segment.pos
                full = plan.advance(segment, written, mirror.number, time.monotonic())
                if work.journal is not None:
                    self._slot = work.journal.note(self._slot, self._slot_begin, segment.pos)
        if full is not None:
            self._slot = None
            work.judge(full, mirror)

    def _finish(self, segment: Segment, mirror: Mirror) -> None:
        with self._work.changed:
            mirror.lanes -= 1
            self._work.plan.release(segment)
            if segment.pos < segment.end:
                self._work.changed.notify()

    def _suffer(self, mirror: Mirror, error: ClientError, failures: int) -> None:
        """Draw the consequences of an error, and make this lane wait a moment."""
        work = self._work
        with work.changed:
            if work.over or work.failure is not None or isinstance(error, Stopped):
                return
            work.last_trouble = error
            if isinstance(error, Moved) and len(work.mirrors) == 1:
                work.failure = error
                work.changed.notify_all()
                return
            if mirror.dropped is None:
                verdict = mirror.trouble(error, time.monotonic())
                if verdict is not None:
                    work.drop(mirror, verdict)
            # The first failure of a connection is met with another at once.
            pause = 0.0 if failures == 1 else backoff(failures - 1, most=5.0)
            if isinstance(error, Misbehaved | Moved):
                pause = random.uniform(0.0, 0.05)
            work.changed.wait_for(lambda: work.over, pause)
