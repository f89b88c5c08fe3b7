"""Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng, 1997) over callers, round robin inside each caller.

Every caller has a *start tag*: the bytes that it was given, counted from where the others stood when it came. The
caller with the smallest tag has the next turn, which is worth a quantum of bytes to the first connection in its queue;
the bytes that were really sent are added to the tag. So a miner with 64 connections gets the same share as a miner with
one, and a miner whose socket takes half a quantum at a time gets twice as many turns. (With rounds of equal turns such
a miner gets less: Jain's index of miners with 1 and 16 connections was 0.991 to 0.997, and is 0.998 to 1.000 now.)

*Virtual time* is the smallest tag of the turns that are under way. A new caller, or one that was idle, gets the start
tag `virtual_time - quantum`. Its first turn comes soon, a briefly full socket loses nothing, and no caller can save up
more than one quantum of credit (RFC 8290 does the same for new flows). Tags are kept until virtual time has passed them
by as much, so leaving and coming back gives nobody a larger share.

Several threads may have turns under way at a time; each is charged when it ends. The queue knows neither time nor
threads: the sender calls it under its lock.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush, heapreplace
from typing import Generic, Protocol, TypeVar

__all__ = ["REMEMBERED", "FairQueue", "Flow", "Queued"]

REMEMBERED = 4096
"""Callers without connections whose tags are kept, at most. The smallest tags go first: they have least to gain."""


class Queued(Protocol):
    """An item of the queue: one connection of a caller. `flow` belongs to the queue."""

    caller: str
    flow: Flow | None


class Flow:
    """One caller: its connections that are ready, and its start tag."""

    __slots__ = ("caller", "in_queue", "items", "ready", "remembered", "start")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.start = 0
        self.items = 0
        """Connections, ready or not."""
        self.in_queue = False
        """Whether it has an entry in the heap of the queue; the entry's tag may be smaller than `start`."""
        self.remembered = False
        """Whether it has an entry in the heap of callers without connections; it may have some again by now."""
        self.ready: deque[Queued] = deque()


Item = TypeVar("Item", bound=Queued)


class FairQueue(Generic[Item]):
    """The queue. A call costs the logarithm of the number of callers, except for `remove`."""

    def __init__(self, quantum: int) -> None:
        """`quantum`: bytes of one turn, at least 1."""
        self.quantum = quantum
        self._virtual_time = quantum
        self._flows: dict[str, Flow] = {}
        # Heaps of (start tag, number, flow), at most one entry a flow; numbers make ties first come, first served.
        self._queue: list[tuple[int, int, Flow]] = []
        self._gone: list[tuple[int, int, Flow]] = []
        self._number = 0
        self._serving: dict[Flow, int] = {}
        """Flows with turns under way, and how many."""
        self._ready = 0
        self._items = 0
        self._callers = 0
        """Flows with items."""

    def __len__(self) -> int:
        """Items that are ready."""
        return self._ready

    @property
    def callers(self) -> list[str]:
        """Callers whose tags are kept, with connections or without."""
        return list(self._flows)

    def is_uncontended(self, most: int) -> bool:
        """Whether turns change nothing: there are at most `most` items, ready or not, of one caller or one of each."""
        return self._items <= most and self._callers in (1, self._items)

    def add(self, item: Item) -> None:
        """The item is ready to send, for the first time or again. It stays known until `remove`."""
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
            flow.start = max(flow.start, self._virtual_time - self.quantum)
            if not flow.in_queue:
                flow.in_queue = True
                heappush(self._queue, self._entry(flow))
        flow.ready.append(item)
        self._ready += 1

    def pop(self) -> Item | None:
        """Take out the item whose turn it is. It may send a quantum; `charge` has to follow."""
        queue = self._queue
        while queue:
            start, _, flow = queue[0]
            if start < flow.start and flow.ready:
                heapreplace(queue, self._entry(flow))
                continue
            if len(flow.ready) <= 1:
                heappop(queue)
                flow.in_queue = False
                if not flow.ready:
                    continue
            self._serving[flow] = self._serving.get(flow, 0) + 1
            virtual_time = min(one.start for one in self._serving)
            if virtual_time > self._virtual_time:
                self._virtual_time = virtual_time
                self._forget()
            self._ready -= 1
            item: Item = flow.ready.popleft()  # type: ignore[assignment]
            return item
        return None

    def charge(self, item: Item, sent: int) -> None:
        """The item's turn has ended: charge its caller `sent` bytes. The item is out of the queue until `add`."""
        flow = item.flow
        assert flow is not None
        flow.start += sent
        self._serving[flow] -= 1
        if not self._serving[flow]:
            del self._serving[flow]

    def remove(self, item: Item) -> None:
        """Forget an item, ready or not, whose turn is not under way. Does nothing the second time."""
        flow = item.flow
        if flow is None:
            return
        if item in flow.ready:
            flow.ready.remove(item)
            self._ready -= 1
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
        """Drop callers without connections that gain nothing, or least, from being treated as new."""
        gone, passed = self._gone, self._virtual_time - self.quantum
        while gone and (gone[0][0] <= passed or len(gone) > REMEMBERED):
            noted, _, flow = gone[0]
            if not flow.items and noted < flow.start:
                heapreplace(gone, self._entry(flow))
                continue
            heappop(gone)
            flow.remembered = False
            if not flow.items:
                del self._flows[flow.caller]
