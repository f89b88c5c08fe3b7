"""A fetch worker: one thread with one connection that fetches one run of bytes after another.

It takes a run from the plan, receives it into the sink's memory, feeds BLAKE3 while the bytes are in the processor's
cache, and checks each chunk as soon as it is complete. A fault of its connection makes this worker wait a moment. A
fault of the mirror (one of the URLs) makes all workers leave it alone for a while. A mirror that sends wrong data is
used no more. Started by `Transfer`, which also decides how many workers there are.
"""

from __future__ import annotations

import os
import random
import time

from blake3 import blake3

from bzstream.client.coded_parts import CodedPart
from bzstream.client.errors import (
    Busy,
    ClientError,
    DiskError,
    ProtocolViolation,
    Refused,
    Stopped,
    TransientError,
    VersionChanged,
)
from bzstream.client.fetch_plan import Segment
from bzstream.client.mirror import Mirror
from bzstream.client.sinks import SinkWriter
from bzstream.client.transfer_state import TransferState
from bzstream.httpclient import Connection
from bzstream.util.backoff import backoff

__all__ = ["FetchWorker"]

NICE = 5
"""Beside a SHA-256, which cannot be split and sets the pace, workers stand back on full cores: 7% on two. (On Linux a
thread has a nice value of its own.)"""
WAIT_S = 0.05
"""How long a worker without work sleeps before it looks whether stealing pays now."""


