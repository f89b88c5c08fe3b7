"""Whose turn it is: deficit round robin (Shreedhar and Varghese, 1996) over callers, and round robin inside each.

Callers take turns. A turn is worth a quantum of bytes, and the caller's connections share it: the first in its queue
may send the whole; what it leaves (its socket is full, its answer is over) goes to the next. So a miner with 64
connections gets one miner's share, a miner with one connection gets the same, and short answers cost nobody theirs.
What a caller has no use for in its turn is gone; what it overdrew, it owes.

A caller who comes has his first turn before all others (as RFC 8290 treats new flows), so that a first byte waits for
nobody's megabytes. Until his place in the round was passed he does not come anew, so this is no way to a larger share.

Several threads may have takes under way at a time. What one of them leaves is its caller's next, before others' turns.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

__all__ = ["Flow", "Turns", "Waiting"]


class Waiting(Protocol):
    """What stands in the queue. `flow` is the queue's note."""

    caller: str
    flow: Flow | None


class Flow:
    """One caller: its connections that are ready, and the bytes that they may still send in its turn."""

    __slots__ = ("caller", "credit", "items", "passed", "queued", "ready", "taken")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.credit = 0
        self.items = 0
        """Connections, ready or not."""
        self.queued = False
        """Whether it has a place in the round, or before it."""
        self.passed = False
        """Its turn came while all that was ready was under way: it has the next one."""
        self.taken = 0
        """Takes under way."""
        self.ready: deque[Waiting] = deque()


Item = TypeVar("Item", bound=Waiting)


class Turns(Generic[Item]):
    """The queue. It knows neither time nor threads; constant time a call, but for `remove`."""

    def __init__(self, quantum: int) -> None:
        """`quantum`: bytes of one turn, at least 1."""
        self._quantum = quantum
        self._flows: dict[str, Flow] = {}
        self._come: deque[Flow] = deque()
        self._round: deque[Flow] = deque()
        self._unfinished: deque[Flow] = deque()
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
        queue = self._round
        if flow is None:
            flow = self._flows.get(item.caller)
            if flow is None:
                flow, queue = Flow(item.caller), self._come
                self._flows[item.caller] = flow
            self._items += 1
            self._callers += not flow.items
            flow.items += 1
            item.flow = flow
        if not flow.queued:
            flow.queued = True
            (queue.appendleft if flow.passed else queue.append)(flow)
            flow.passed = False
        flow.ready.append(item)
        self._ready += 1

    def remove(self, item: Item) -> None:
        """It stands in the queue and shall not."""
        assert item.flow is not None
        item.flow.ready.remove(item)
        self._ready -= 1

    def take(self) -> tuple[Item, int] | None:
        """The one whose turn it is, out of the queue, and how many bytes it may send; `settle` has to follow."""
        flow = self._next()
        if flow is None:
            return None
        allowance, flow.credit = flow.credit, 0
        flow.taken += 1
        self._ready -= 1
        item: Item = flow.ready.popleft()  # type: ignore[assignment]
        return item, allowance

    def settle(self, item: Item, rest: int) -> None:
        """A take has ended, with `rest` of its allowance unused (negative: overdrawn). The item is out of the queue."""
        flow = item.flow
        assert flow is not None
        flow.taken -= 1
        flow.credit += rest
        if flow.credit > 0 and flow.ready:
            self._unfinished.append(flow)

    def leave(self, item: Item) -> None:
        """It is out of the queue, and for good; does nothing the second time."""
        flow = item.flow
        if flow is None:
            return
        item.flow = None
        flow.items -= 1
        self._items -= 1
        self._callers -= not flow.items
        if not flow.items and not flow.queued:
            del self._flows[flow.caller]

    def _next(self) -> Flow | None:
        while self._unfinished:
            flow = self._unfinished.popleft()
            if flow.ready and flow.credit > 0:
                return flow
        while queue := self._come or self._round:
            flow = queue.popleft()
            if not flow.ready:
                flow.queued, flow.passed = False, flow.taken > 0
                if not flow.items:
                    del self._flows[flow.caller]
                continue
            self._round.append(flow)
            flow.credit = min(flow.credit, 0) + self._quantum
            if flow.credit > 0:
                return flow
        return None
