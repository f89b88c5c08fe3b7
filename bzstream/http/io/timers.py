"""Deadlines of thousands of connections for the price of one timer.

A connection moves its deadline with every request, nearly always further away, and that costs no more than setting a
float on it. The wheel keeps each item in the slot of the earliest deadline that it was armed for; when that slot comes
due, items whose deadline has moved on are put into a later slot. Precision is one tick, which suits time-outs. For the
event loop's thread.
"""

from __future__ import annotations

from math import ceil, inf
from typing import Protocol

__all__ = ["Timed", "TimerWheel"]


class Timed(Protocol):
    """An item of the wheel, which reads `deadline` (monotonic seconds, or inf) and owns `timer_slot` (0: not armed)."""

    deadline: float
    timer_slot: int


class TimerWheel:
    """`arm` an item after setting its deadline, `disarm` it when it is gone, take what is `due` every tick."""

    __slots__ = ("_next", "_slots", "_tick")

    def __init__(self, tick: float, now: float) -> None:
        self._tick = tick
        self._slots: dict[int, set[Timed]] = {}
        self._next = int(now / tick) + 1  # slot 0 means none

    def __len__(self) -> int:
        """Items that are armed."""
        return sum(map(len, self._slots.values()))

    def arm(self, item: Timed) -> None:
        """Make sure that `item` comes up at its deadline. Costs next to nothing when it comes up before anyway."""
        if item.deadline == inf:
            return
        slot = max(self._next, ceil(item.deadline / self._tick))
        # A nearer slot looks at the deadline again, and moves the item on.
        if item.timer_slot and item.timer_slot <= slot:
            return
        self.disarm(item)
        item.timer_slot = slot
        self._slots.setdefault(slot, set()).add(item)

    def disarm(self, item: Timed) -> None:
        """Forget an item, armed or not."""
        if item.timer_slot:
            self._slots[item.timer_slot].discard(item)
            item.timer_slot = 0

    def due(self, now: float) -> list[Timed]:
        """Items whose deadline has passed, each once; they are disarmed."""
        late: list[Timed] = []
        while self._next * self._tick <= now:
            items = self._slots.pop(self._next, ())
            self._next += 1
            for item in items:
                item.timer_slot = 0
                if item.deadline <= now:
                    late.append(item)
                else:
                    self.arm(item)
        return late
