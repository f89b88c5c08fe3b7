"""Coded chunks in parts: no byte twice, none left out, few chunks under way, and a chunk that is over is over once."""

from __future__ import annotations

from bzstream.client.coded_parts import CodedPart, CodedParts
from bzstream.client.fetch_plan import FetchPlan
from bzstream.client.manifest import Coding

CHUNK, LENGTH, COUNT = 1000, 600, 12
CODING = Coding("planes-1", None, LENGTH * COUNT, tuple((i * LENGTH, LENGTH, b"") for i in range(COUNT)), '"etag"')


class Work:
    """A plan of twelve chunks, all coded, and workers who take what comes first."""

    def __init__(self) -> None:
        self.plan = FetchPlan(CHUNK * COUNT, CHUNK)
        self.parts = CodedParts()

    def take(self, worker: int, goal: int = 100, mirror: int = 0) -> CodedPart | None:
        part = self.parts.take(worker, mirror, goal, 0.0)
        if part is not None:
            return part
        segment = self.plan.take_chunk(worker, lambda index: True, 0.0)
        if segment is None:
            return None
        self.parts.open(segment, segment.start // CHUNK, CODING, mirror, CHUNK)
        return self.parts.take(worker, mirror, goal, 0.0)

    def must_take(self, worker: int, mirror: int = 0) -> CodedPart:
        part = self.take(worker, mirror=mirror)
        assert part is not None
        return part


def test_a_chunk_is_complete_while_the_bytes_of_others_are_still_to_come() -> None:
    """Eight workers take turns with an equal share of the link: at any time no more than they hold, and the rest of one
    chunk, is neither decoded nor still to be asked for."""
    work, came, decoded = Work(), [], []
    held = {worker: work.must_take(worker) for worker in range(8)}
    while held:
        for worker, part in list(held.items()):
            came.append((part.chunk.index, part.begin))
            if work.parts.arrived(part, 1, 0.0):
                decoded.append(part.chunk.index)
                assert len(came) - len(decoded) * LENGTH <= 8 * 100 + LENGTH
            if part.begin == part.end:
                segment = work.parts.release(part)
                assert (segment is not None) == (decoded[-1:] == [part.chunk.index])
                following = work.take(worker)
                held.pop(worker)
                if following is not None:
                    held[worker] = following
            assert len(work.parts) <= 3
    assert decoded == sorted(decoded) == list(range(COUNT))
    assert sorted(came) == [(index, at) for index in range(COUNT) for at in range(LENGTH)]


def test_what_a_worker_leaves_is_the_next_ones() -> None:
    work = Work()
    part = work.must_take(0)
    assert not work.parts.arrived(part, 30, 0.0)
    assert work.parts.release(part) is None
    again = work.must_take(1)
    assert (again.chunk, again.begin) == (part.chunk, 30)


def test_a_chunk_has_one_mirror_and_is_given_up_with_it() -> None:
    work = Work()
    first, second, other = work.must_take(0), work.must_take(1), work.must_take(2, mirror=1)
    assert first.chunk is second.chunk is not other.chunk
    assert work.parts.give_up(0) == [], "two workers are still at it"
    assert first.chunk.failed
    assert not other.chunk.failed
    assert work.parts.release(first) is None
    segment = work.parts.release(second)
    assert segment is first.chunk.segment
    work.plan.release(segment)
    assert work.plan.free[0] == (0, CHUNK)
    assert work.parts.release(other) is None
    assert work.parts.give_up(1) == [other.chunk.segment], "nobody works on it"
    assert len(work.parts) == 0


def test_stuck_workers_are_named() -> None:
    work = Work()
    part, slow = work.must_take(0), work.must_take(1)
    work.parts.arrived(part, 1, 5.0)
    assert list(work.parts.stuck(4.0)) == [slow.worker]