class FetchWorker:
    """FetchWorker `number` of a transfer; `run` is its thread."""

    def __init__(self, state: TransferState, number: int) -> None:
        self._state = state
        self._number = number
        self._connection: Connection | None = None
        self._mirror: Mirror | None = None
        """Where the connection leads."""
        self._writer: SinkWriter = state.sink.writer(state.sha256.hand_over if state.sha256 is not None else None)
        self._slot: int | None = None
        """The journal's slot for the range that is being received."""
        self._slot_begin = 0
        self._decoded: memoryview | None = None
        """Memory for a chunk that came coded, made when it is first needed."""
        self._pace = 0.0
        """Bytes a second of the last run; 0 before there was one."""

    def run(self) -> None:
        """Fetch until there is nothing more to do. Raises DiskError."""
        failures = 0
        if self._state.sha256 is not None:
            os.nice(NICE)
        try:
            while (job := self._next_job()) is not None:
                work, mirror = job
                fault: ClientError | None = None
                try:
                    connection = self._connect(mirror)
                    if isinstance(work, CodedPart):
                        self._fetch_part(connection, mirror, work)
                    else:
                        self._fetch(connection, mirror, work)
                    failures = 0
                except DiskError:
                    raise
                except ClientError as error:
                    fault = error
                    self._close_connection()
                    failures += 1
                finally:
                    self._finish(work, mirror)
                if fault is not None:
                    self._handle_error(mirror, fault, failures)
        finally:
            with self._state.lock:
                self._state.busy.pop(self._number, None)
            if self._connection is not None:
                self._state.session.keep(self._connection)

    # Choosing a run

    def _next_job(self) -> tuple[Segment | CodedPart, Mirror] | None:
        """Wait for something to do; None when there will be nothing more for this worker."""
        state = self._state
        waited = False
        with state.changed:
            try:
                while True:
                    if state.over or state.failure is not None or state.plan.complete or self._number >= state.target:
                        return None
                    now = time.monotonic()
                    mirror = self._choose(now)
                    if mirror is not None and not self._held_back():
                        work = self._take(mirror, now)
                        if work is None and state.parts:
                            # All that is left may be chunks of which another mirror sent the beginning.
                            for other in state.mirrors:
                                if work is None and other.dropped is None and other.not_before <= now:
                                    work, mirror = self._part_of(other, now), other
                        if work is not None:
                            mirror.workers += 1
                            return work, mirror
                    if not waited:
                        waited = True
                        state.waiting += 1
                        state.busy.pop(self._number, None)
                    state.changed.wait(WAIT_S)
            finally:
                if waited:
                    state.waiting -= 1
                if self._connection is not None and not state.over:
                    state.busy[self._number] = self._connection

    def _choose(self, now: float) -> Mirror | None:
        """The mirror to ask: the one the worker is connected to, else the one with the fewest workers."""
        able = [m for m in self._state.mirrors if m.dropped is None and m.not_before <= now]
        connection = self._connection
        if connection is not None and connection.reusable:
            for mirror in able:
                if mirror is self._mirror:
                    return mirror
        return min(able, key=lambda m: m.workers, default=None)

    def _take(self, mirror: Mirror, now: float) -> Segment | CodedPart | None:
        """Free work: a part of a chunk that comes coded, else a run, else part of another's run. With the lock held."""
        state, plan, coded, parts = self._state, self._state.plan, self._state.coded, self._state.parts
        if coded is not None and (coded.active or parts):
            part = self._part_of(mirror, now)
            if part is not None:
                return part
            if coded.waiting and (parts or not coded.hopeful):
                return None
            if coded.active and not plan.refetch:
                number = mirror.number
                segment = plan.take_chunk(self._number, lambda index: coded.choose(index, number) is not None, now)
                if segment is not None:
                    index = segment.start // plan.chunk_size
                    coding = coded.choose(index, number)
                    if coding is not None:
                        parts.open(segment, index, coding, number, plan.chunk_size)
                        state.changed.notify_all()  # its other parts are for others
                        return self._part_of(mirror, now)
                    segment.alone = False
                    plan.release(segment)
        return plan.take(self._number, self._run_length(mirror), now) or self._steal(mirror, now)

    def _part_of(self, mirror: Mirror, now: float) -> CodedPart | None:
        """A part of a coded chunk that was begun: a short one, so that few chunks are under way at once."""
        state, tuning = self._state, self._state.tuning
        assert state.coded is not None
        workers = max(1, state.target)
        share = int(state.plan.open_bytes * state.coded.share) // (2 * workers)
        goal = max(tuning.coded_part, min(int(state.rate / workers * tuning.coded_part_rtts * mirror.rtt), share))
        return state.parts.take(self._number, mirror.number, goal, now)

    def _run_length(self, mirror: Mirror) -> int:
        """Bytes of the next run: a few seconds' worth, less near the end so that all workers finish together."""
        state, tuning = self._state, self._state.tuning
        workers = max(1, state.target)
        if mirror.rtt < tuning.near_rtt_s:
            # A request costs next to nothing, so that the prefix that the SHA-256 follows can grow in short runs.
            run = state.plan.chunk_size if state.sha256 is not None else tuning.max_run
        else:
            run = int(state.rate / workers * max(tuning.run_s, tuning.run_rtts * mirror.rtt))
        share = state.plan.open_bytes // (2 * workers)
        if mirror.rtt < tuning.near_rtt_s:
            return max(state.plan.chunk_size, min(run, share))
        # On a far link one chunk may take seconds. It is shared out before anybody begins with it: stealing later would
        # cost a connection that has its window open.
        return max(tuning.min_run, min(run or share, share) // 4096 * 4096)

    def _steal(self, mirror: Mirror, now: float) -> Segment | None:
        """Work of another worker, if that saves more than a request (one round trip, two with a connection) costs."""
        state, tuning = self._state, self._state.tuning
        return state.plan.steal(
            self._number,
            now,
            pace=self._pace or state.rate / max(1, state.target),
            least=tuning.min_steal,
            least_s=3 * mirror.rtt + tuning.steal_s,
            stuck_s=tuning.stuck_s,
        )

    def _held_back(self) -> bool:
        """Whether to receive no more now, as the SHA-256 would only have to read it back from the disk later.

        So it is when it is behind, and needs longer for what it has to do than the network does.
        """
        state, sha256 = self._state, self._state.sha256
        if sha256 is None or sha256.backlog <= state.tuning.backlog or state.rate <= 0:
            return False
        return state.plan.open_bytes / state.rate < (state.plan.size - sha256.position) / sha256.rate

    # Fetching

    def _connect(self, mirror: Mirror) -> Connection:
        """The worker's connection, if it is good for another request to this mirror, else a new one."""
        state = self._state
        if self._connection is not None:
            if self._connection.reusable and self._mirror is mirror:
                return self._connection
            self._close_connection()
        with state.lock:
            state.connecting.add(self._number)
        try:
            self._connection, self._mirror = state.session.connect(mirror), mirror
        finally:
            with state.lock:
                state.connecting.discard(self._number)
        with state.lock:
            if not state.over:
                state.busy[self._number] = self._connection
                return self._connection
        raise Stopped("stopped")

    def _close_connection(self) -> None:
        if self._connection is not None:
            with self._state.lock:
                self._state.busy.pop(self._number, None)
            self._state.session.discard(self._connection)
            self._connection = None

    def _fetch(self, connection: Connection, mirror: Mirror, segment: Segment) -> None:
        """Receive one segment. What was received when it ends early is in the sink all the same."""
        state, plan, writer = self._state, self._state.plan, self._writer
        asked = segment.end
        began = time.monotonic()
        # What is claimed cannot be stolen, so that a slow worker claims little.
        claim_seconds, claim_bytes = state.tuning.claim_s, state.tuning.first_claim
        if self._pace:
            claim_bytes = max(claim_bytes, int(self._pace * claim_seconds))
        elif mirror.rtt < state.tuning.near_rtt_s:
            claim_bytes = state.tuning.buffer
        state.session.open_range(connection, mirror, state.manifest, state.version, segment.pos, asked)
        writer.begin(segment.pos)
        self._slot = None
        try:
            while True:
                with state.lock:
                    allowed = plan.claim(segment, min(writer.room(), claim_bytes))
                    chunk = plan.chunk(segment.received // plan.chunk_size) if allowed else None
                if chunk is None:
                    break
                view = writer.space(allowed)
                count = connection.read_into(view)
                inside = segment.received % plan.chunk_size
                if state.check and chunk.hashed == inside:
                    chunk.hasher.update(view[:count])
                    chunk.hashed = inside + count
                segment.received += count
                if count == allowed:
                    pace = (segment.received - segment.start) / (time.monotonic() - began + 1e-6)
                    claim_bytes = max(state.tuning.first_claim, int(pace * claim_seconds))
                # What fills a buffer, a chunk or the segment goes to the sink now; other bytes when the writer likes.
                self._store(segment, mirror, count, last=count == allowed)
        except TransientError:
            if segment.pos < segment.received:
                self._store(segment, mirror, 0, last=True)
            raise
        finally:
            self._pace = (segment.received - segment.start) / (time.monotonic() - began + 1e-6)
            if segment.received < asked:
                connection.reusable = False  # a thief has the rest, and it is still on its way to us here

    def _fetch_part(self, connection: Connection, mirror: Mirror, part: CodedPart) -> None:
        """Receive a part of a chunk's coded form; the last part's worker decodes the chunk."""
        state, chunk = self._state, part.chunk
        offset = chunk.coding.chunks[chunk.index][0]
        complete = False
        try:
            begin, end = offset + part.begin, offset + part.end
            state.session.open_coded(connection, mirror, state.manifest, state.version, chunk.coding, begin, end)
            while part.begin < part.end and not chunk.failed:
                count = connection.read_into(chunk.raw[part.begin : min(part.end, part.begin + state.tuning.buffer)])
                with state.lock:
                    pause = state.pause(count)
                    state.fetched += count
                    mirror.bytes += count
                    complete = state.parts.arrived(part, count, time.monotonic())
                if pause:
                    state.session.stopping.wait(pause)
        except (VersionChanged, Refused, ProtocolViolation, Busy):
            # It has other coded files, none, or a fault of its own: what is more than that, a plain request finds out.
            self._skip_coded(mirror)
            self._close_connection()
            return
        if chunk.failed:
            self._close_connection()
        elif complete:
            self._decode(mirror, part)

    def _skip_coded(self, mirror: Mirror) -> bool:
        """Nothing coded comes from this mirror any more; whether that is news."""
        state = self._state
        assert state.coded is not None
        news = state.coded.skip_mirror(mirror.number)
        with state.lock:
            state.give_up_coded(mirror)
        return news

    def _decode(self, mirror: Mirror, part: CodedPart) -> None:
        """Decode a chunk and pass it on. Whatever is wrong with its coded form, it is fetched as it is afterwards."""
        state, plan, coded = self._state, self._state.plan, self._state.coded
        index, segment, coding, raw = part.chunk.index, part.chunk.segment, part.chunk.coding, part.chunk.raw
        assert coded is not None
        if blake3(raw).digest() != coding.chunks[index][2]:
            if self._skip_coded(mirror):
                state.session.notify(
                    f"{mirror.address} sent coded bytes with a wrong hash; taking it uncoded from there"
                )
            with state.changed:
                state.refetched += 1
                final = mirror.note_wrong_chunk(index, f"{mirror.address} sent coded bytes with a wrong hash")
                if final is not None:
                    state.drop(mirror, final)
            return
        if not coded.await_base(coding):
            segment.alone = False  # it was fetched in the hope that the older file is the base
            return
        length = plan.length(index)
        memory = state.sink.memory_at(segment.start, length)
        if memory is None and self._decoded is None:
            self._decoded = memoryview(bytearray(plan.chunk_size))
        view = memory if memory is not None else self._decoded[:length]  # type: ignore[index]
        hasher = coded.decode(index, coding, raw, view)
        if hasher is None:
            state.session.notify(
                f"a coded form of {state.manifest.unit.label} is damaged where it was made; not using it"
            )
            return
        with state.lock:
            chunk = plan.chunk(index)
        chunk.hasher, chunk.hashed = hasher, length
        self._writer.begin(segment.pos)
        self._slot = None
        at = 0
        while at < length:
            space = self._writer.space(min(self._writer.room(), length - at))
            if memory is None:
                space[:] = view[at : at + len(space)]
            at += len(space)
            segment.received += len(space)
            self._store(segment, mirror, len(space), last=at == length, wire=0)

    def _store(self, segment: Segment, mirror: Mirror, count: int, *, last: bool, wire: int | None = None) -> None:
        """Pass received bytes on to the sink, note what is in it, have the chunk checked when it is complete.

        `wire`: how many of them came over the network and are not counted yet; default all.
        """
        state, plan = self._state, self._state.plan
        written = self._writer.filled(count, last=last)
        full: int | None = None
        with state.lock:
            arrived = count if wire is None else wire
            pause = state.pause(arrived)
            state.fetched += arrived
            mirror.bytes += arrived
            if written:
                if self._slot is None or segment.pos % plan.chunk_size == 0:
                    self._slot, self._slot_begin = None, segment.pos
                full = plan.advance(segment, written, mirror.number, time.monotonic())
                if state.journal is not None:
                    self._slot = state.journal.note(self._slot, self._slot_begin, segment.pos)
        if full is not None:
            self._slot = None
            state.verify_chunk(full, mirror)
        if pause:
            state.session.stopping.wait(pause)

    def _finish(self, work: Segment | CodedPart, mirror: Mirror) -> None:
        with self._state.changed:
            mirror.workers -= 1
            segment = self._state.parts.release(work) if isinstance(work, CodedPart) else work
            if segment is not None:
                self._state.plan.release(segment)
            if segment is None or segment.pos < segment.end:
                self._state.changed.notify()

    def _handle_error(self, mirror: Mirror, error: ClientError, failures: int) -> None:
        """Note an error against its mirror or the transfer, and make this worker wait a moment."""
        state = self._state
        with state.changed:
            if state.over or state.failure is not None or isinstance(error, Stopped):
                return
            state.last_error = error
            if isinstance(error, VersionChanged) and len(state.mirrors) == 1:
                state.failure = error
                state.changed.notify_all()
                return
            if mirror.dropped is None:
                final = mirror.note_error(error, time.monotonic())
                if final is not None:
                    state.drop(mirror, final)
                elif mirror.not_before > time.monotonic() and len(state.mirrors) > 1:
                    state.give_up_coded(mirror)  # others can have its chunks
            # The first failure of a connection is met with another at once.
            pause = backoff(failures - 1, first=0.1, most=5.0)
            if isinstance(error, ProtocolViolation | VersionChanged):
                pause = random.uniform(0.0, 0.05)
            state.changed.wait_for(lambda: state.over, pause)
