"""A chunk that comes coded is fetched in parts by several workers, so that it is decoded while others still come.

Were each chunk one worker's, all would be under way at once on a slow link and end together, with everything still to
be decoded after the last byte. A part is a range of one chunk's coded bytes. All parts of a chunk come from one mirror,
so that wrong bytes have one culprit. Pure data without a clock; `TransferState` holds its lock around every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bzstream.client.fetch_plan import Segment
from bzstream.client.manifest import Coding

__all__ = ["CodedChunk", "CodedPart", "CodedParts"]


class CodedChunk:
    """One chunk on its way. `segment`: its place in the plan, which is held until the chunk is over."""

    def __init__(self, segment: Segment, index: int, coding: Coding, mirror: int, memory: memoryview) -> None:
        self.segment = segment
        self.index = index
        self.coding = coding
        self.mirror = mirror
        self.memory = memory
        self.raw = memory[: coding.chunks[index][1]]
        """The coded bytes, as far as they came."""
        self.free = [(0, len(self.raw))]
        """Ranges that nobody fetches."""
        self.missing = len(self.raw)
        """Bytes that did not come yet."""
        self.failed = False
        """It is given up; what still comes of it is of no use."""


@dataclass(slots=True)
class CodedPart:
    """Bytes [begin, end) of a chunk's coded form, in the hands of `worker`. `moved`: when the last byte came."""

    chunk: CodedChunk
    begin: int
    end: int
    worker: int
    moved: float


class CodedParts:
    """The coded chunks of one transfer that are under way."""

    def __init__(self) -> None:
        self._open: list[CodedChunk] = []
        self._active: list[CodedPart] = []
        self._spare: list[memoryview] = []

    def __len__(self) -> int:
        return len(self._open)

    def open(self, segment: Segment, index: int, coding: Coding, mirror: int, chunk_size: int) -> None:
        """Begin with a chunk; `take` then gives its parts."""
        memory = self._spare.pop() if self._spare else memoryview(bytearray(chunk_size))
        self._open.append(CodedChunk(segment, index, coding, mirror, memory))

    def take(self, worker: int, mirror: int, goal: int, now: float) -> CodedPart | None:
        """About `goal` bytes of the chunk from this mirror that was begun first; None if each has its worker.

        A rest of less than half a goal goes with the part before it.
        """
        for chunk in self._open:
            if chunk.mirror == mirror and chunk.free:
                begin, end = chunk.free.pop(0)
                stop = begin + max(1, goal)
                if stop + goal // 2 < end:
                    chunk.free.insert(0, (stop, end))
                    end = stop
                part = CodedPart(chunk, begin, end, worker, now)
                self._active.append(part)
                return part
        return None

    def stuck(self, before: float) -> Iterator[int]:
        """Workers whose part had no byte since `before`."""
        return (part.worker for part in self._active if part.moved < before)

    def arrived(self, part: CodedPart, count: int, now: float) -> bool:
        """`count` more bytes of the part came; whether the chunk is complete with them."""
        part.begin += count
        part.moved = now
        part.chunk.missing -= count
        return part.chunk.missing == 0

    def release(self, part: CodedPart) -> Segment | None:
        """The worker is done with the part, or stops: others may fetch what is left of it. Gives the chunk's segment,
        which has to be released too, if the chunk is over and nobody works on it any more."""
        self._active.remove(part)
        if part.begin < part.end and not part.chunk.failed:
            part.chunk.free.insert(0, (part.begin, part.end))
        return self._close(part.chunk)

    def give_up(self, mirror: int) -> list[Segment]:
        """Nothing coded comes from this mirror any more: the segments of its chunks that nobody works on; the others
        come from `release`."""
        found = []
        for chunk in [chunk for chunk in self._open if chunk.mirror == mirror and chunk.missing]:
            chunk.failed, chunk.free = True, []
            chunk.segment.alone = False  # it may be fetched in any way
            segment = self._close(chunk)
            if segment is not None:
                found.append(segment)
        return found

    def _close(self, chunk: CodedChunk) -> Segment | None:
        if (chunk.missing and not chunk.failed) or any(part.chunk is chunk for part in self._active):
            return None
        self._open.remove(chunk)
        self._spare.append(chunk.memory)
        return chunk.segment
