"""Which connection fetches which bytes, as a pure data structure: no sockets, no clock, no locks (the caller has one).

Trust is decided by the chunk of the manifest; work is shared out by byte ranges of any size. Free bytes lie in sorted
spans; a worker (a thread with a connection) takes a run from the front, so that the finished prefix grows, and the runs
shrink as the end comes near. When nothing is free an idle worker steals the later half of the run that would take
longest, cut at a chunk boundary where there is one and inside a chunk where there is not: on a slow link one chunk
takes seconds, and waiting for the last would leave the other workers idle for that long.

So a chunk may be put together by several workers. Two rules keep that safe. A worker *claims* bytes before it writes
them, and a thief takes only unclaimed ones: no byte is ever written by two workers, and none after its chunk was
checked. And a chunk that turns out wrong is fetched again whole by one worker (*alone*), so that the next failure has
one culprit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable

from blake3 import blake3

__all__ = ["Chunk", "FetchPlan", "Segment"]


class Segment:
    """A run that one worker works on: [pos, end) is not yet in the sink, [pos, claimed) may no longer be stolen."""

    __slots__ = ("alone", "began", "claimed", "coded", "end", "moved", "pos", "received", "start", "worker")

    def __init__(self, start: int, end: int, worker: int, now: float, *, alone: bool = False) -> None:
        self.start = self.pos = self.received = self.claimed = start
        self.end = end
        self.worker = worker
        self.alone = alone
        self.coded = False
        """Whether it is a chunk that is to be fetched coded."""
        self.began = now
        self.moved = now
        """When the last byte came."""

    def pace(self, now: float) -> float:
        """Bytes a second so far; a worker that has no byte yet counts as slow."""
        return max(self.received - self.start, 4096) / (now - self.began + 0.001)

    def seconds_left(self, now: float) -> float:
        """Expected seconds to its end."""
        return (self.end - self.received) / self.pace(now)


class Chunk:
    """A chunk that is not complete: how much of it is in the sink and how far it is hashed, always from its start."""

    __slots__ = ("covered", "hashed", "hasher", "sources")

    def __init__(self) -> None:
        self.covered = 0
        self.hashed = 0
        self.hasher = blake3()
        self.sources: set[int] = set()
        """Which mirrors its bytes came from; -1 for bytes that an earlier process left."""


class FetchPlan:
    """The work of one unit.

    `done`: chunks that are already verified in the sink; `received`: ranges that are in the sink but belong to no
    verified chunk; `reserved`: chunks that somebody else (the copier of an older file) takes care of. `grip`: bytes
    that a worker keeps of every run: were a run stolen before its first byte, thieves could pass it on for ever.
    """

    def __init__(
        self,
        size: int,
        chunk_size: int,
        *,
        done: Iterable[int] = (),
        received: Iterable[tuple[int, int]] = (),
        reserved: Iterable[int] = (),
        min_claim: int = 64 * 1024,
    ) -> None:
        self.size = size
        self._min_claim = min_claim
        self.chunk_size = chunk_size
        self.count = -(-size // chunk_size)
        self.done = bytearray(self.count)
        for index in done:
            self.done[index] = 1
        self.done_count = sum(self.done)
        self.done_bytes = sum(self.length(index) for index in range(self.count) if self.done[index])
        self.chunks: dict[int, Chunk] = {}
        self.active: list[Segment] = []
        self.refetch: deque[int] = deque()
        """Chunks to be fetched again, alone."""
        self.unverified: list[int] = []
        """Chunks whose every byte was there from the start: no worker completes them, so the caller verifies them."""
        taken = bytearray(self.done)
        for index in reserved:
            taken[index] = 1
        self.free: list[tuple[int, int]] = []
        """Spans that nobody works on: sorted, disjoint, never touching."""
        for index in range(self.count):
            if not taken[index]:
                begin = index * chunk_size
                self._free(begin, begin + self.length(index))
        for begin, end in received:
            self._cover(begin, end, taken)

    @property
    def complete(self) -> bool:
        return self.done_count == self.count

    @property
    def open_bytes(self) -> int:
        """Bytes that still have to be fetched, as far as anybody knows."""
        spans = sum(end - begin for begin, end in self.free) + sum(self.length(index) for index in self.refetch)
        return spans + sum(segment.end - segment.pos for segment in self.active)

    def length(self, index: int) -> int:
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def chunk(self, index: int) -> Chunk:
        """The open chunk `index`, made when it is first touched."""
        found = self.chunks.get(index)
        if found is None:
            found = self.chunks[index] = Chunk()
        return found

    def take(self, worker: int, goal: int, now: float) -> Segment | None:
        """A run of about `goal` free bytes from the front: whole chunks, or exactly `goal` bytes when that is less than
        a chunk. None when nothing is free.
        """
        if self.refetch:
            index = self.refetch.popleft()
            begin = index * self.chunk_size
            return self._begin(Segment(begin, begin + self.length(index), worker, now, alone=True))
        if not self.free:
            return None
        begin, end = self.free[0]
        stop = begin + max(goal, 1)
        stop = min(end, self._boundary(stop) if goal >= self.chunk_size else stop)
        if stop == end:
            del self.free[0]
        else:
            self.free[0] = (stop, end)
        return self._begin(Segment(begin, stop, worker, now))

    def take_chunk(self, worker: int, wanted: Callable[[int], bool], now: float) -> Segment | None:
        """The first chunk that is free as a whole and `wanted`, to be fetched coded, alone; None if there is none."""
        for begin, end in self.free:
            for index in range(-(-begin // self.chunk_size), -(-end // self.chunk_size)):
                start, stop = index * self.chunk_size, index * self.chunk_size + self.length(index)
                if stop > end:
                    break
                if wanted(index):
                    self._cut(start, stop)
                    segment = Segment(start, stop, worker, now, alone=True)
                    segment.coded = True
                    return self._begin(segment)
        return None

    def steal(
        self, worker: int, now: float, *, pace: float, least: int, least_s: float, stuck_s: float
    ) -> Segment | None:
        """The later part of the run that would take longest, so much that a thief of `pace` bytes a second ends with
        its owner; None if no run would take `least_s` seconds more, is that old, and has `least` bytes to give.

        From a worker without a byte for `stuck_s` everything unclaimed is taken.
        """
        victims = [s for s in self.active if not s.alone and s.end - s.claimed >= least and now - s.began >= least_s]
        if not victims:
            return None
        victim = max(victims, key=lambda s: (now - s.moved > stuck_s, s.seconds_left(now)))
        cut = victim.claimed
        if now - victim.moved <= stuck_s:
            if victim.seconds_left(now) < least_s:
                return None
            rest = victim.end - victim.claimed
            owner = victim.pace(now)
            best = victim.claimed + int(rest * owner / (owner + max(pace, 1.0)))
            # At a chunk boundary nothing has to be read back, on a page boundary both can write past the page cache.
            cut = self._boundary(best)
            if not victim.claimed < cut <= victim.end - least or cut - best > rest // 4:
                cut = max(best // 4096 * 4096, victim.claimed)
            cut = min(cut, victim.end - least)
        stolen = Segment(cut, victim.end, worker, now)
        victim.end = cut
        return self._begin(stolen)

    def claim(self, segment: Segment, room: int) -> int:
        """How many bytes after `segment.received` the worker may receive now: at most `room`, within one chunk.

        0 means that the segment is over, also when a thief has shortened it.
        """
        at = segment.received
        stop = min(segment.end, (at // self.chunk_size + 1) * self.chunk_size, at + room)
        if stop <= at:
            return 0
        segment.claimed = max(segment.claimed, stop)
        return stop - at

    def advance(self, segment: Segment, count: int, source: int, now: float) -> int | None:
        """`count` more bytes of the segment, within one chunk, are in the sink. The chunk's number if it is full."""
        index = segment.pos // self.chunk_size
        chunk = self.chunk(index)
        chunk.covered += count
        chunk.sources.add(source)
        segment.pos += count
        segment.moved = now
        return index if chunk.covered == self.length(index) else None

    def release(self, segment: Segment) -> None:
        """The worker stops working on the segment: what is not in the sink becomes free again."""
        self.active.remove(segment)
        if segment.pos < segment.end:
            index = segment.pos // self.chunk_size
            if segment.alone and segment.pos == index * self.chunk_size:
                self.refetch.append(index)
            else:
                # A chunk that was begun alone loses that mark; if it fails again its sources still say whose it is.
                self._free(segment.pos, segment.end)

    def verified(self, index: int) -> None:
        """The chunk is complete and right."""
        if not self.done[index]:
            self.done[index] = 1
            self.done_count += 1
            self.done_bytes += self.length(index)
        self.chunks.pop(index, None)

    def failed(self, index: int) -> None:
        """The chunk is complete and wrong: forget its bytes and have it fetched again by one worker."""
        self.chunks.pop(index, None)
        self.refetch.append(index)

    def adopt(self, index: int) -> None:
        """A reserved chunk has to be fetched after all."""
        begin = index * self.chunk_size
        self._free(begin, begin + self.length(index))

    def _begin(self, segment: Segment) -> Segment:
        segment.claimed = min(segment.start + self._min_claim, segment.end)
        self.active.append(segment)
        return segment

    def _boundary(self, position: int) -> int:
        """The first chunk boundary at or after `position`."""
        return min(self.size, -(-position // self.chunk_size) * self.chunk_size)

    def _free(self, begin: int, end: int) -> None:
        """Add a span, joined with its neighbours."""
        if begin >= end:
            return
        at = bisect_left(self.free, (begin, end))
        if at < len(self.free) and self.free[at][0] == end:
            end = self.free.pop(at)[1]
        if at > 0 and self.free[at - 1][1] == begin:
            at -= 1
            begin = self.free.pop(at)[0]
        insort(self.free, (begin, end))

    def _cover(self, begin: int, end: int, taken: bytearray) -> None:
        """Note bytes of an earlier process, as far as they are still free."""
        begin, end = max(0, begin), min(end, self.size)
        while begin < end:
            index = begin // self.chunk_size
            stop = min(end, (index + 1) * self.chunk_size)
            if not taken[index]:
                cut = self._cut(begin, stop)
                if cut:
                    chunk = self.chunk(index)
                    chunk.covered += cut
                    chunk.sources.add(-1)
                    if chunk.covered == self.length(index):
                        self.unverified.append(index)
            begin = stop

    def _cut(self, begin: int, end: int) -> int:
        """Take [begin, end) out of the free spans; the number of bytes that were in them."""
        cut = 0
        kept: list[tuple[int, int]] = []
        for left, right in self.free:
            low, high = max(left, begin), min(right, end)
            if low >= high:
                kept.append((left, right))
                continue
            cut += high - low
            if left < low:
                kept.append((left, low))
            if high < right:
                kept.append((high, right))
        self.free = kept
        return cut
