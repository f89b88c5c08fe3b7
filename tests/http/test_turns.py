"""The order of sending: fair among callers whatever their connections and sizes, and nothing lost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.turns import _REMEMBERED as REMEMBERED
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


def serve(turns: Turns[Item], count: int) -> list[Item]:
    """Who has the next turns, each using the whole and being ready again at once."""
    order = []
    for _ in range(count):
        item = turns.take()
        assert item is not None
        turns.settle(item, QUANTUM)
        turns.add(item)
        order.append(item)
    return order


def test_nobody_waits() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    assert turns.take() is None
    item = Item("a", 1)
    turns.add(item)
    assert len(turns) == 1
    assert turns.take() is item
    assert turns.take() is None
    assert len(turns) == 0


def test_a_removed_item_is_not_taken() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    first, second = Item("a", 1), Item("a", 1)
    turns.add(first)
    turns.add(second)
    turns.remove(first)
    assert turns.take() is second
    turns.settle(second, QUANTUM)
    assert turns.take() is None


def test_the_connections_of_a_caller_take_turns() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    first, second, other = Item("a", 1), Item("a", 1), Item("b", 1)
    for item in (first, second, other):
        turns.add(item)
    assert serve(turns, 8) == [first, other, second, other, first, other, second, other]


def test_who_can_use_half_a_turn_has_twice_the_turns() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    items = half, whole = Item("half", QUANTUM // 2), Item("whole", QUANTUM)
    for item in items:
        turns.add(item)
    for _ in range(300):
        taken = turns.take()
        assert taken is not None
        turns.settle(taken, taken.room)
        taken.sent += taken.room
        turns.add(taken)
    assert abs(half.sent - whole.sent) <= QUANTUM


def test_who_comes_is_served_first_and_then_like_everybody() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    old = [Item(str(number), QUANTUM) for number in range(5)]
    for item in old:
        turns.add(item)
    assert serve(turns, 10) == [*old, *old]
    new = Item("new", QUANTUM)
    turns.add(new)
    assert serve(turns, 14) == [new, new, *old, new, *old, new]


def test_coming_and_going_brings_nobody_a_larger_share() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    for number in range(5):
        turns.add(Item(str(number), QUANTUM))
    turns.add(Item("fickle", QUANTUM))
    served = 0
    for _ in range(600):
        item = turns.take()
        assert item is not None
        turns.settle(item, QUANTUM)
        if item.caller == "fickle":
            served += 1
            turns.leave(item)
            turns.add(Item("fickle", QUANTUM))
        else:
            turns.add(item)
    assert served == 600 / 6


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_staying_away_brings_no_more_than_being_new(pauses: list[int]) -> None:
    """Whoever comes for one turn and stays away for some, again and again, has what who stays has, and two at most.

    One for being new, and one for having come first.
    """
    turns: Turns[Item] = Turns(QUANTUM)
    steady = [Item(str(number), QUANTUM) for number in range(4)]
    for item in steady:
        turns.add(item)
    serve(turns, 8)
    had = dict.fromkeys(["guest", *(item.caller for item in steady)], 0)
    for pause in pauses:
        guest = Item("guest", QUANTUM)
        turns.add(guest)
        taken: Item | None = None
        while taken is not guest:
            taken = turns.take()
            assert taken is not None
            turns.settle(taken, QUANTUM)
            had[taken.caller] += 1
            turns.add(taken) if taken is not guest else turns.leave(taken)
        for other in serve(turns, pause):
            had[other.caller] += 1
        assert had["guest"] <= min(had[item.caller] for item in steady) + 2


def test_a_caller_that_stayed_away_is_new() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    steady, guest = [Item(str(number), QUANTUM) for number in range(3)], Item("guest", QUANTUM)
    for item in (*steady, guest):
        turns.add(item)
    order = serve(turns, 4)
    assert order[-1] is guest
    turns.remove(guest)
    turns.leave(guest)
    serve(turns, 6)
    again = Item("guest", QUANTUM)
    turns.add(again)
    assert turns.take() is again


def test_callers_that_left_are_forgotten() -> None:
    """Any number of them, as they come from addresses without number: memory stays what it is."""
    turns: Turns[Item] = Turns(QUANTUM)
    for number in range(3 * REMEMBERED):
        item = Item(str(number), 1)
        turns.add(item)
        assert turns.take() is item
        turns.settle(item, 1)
        turns.leave(item)
    assert len(turns._flows) == len(turns._gone) == REMEMBERED
    assert not turns._queue
    stayed = Item("stayed", QUANTUM)
    turns.add(stayed)
    serve(turns, 4)
    assert list(turns._flows) == ["stayed"]
    assert not turns._gone


def test_a_caller_that_came_back_is_not_forgotten() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    guest, steady = Item("guest", QUANTUM), Item("steady", QUANTUM)
    turns.add(guest)
    turns.remove(guest)
    turns.leave(guest)
    turns.add(guest)
    turns.add(steady)
    assert serve(turns, 20).count(guest) == 10
    assert sorted(turns._flows) == ["guest", "steady"]


def test_who_was_blocked_lost_all_but_one_turn() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    items = [Item(str(number), QUANTUM) for number in range(4)]
    for item in items:
        turns.add(item)
    blocked = turns.take()
    assert blocked is not None
    turns.settle(blocked, QUANTUM)
    serve(turns, 30)
    turns.add(blocked)
    assert serve(turns, 10).count(blocked) == 2 + 2, "one that it is behind, one of this round, and those of two more"


def test_what_was_overdrawn_is_owed() -> None:
    turns: Turns[Item] = Turns(QUANTUM)
    greedy, other = Item("greedy", QUANTUM), Item("other", QUANTUM)
    turns.add(greedy)
    turns.add(other)
    assert turns.take() is greedy
    turns.settle(greedy, 5 * QUANTUM)
    turns.add(greedy)
    assert serve(turns, 6) == [other, other, other, other, other, greedy]


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
            sent = min(taken.room, QUANTUM)
            count += 1
            heapq.heappush(under_way, (now + sent, count, taken, sent))
            taken.sent += sent
        now, _, item, sent = heapq.heappop(under_way)
        turns.settle(item, sent)
        turns.add(item)
    shares = totals(items).values()
    assert max(shares) - min(shares) <= (threads + 1) * QUANTUM


@given(callers, st.data())
def test_whoever_is_ready_is_served(rooms: list[list[int]], data: st.DataObject) -> None:
    """Connections end, block and come back in any order: each one that was added is taken, once."""
    turns: Turns[Item] = Turns(QUANTUM)
    waiting = [Item(str(number), room) for number, those in enumerate(rooms) for room in those]
    for item in waiting:
        turns.add(item)
    under_way: list[Item] = []
    for _ in range(60):
        step = data.draw(st.sampled_from(["take", "settle", "remove", "add"]))
        if step == "take":
            taken = turns.take()
            assert (taken is None) == (not waiting)
            if taken is not None:
                waiting.remove(taken)
                under_way.append(taken)
        elif step == "settle" and under_way:
            item = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            turns.settle(item, data.draw(st.integers(0, 2 * QUANTUM)))
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
            turns.settle(taken, QUANTUM)
            turns.leave(taken)
            turns.leave(taken)
            there.remove(taken)
        callers = {item.caller for item in there}
        alone = len(callers) in (1, len(there))
        assert turns.needless(3) is (alone and len(there) <= 3)
