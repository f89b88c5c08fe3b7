"""Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng, 1997) over callers, and round robin inside each.

Every caller has a *start tag*: the bytes that it was given, counted from where the others stood when it came. The
smallest tag has the next turn, which is worth a quantum of bytes to the first connection in the caller's queue; what
was really sent is added to the tag. So a miner with 64 connections gets one miner's share, a miner with one gets the
same, and one whose socket takes half a quantum at a time has twice the turns. (In rounds of equal turns such a one gets
less: Jain's index of miners with 1 and 16 connections was 0.991 to 0.997 with them, and is 0.998 to 1.000.)

*Virtual time* is the tag of the turn that is under way, the smallest if there are several. A caller who comes starts a
quantum before it, as one does that had no use for its turns meanwhile: so a first byte waits for nobody's megabytes (as
RFC 8290 treats new flows), a socket that was full for a moment costs nothing, and nobody saves up more than that. Tags
are kept until virtual time has passed them by as much, so coming and going is no way to a larger share.

Several threads may have takes under way at a time; each is charged when it is settled.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush, heapreplace
from typing import Generic, Protocol, TypeVar

__all__ = ["Flow", "Turns", "Waiting"]

_REMEMBERED = 4096
"""Callers without connections whose tags are kept, at most; the smallest tags, which have least to gain, go first."""


class Waiting(Protocol):
    """What stands in the queue. `flow` is the queue's note."""

    caller: str
    flow: Flow | None


class Flow:
    """One caller: its connections that are ready, and its start tag."""

    __slots__ = ("caller", "items", "queued", "ready", "remembered", "start")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.start = 0
        self.items = 0
        """Connections, ready or not."""
        self.queued = False
        """It stands in the queue, perhaps by a tag that was smaller."""
        self.remembered = False
        """It stands among those without connections, perhaps by a tag that was smaller, or not rightly any more."""
        self.ready: deque[Waiting] = deque()


Item = TypeVar("Item", bound=Waiting)


class Turns(Generic[Item]):
    """The queue. It knows neither time nor threads; a call takes the logarithm of the callers, `remove` aside."""

    def __init__(self, quantum: int) -> None:
        """`quantum`: bytes of one turn, at least 1."""
        self.quantum = quantum
        self._virtual = quantum
        self._flows: dict[str, Flow] = {}
        # Heaps of (start tag, number, flow), at most one entry a flow: numbers make ties first come, first served.
        self._queue: list[tuple[int, int, Flow]] = []
        self._gone: list[tuple[int, int, Flow]] = []
        self._number = 0
        self._serving: dict[Flow, int] = {}
        """Flows with takes under way, and how many."""
        self._ready = 0
        self._items = 0
        self._callers = 0
        """Flows with items."""

    def __len__(self) -> int:
        return self._ready

    def needless(self, most: int) -> bool:
        """Whether nobody needs turns: at most `most` items, ready or not, of one caller or of as many."""
        return self._items <= most and self._callers in (1, self._items)

    def add(self, item: Item) -> None:
        """It is ready to send, for the first time or again; `leave` has to follow in the end."""
        flow = item.flow
        if flow is None:
            flow = self._flows.get(item.caller)
            if flow is None:
                flow = self._flows[item.caller] = Flow(item.caller)
            self._items += 1
            self._callers += not flow.items
            flow.items += 1
            item.flow = flow
        if not flow.ready:
            flow.start = max(flow.start, self._virtual - self.quantum)
            if not flow.queued:
                flow.queued = True
                heappush(self._queue, self._entry(flow))
        flow.ready.append(item)
        self._ready += 1

    def remove(self, item: Item) -> None:
        """It stands in the queue and shall not."""
        assert item.flow is not None
        item.flow.ready.remove(item)
        self._ready -= 1

    def take(self) -> Item | None:
        """The one whose turn it is, out of the queue; it may send a quantum, and `settle` has to follow."""
        queue = self._queue
        while queue:
            start, _, flow = queue[0]
            if start < flow.start and flow.ready:
                heapreplace(queue, self._entry(flow))
                continue
            if len(flow.ready) <= 1:
                heappop(queue)
                flow.queued = False
                if not flow.ready:
                    continue
            self._serving[flow] = self._serving.get(flow, 0) + 1
            virtual = min(one.start for one in self._serving)
            if virtual > self._virtual:
                self._virtual = virtual
                self._forget()
            self._ready -= 1
            item: Item = flow.ready.popleft()  # type: ignore[assignment]
            return item
        return None

    def settle(self, item: Item, sent: int) -> None:
        """A take has ended; its caller is charged `sent` bytes. The item is out of the queue."""
        flow = item.flow
        assert flow is not None
        flow.start += sent
        self._serving[flow] -= 1
        if not self._serving[flow]:
            del self._serving[flow]

    def leave(self, item: Item) -> None:
        """It is out of the queue, and for good; does nothing the second time."""
        flow = item.flow
        if flow is None:
            return
        item.flow = None
        flow.items -= 1
        self._items -= 1
        if flow.items:
            return
        self._callers -= 1
        if not flow.remembered:
            flow.remembered = True
            heappush(self._gone, self._entry(flow))
        self._forget()

    def _entry(self, flow: Flow) -> tuple[int, int, Flow]:
        self._number += 1
        return flow.start, self._number, flow

    def _forget(self) -> None:
        """Let go of callers without connections that have nothing, or the least, to gain from being new."""
        gone, passed = self._gone, self._virtual - self.quantum
        while gone and (gone[0][0] <= passed or len(gone) > _REMEMBERED):
            noted, _, flow = gone[0]
            if not flow.items and noted < flow.start:
                heapreplace(gone, self._entry(flow))
                continue
            heappop(gone)
            flow.remembered = False
            if not flow.items:
                del self._flows[flow.caller]
