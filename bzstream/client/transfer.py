"""Many connections, one unit: the threads that fetch, check and repair it.

Each lane is a thread with one connection: it takes a run of bytes from the plan, receives it into the sink's memory,
feeds BLAKE3 while the bytes are in the processor's cache, and judges each chunk in the moment in which it is complete.
The caller's thread is the conductor: it opens more lanes while that makes the whole faster, wakes those that hang,
reports progress and decides when to give up. One lock guards plan, mirrors and journal; it is held for microseconds,
never over I/O.

Who is to blame is decided here. Trouble with one connection costs that lane a moment; trouble with a mirror (refused
connections, `Retry-After`) keeps everybody from asking it for a while; a mirror that lies is dropped. The transfer
ends with an error when no mirror is left, or when nobody sent a byte for `patience_s`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from bzstream.client.errors import ClientError, DiskTrouble, Misbehaved, Moved, Passing, Stopped
from bzstream.client.follower import Follower
from bzstream.client.journal import Journal
from bzstream.client.manifest import Manifest
from bzstream.client.mirror import Mirror, backoff
from bzstream.client.plan import Plan, Segment
from bzstream.client.progress import Progress, Speedometer
from bzstream.client.session import Session
from bzstream.client.sinks import Sink, Writer
from bzstream.client.wire import Connection

__all__ = ["Donor", "Transfer"]


class Donor(Protocol):
    """Where chunks come from that need not cross the network: an older file."""

    def chunks(self) -> Sequence[int]: ...

    def read_into(self, index: int, view: memoryview) -> bool:
        """Fill `view` with what should be the chunk; False if the older file does not have it after all."""


class Transfer:
    """One unit on its way. `run` does it all in the caller's thread and the lanes it starts."""

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
        self.session = session
        self.manifest = manifest
        self.plan = plan
        self.sink = sink
        self.fetched = 0
        """Payload bytes that came over the network."""
        self.again = 0
        """Chunks that were wrong and fetched again."""
        self.most_lanes = 0
        self.seconds = 0.0
        self._tuning = session.tuning
        self._version = version
        self._check = check
        self._follower = follower
        self._journal = journal
        self._donor = donor
        self._fixed = lanes
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        """Work may have become available, or everything is over."""
        self._threads: list[threading.Thread] = []
        self._target = 0
        self._busy: dict[int, Connection] = {}
        """Lane -> the connection it works with."""
        self._connecting: set[int] = set()
        """Lanes that wait for a connection to open, which cannot be interrupted."""
        self._waiting = 0
        """Lanes that found nothing to do."""
        self._over = False
        self._failure: BaseException | None = None
        self._last_trouble: ClientError | None = None
        self._prefix = 0
        """Chunks verified without a gap from the start."""
        self._rate = 0.0
        self._meter = Speedometer(3.0)
        self._short_meter = Speedometer(1.0)

    # The conductor

    def run(self, on_progress: Callable[[Progress], None]) -> None:
        """Fetch everything. Raises what ended it; whatever is verified is recorded in the journal by then."""
        began = time.monotonic()
        helpers: list[threading.Thread] = []
        if self._donor is not None:
            helpers.append(threading.Thread(target=self._guarded, args=(self._copy,), name="bzstream-copy"))
        if self._journal is not None:
            helpers.append(threading.Thread(target=self._guarded, args=(self._scribe,), name="bzstream-state"))
        for helper in helpers:
            helper.daemon = True
            helper.start()
        if self._follower is not None:
            self._follower.start()
        try:
            with self._lock:
                ready = list(self.plan.unjudged)
            for index in ready:
                self._judge(index, None)
            self._follow()
            self._conduct(on_progress)
        finally:
            self._end()
            for helper in helpers:
                helper.join()
            for number, lane in enumerate(self._threads):
                while lane.is_alive() and number not in self._connecting:
                    lane.join(0.05)
            if self._follower is not None and not self.plan.complete:
                self._follower.stop()
            self.seconds = time.monotonic() - began

    def await_hash(self, on_progress: Callable[[Progress], None]) -> None:
        """After `run`: wait until the SHA-256 has seen everything. Raises Stopped, and what reading raised."""
        assert self._follower is not None, "nobody computes the SHA-256"
        began = time.monotonic()
        try:
            while not self._follower.wait(self._tuning.tick_s):
                on_progress(self.progress("hashing"))
                if self.session.stopping.is_set():
                    raise Stopped("stopped; the same call goes on from here")
        finally:
            self._follower.stop()
            self.seconds += time.monotonic() - began

    def progress(self, stage: str = "fetching") -> Progress:
        with self._lock:
            present = self.plan.done_bytes + sum(chunk.covered for chunk in self.plan.chunks.values())
            verified = self.plan.done_bytes if self._check else 0
            connections = len(self._busy)
        left = (self.plan.size - present) / self._rate if self._rate > 0 else None
        hashed = self._follower.position if self._follower is not None else 0
        manifest = self.manifest
        return Progress(
            manifest.want.label, manifest.version, stage, manifest.size, min(present, manifest.size), verified, hashed,
            self.fetched, self._rate, left, connections,
        )  # fmt: skip

    def _conduct(self, on_progress: Callable[[Progress], None]) -> None:
        self._open_lanes(self._first_lanes())
        quiet_since = time.monotonic()
        seen = (-1, -1)
        next_probe = quiet_since + 1.0
        probe_rate, probing = 0.0, self._fixed is None
        while True:
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                if self.plan.complete:
                    return
                self._changed.wait(self._tuning.tick_s)
            if self.session.stopping.is_set():
                raise Stopped("stopped; the same call goes on from here")
            now = time.monotonic()
            self._rate = self._meter.update(now, self.fetched)
            recent = self._short_meter.update(now, self.fetched)
            progress = self.progress()
            on_progress(progress)
            if (self.fetched, progress.present) != seen:
                seen, quiet_since = (self.fetched, progress.present), now
            self._give_up_if_hopeless(now, quiet_since)
            self._wake_stuck(now)
            if probing and now >= next_probe:
                next_probe = now + 1.0
                probing, probe_rate = self._probe(probe_rate, recent)

    def _first_lanes(self) -> int:
        if self._fixed is not None:
            return self._fixed
        rtts = [mirror.rtt for mirror in self.session.mirrors if mirror.rtt]
        near = not rtts or min(rtts) < self._tuning.near_rtt_s
        worth = 8 * self._tuning.min_steal if near else self._tuning.min_steal
        return min(self._tuning.near_lanes if near else self._tuning.far_lanes, 1 + self.plan.open_bytes // worth)

    def _probe(self, before: float, recent: float) -> tuple[bool, float]:
        """Half as many lanes more, as long as the last ones brought 5%: whether to go on, and the rate to beat."""
        with self._lock:
            busy = len(self._busy) >= self._target and not self._waiting
            enough_left = self.plan.open_bytes > 3 * recent
        if not enough_left:
            return False, before
        if not busy:
            return True, before
        if recent < before * 1.05:
            # The lanes that did not help go home after their run.
            with self._changed:
                self._target = max(2, self._target * 2 // 3)
            return False, before
        if self._target >= self._tuning.max_lanes:
            return False, before
        self._open_lanes(min(self._tuning.max_lanes, self._target * 3 // 2 + 1))
        return True, recent

    def _open_lanes(self, target: int) -> None:
        with self._lock:
            self._target = target
            self.most_lanes = max(self.most_lanes, target)
        for number in range(len(self._threads), target):
            work = threading.Thread(target=self._guarded, args=(self._lane, number), name=f"bzstream-lane-{number}")
            work.daemon = True
            self._threads.append(work)
            work.start()

    def _give_up_if_hopeless(self, now: float, quiet_since: float) -> None:
        with self._lock:
            mirrors = self.session.mirrors
            alive = [mirror for mirror in mirrors if mirror.dropped is None]
            if not alive:
                raise next(mirror.dropped for mirror in mirrors if mirror.dropped is not None)
            resume = min(mirror.not_before for mirror in alive)
            trouble = self._last_trouble
        if now - max(quiet_since, min(resume, now)) > self._tuning.patience_s:
            why = f": {trouble}" if trouble is not None else ""
            raise Passing(f"nothing came for {self._tuning.patience_s:g} s{why}; the same call goes on from here")

    def _wake_stuck(self, now: float) -> None:
        """While others have nothing to do, a lane that receives nothing is cut off, so that they can have its work."""
        with self._lock:
            if not self._waiting or self.plan.free or self.plan.again:
                return
            late = max(self._tuning.stuck_s, 10 * max(mirror.rtt for mirror in self.session.mirrors))
            stuck = [s.lane for s in self.plan.active if now - s.moved > late]
            connections = [self._busy[lane] for lane in stuck if lane in self._busy]
        for connection in connections:
            connection.interrupt()

    def _end(self) -> None:
        with self._changed:
            self._over = True
            # After a complete transfer nobody reads any more, and the connections are good for the next unit.
            connections = [] if self.plan.complete else list(self._busy.values())
            self._changed.notify_all()
        for connection in connections:
            connection.interrupt()

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        """Run a thread's work; what it did not expect ends the transfer."""
        try:
            work(*args)
        except BaseException as error:
            with self._changed:
                if self._failure is None:
                    self._failure = error
                self._changed.notify_all()

    def _scribe(self) -> None:
        assert self._journal is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over, self._tuning.sync_s)
                over = self._over
            self._journal.sync()
            if over:
                return

    # A lane

    def _lane(self, number: int) -> None:
        offer = self._follower.hand_over if self._follower is not None else None
        writer = self.sink.writer(offer)
        connection: Connection | None = None
        failures = 0
        try:
            while (job := self._next_job(number, connection)) is not None:
                segment, mirror = job
                try:
                    if connection is None or connection.address != mirror.address or not connection.reusable:
                        if connection is not None:
                            self.session.discard(connection)
                            connection = None
                        connection = self._connect(number, mirror)
                    self._fetch(connection, mirror, segment, writer)
                    failures = 0
                except DiskTrouble:
                    self._finish_job(segment, mirror)
                    raise
                except ClientError as error:
                    self._finish_job(segment, mirror)
                    if connection is not None:
                        self.session.discard(connection)
                        connection = None
                    failures += 1
                    self._trouble(mirror, error, failures)
                except BaseException:
                    self._finish_job(segment, mirror)
                    raise
                else:
                    self._finish_job(segment, mirror)
        finally:
            with self._lock:
                self._busy.pop(number, None)
            if connection is not None:
                self.session.keep(connection)

    def _connect(self, number: int, mirror: Mirror) -> Connection:
        with self._lock:
            self._connecting.add(number)
        try:
            connection = self.session.connect(mirror)
        finally:
            with self._lock:
                self._connecting.discard(number)
        with self._lock:
            self._busy[number] = connection
            over = self._over
        if over:
            self.session.discard(connection)
            raise Stopped("stopped")
        return connection

    def _next_job(self, number: int, connection: Connection | None) -> tuple[Segment, Mirror] | None:
        """Wait for something to do; None when there will be nothing more for this lane."""
        waited = False
        with self._changed:
            try:
                while True:
                    if self._over or self._failure is not None or self.plan.complete or number >= self._target:
                        return None
                    now = time.monotonic()
                    mirror = self._choose(connection, now)
                    segment = None
                    if mirror is not None and not self._held_back():
                        segment = self.plan.take(number, self._goal(mirror), now) or self.plan.steal(
                            number, self._least_steal(mirror), now, stuck_s=self._tuning.stuck_s
                        )
                    if segment is not None and mirror is not None:
                        mirror.lanes += 1
                        return segment, mirror
                    if not waited:
                        waited = True
                        self._waiting += 1
                        self._busy.pop(number, None)
                    self._changed.wait(0.05)
            finally:
                if waited:
                    self._waiting -= 1
                if connection is not None and not self._over:
                    self._busy[number] = connection

    def _choose(self, connection: Connection | None, now: float) -> Mirror | None:
        """The mirror to ask: the one the lane is connected to, else the one with the fewest lanes."""
        able = [m for m in self.session.mirrors if m.dropped is None and m.not_before <= now]
        if connection is not None and connection.reusable:
            for mirror in able:
                if mirror.address == connection.address:
                    return mirror
        return min(able, key=lambda m: m.lanes, default=None)

    def _goal(self, mirror: Mirror) -> int:
        """Bytes of the next run: a few seconds' worth, less near the end so that all lanes finish together."""
        lanes = max(1, self._target)
        run = int(self._rate / lanes * max(self._tuning.run_s, self._tuning.run_rtts * mirror.rtt))
        if mirror.rtt < self._tuning.near_rtt_s:
            # A request costs next to nothing here, and short runs keep the finished prefix close behind.
            run = min(run, self.plan.chunk_size if self._follower is not None else self._tuning.max_run)
        share = self.plan.open_bytes // (2 * lanes)
        return max(1, min(max(run, self.plan.chunk_size), share))

    def _least_steal(self, mirror: Mirror) -> int:
        """A theft must save more time than it costs: what a lane receives in two round trips and 10 ms."""
        pace = self._rate / max(1, self._target)
        return max(self._tuning.min_steal, int((2 * mirror.rtt + 0.01) * pace))

    def _held_back(self) -> bool:
        """Whether to receive no more now, as the SHA-256 would only have to read it back from the disk later.

        That is so when it is behind, and needs longer for what it has to do than the network does.
        """
        follower = self._follower
        if follower is None or follower.backlog <= self._tuning.backlog or self._rate <= 0:
            return False
        return self.plan.open_bytes / self._rate < (self.plan.size - follower.position) / follower.rate

    def _finish_job(self, segment: Segment, mirror: Mirror) -> None:
        with self._changed:
            mirror.lanes -= 1
            self.plan.release(segment)
            if segment.pos < segment.end:
                self._changed.notify()

    def _fetch(self, connection: Connection, mirror: Mirror, segment: Segment, writer: Writer) -> None:
        """Receive one segment. What was received when it ends early is in the sink all the same."""
        begin, asked = segment.pos, segment.end
        self.session.open_range(connection, mirror, self.manifest, self._version, begin, asked)
        writer.begin(begin)
        slot: int | None = None
        slot_begin = begin
        plan, size = self.plan, self.plan.chunk_size
        try:
            while True:
                with self._lock:
                    allowed = plan.claim(segment, writer.room())
                    chunk = plan.chunk(segment.received // size) if allowed else None
                if chunk is None:
                    break
                view = writer.space(allowed)
                count = connection.read_into(view)
                inside = segment.received % size
                if self._check and chunk.hashed == inside:
                    chunk.hasher.update(view[:count])
                    chunk.hashed = inside + count
                segment.received += count
                slot, slot_begin = self._store(segment, writer, count, mirror, slot, slot_begin, last=count == allowed)
        except Passing:
            if segment.pos < segment.received:
                self._store(segment, writer, 0, mirror, slot, slot_begin, last=True)
            raise
        finally:
            if segment.received < asked:
                connection.reusable = False  # a thief has the rest; it is still on its way to us here

    def _store(
        self,
        segment: Segment,
        writer: Writer,
        count: int,
        mirror: Mirror,
        slot: int | None,
        slot_begin: int,
        *,
        last: bool,
    ) -> tuple[int | None, int]:
        """Pass received bytes on to the sink, note what is in it, judge the chunk when it is complete."""
        written = writer.filled(count, last=last)
        full: int | None = None
        with self._lock:
            self.fetched += count
            mirror.bytes += count
            if written:
                chunk_begin = segment.pos // self.plan.chunk_size * self.plan.chunk_size
                if slot is None or slot_begin < chunk_begin:
                    slot, slot_begin = None, segment.pos
                index = self.plan.advance(segment, written, mirror.number, time.monotonic())
                if self._journal is not None:
                    slot = self._journal.note(slot, slot_begin, segment.pos)
                if index is not None:
                    full, slot = index, None
        if full is not None:
            self._judge(full, mirror)
        return slot, slot_begin

    def _trouble(self, mirror: Mirror, error: ClientError, failures: int) -> None:
        """Draw the consequences of a lane's error, and make this lane wait a moment."""
        with self._changed:
            if self._over or self._failure is not None:
                return
            if isinstance(error, Stopped):
                return
            if isinstance(error, Moved):
                if len(self.session.mirrors) == 1:
                    self._failure = error
                    self._changed.notify_all()
                    return
                mirror.dropped = error
            was_good = mirror.dropped is None
            mirror.trouble(error, time.monotonic())
            self._last_trouble = error
            dropped = mirror.dropped is not None and was_good
        if dropped and len(self.session.mirrors) > 1:
            self.session.notify(f"{mirror.address} is left out: {error}")
        pause = random.uniform(0, 0.05) if isinstance(error, Misbehaved | Moved) else backoff(failures, most=5.0)
        if failures == 1:
            pause = 0.0
        with self._changed:
            self._changed.wait_for(lambda: self._over, pause)

    # Judgement

    def _judge(self, index: int, mirror: Mirror | None) -> None:
        """A chunk is complete: check its hash, and either count it or have it fetched again."""
        plan = self.plan
        begin, length = index * plan.chunk_size, plan.length(index)
        with self._lock:
            chunk = plan.chunk(index)
        if self._check:
            while chunk.hashed < length:
                # Bytes that came out of order, or in an earlier process, are read back.
                count = min(1 << 20, length - chunk.hashed)
                chunk.hasher.update(self.sink.read(begin + chunk.hashed, count))
                chunk.hashed += count
        good = not self._check or chunk.hasher.digest() == self.manifest.chunks[index]
        if good:
            self.sink.settled(begin, length)
        with self._changed:
            if good:
                plan.verified(index)
                if mirror is not None:
                    mirror.good()
            else:
                if self._follower is not None:
                    self._follower.discard(begin, begin + length)
                plan.failed(index)
                self.again += 1
                self._blame(index, chunk.sources)
            if self._journal is not None:
                self._journal.judged(index, good=good)
            if plan.complete or not good:
                self._changed.notify_all()
        if good:
            self._follow()

    def _blame(self, index: int, sources: set[int]) -> None:
        if len(sources) != 1 or -1 in sources:
            return  # several had a hand in it; the next time it is fetched from one
        mirror = self.session.mirrors[next(iter(sources))]
        mirror.strike(
            index,
            f"{mirror.address} sent chunk {index} of {self.manifest.want.label} with a wrong hash "
            f"{self._tuning.strikes} times; its copy is damaged or somebody changes it on the way",
        )
        if mirror.dropped is not None:
            self._last_trouble = mirror.dropped
            if len(self.session.mirrors) > 1:
                self.session.notify(f"{mirror.address} is left out: {mirror.dropped}")

    def _follow(self) -> None:
        """Tell the SHA-256 how far the verified prefix reaches."""
        if self._follower is None:
            return
        with self._lock:
            gap = self.plan.done.find(0, self._prefix)
            self._prefix = self.plan.count if gap < 0 else gap
            limit = min(self._prefix * self.plan.chunk_size, self.plan.size)
        self._follower.advance(limit)

    # Chunks from an older file

    def _copy(self) -> None:
        donor = self._donor
        assert donor is not None
        writer = self.sink.writer(None)
        for index in donor.chunks():
            if self._over:
                return
            begin, length = index * self.plan.chunk_size, self.plan.length(index)
            buffer = memoryview(bytearray(length))
            if not donor.read_into(index, buffer):
                with self._changed:
                    self.plan.adopt(index)
                    self._changed.notify_all()
                continue
            writer.begin(begin)
            done = 0
            while done < length:
                room = writer.space(min(writer.room(), length - done))
                room[:] = buffer[done : done + len(room)]
                done += len(room)
                writer.filled(len(room), last=done == length)
            self._copied(index, buffer)

    def _copied(self, index: int, view: memoryview) -> None:
        with self._lock:
            chunk = self.plan.chunk(index)
            chunk.sources.add(-1)
        if self._check:
            chunk.hasher.update(view)
            chunk.hashed = len(view)
        self._judge(index, None)
