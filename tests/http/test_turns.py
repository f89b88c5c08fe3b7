"""The order of sending: fair among callers whatever their connections and sizes, and nothing lost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.turns import Flow, Turns

QUANTUM = 100


@dataclass(eq=False)
class Item:
    """A connection; `room`: bytes that it takes at a time before it needs to be asked again."""

    caller: str
    room: int
    flow: Flow | None = None
    sent: int = field(default=0)


def totals(items: list[Item]) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in items:
        found[item.caller] = found.get(item.caller, 0) + item.sent
    return found


def test_nobody_waits() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    assert turns.take() is None
    turns.add(Item("a", 1))
    assert len(turns) == 1
    assert turns.take() is not None
    assert turns.take() is None
    assert len(turns) == 0


def test_a_removed_item_is_not_taken() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    first, second = Item("a", 1), Item("a", 1)
    turns.add(first)
    turns.add(second)
    turns.remove(first)
    assert turns.take() == (second, QUANTUM)
    turns.settle(second, 0)
    assert turns.take() is None


def test_what_one_connection_leaves_is_the_callers_next() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    first, second, other = Item("a", 1), Item("a", 1), Item("b", 1)
    for item in (first, second, other):
        turns.add(item)
    assert turns.take() == (first, QUANTUM)
    turns.settle(first, 70)
    assert turns.take() == (second, 70)
    turns.settle(second, 70)
    assert turns.take() == (other, QUANTUM)


def test_who_comes_is_served_first_and_then_like_everybody() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    old = [Item(str(number), QUANTUM) for number in range(5)]
    for item in old:
        turns.add(item)
    for expected in old:
        assert turns.take() == (expected, QUANTUM)
        turns.settle(expected, 0)
        turns.add(expected)
    new = Item("new", QUANTUM)
    turns.add(new)
    order = []
    for _ in range(13):
        taken = turns.take()
        assert taken is not None
        order.append(taken[0])
        turns.settle(taken[0], 0)
        turns.add(taken[0])
    assert order == [new, *old, new, *old, new]


def test_coming_and_going_brings_nobody_a_second_turn_a_round() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    for number in range(5):
        turns.add(Item(str(number), QUANTUM))
    turns.add(Item("fickle", QUANTUM))
    served = 0
    for _ in range(600):
        taken = turns.take()
        assert taken is not None
        item = taken[0]
        turns.settle(item, 0)
        if item.caller == "fickle":
            served += 1
            turns.leave(item)
            turns.add(Item("fickle", QUANTUM))
        else:
            turns.add(item)
    assert served == 600 / 6


def test_a_caller_that_left_is_new_after_a_round() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    steady, guest = [Item(str(number), QUANTUM) for number in range(3)], Item("guest", QUANTUM)
    for item in (*steady, guest):
        turns.add(item)
    for _ in range(8):
        taken = turns.take()
        assert taken is not None
        turns.settle(taken[0], 0)
        turns.leave(guest) if taken[0] is guest else turns.add(taken[0])
    again = Item("guest", QUANTUM)
    turns.add(again)
    assert turns.take() == (again, QUANTUM)


def test_who_was_blocked_waits_for_its_turn() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    items = [Item(str(number), QUANTUM) for number in range(4)]
    blocked = items[0]
    for item in items:
        turns.add(item)
    for _ in range(9):
        taken = turns.take()
        assert taken is not None
        turns.settle(taken[0], 0)
        if taken[0] is not blocked:
            turns.add(taken[0])
    turns.add(blocked)
    served = [taken[0] for taken in (turns.take() for _ in range(4)) if taken is not None]
    assert served[-1] is blocked
    assert set(served) == set(items)


def test_credit_is_not_saved_up_and_debts_are_kept() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    alone = Item("a", 1)
    turns.add(alone)
    assert turns.take() == (alone, QUANTUM)
    turns.settle(alone, 60)  # and nothing else is ready: the rest is gone
    turns.add(alone)
    assert turns.take() == (alone, QUANTUM)
    turns.settle(alone, -250)
    turns.add(alone)
    assert turns.take() == (alone, 50), "it sat out two turns"


callers = st.lists(st.lists(st.integers(1, 3 * QUANTUM), min_size=1, max_size=6), min_size=2, max_size=6)


@given(callers, st.integers(1, 2))
def test_callers_get_equal_bytes(rooms: list[list[int]], threads: int) -> None:
    """All have more to send than they may: after many turns nobody is further behind than its last turns explain."""
    turns: Turns[Item] = Turns(QUANTUM)
    items = [Item(str(number), room) for number, those in enumerate(rooms) for room in those]
    for item in items:
        turns.add(item)
    # A thread is busy for as long as it sends bytes; a connection that has sent is ready again at once.
    under_way: list[tuple[int, int, Item, int]] = []
    now = count = 0
    while now < 40 * QUANTUM:
        while len(under_way) < threads and (taken := turns.take()) is not None:
            item, allowance = taken
            sent = min(item.room, allowance)
            count += 1
            heapq.heappush(under_way, (now + sent, count, item, allowance - sent))
            item.sent += sent
        now, _, item, rest = heapq.heappop(under_way)
        turns.add(item)
        turns.settle(item, rest)
    shares = totals(items).values()
    assert max(shares) - min(shares) <= (threads + 1) * QUANTUM


@given(callers, st.data())
def test_whoever_is_ready_is_served(rooms: list[list[int]], data: st.DataObject) -> None:
    """Connections end, block and come back in any order: each one that was added is taken, once."""
    turns: Turns[Item] = Turns(QUANTUM)
    waiting = [Item(str(number), room) for number, those in enumerate(rooms) for room in those]
    for item in waiting:
        turns.add(item)
    under_way: list[tuple[Item, int]] = []
    for _ in range(60):
        step = data.draw(st.sampled_from(["take", "settle", "remove", "add"]))
        if step == "take":
            taken = turns.take()
            assert (taken is None) == (not waiting)
            if taken is not None:
                assert taken[1] > 0
                waiting.remove(taken[0])
                under_way.append(taken)
        elif step == "settle" and under_way:
            item, allowance = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            turns.settle(item, data.draw(st.integers(-QUANTUM, allowance)))
            if data.draw(st.booleans()):
                turns.leave(item)
        elif step == "remove" and waiting:
            item = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            turns.remove(item)
            turns.leave(item)
        elif step == "add":
            item = Item(str(data.draw(st.integers(0, 5))), 1)
            waiting.append(item)
            turns.add(item)
        assert len(turns) == len(waiting)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=20))
def test_turns_are_needless_for_few_of_one_caller_or_of_as_many(steps: list[tuple[str, bool]]) -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    there: list[Item] = []
    for caller, comes in steps:
        if comes:
            there.append(Item(caller, 1))
            turns.add(there[-1])
        elif there and (taken := turns.take()) is not None:
            turns.settle(taken[0], 0)
            turns.leave(taken[0])
            turns.leave(taken[0])
            there.remove(taken[0])
        callers = {item.caller for item in there}
        alone = len(callers) in (1, len(there))
        assert turns.needless(3) is (alone and len(there) <= 3)
