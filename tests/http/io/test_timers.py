"""Deadlines of many connections."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.io.timers import TimerWheel


@dataclass(eq=False)
class Item:
    deadline: float
    timer_slot: int = 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30), st.sampled_from([0.25, 1.0, 3.0]))
def test_every_deadline_comes_up_once_within_a_tick(moves: list[tuple[int, int]], tick: float) -> None:
    wheel, items, now = TimerWheel(tick, 100.0), [Item(inf) for _ in range(5)], 100.0
    due_at: dict[int, float] = {}
    for n, (advance, ahead) in enumerate(moves):
        item = items[n % 5]
        item.deadline = now + ahead
        wheel.arm(item)
        now += advance
        for late in wheel.due(now):
            assert isinstance(late, Item)
            assert late.deadline <= now
            due_at[id(late)] = now
            late.deadline = inf
        for other in items:
            assert other.deadline == inf or other.deadline > now - 2 * tick, "a deadline was missed"


def test_a_disarmed_item_is_forgotten() -> None:
    wheel, item = TimerWheel(1.0, 0.0), Item(5.0)
    wheel.arm(item)
    assert len(wheel) == 1
    wheel.disarm(item)
    assert len(wheel) == 0
    assert wheel.due(100.0) == []
