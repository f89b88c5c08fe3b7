"""The order of sending: fair among callers whatever their connections and sizes, and nothing lost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from bzstream.http.send.fair_queue import REMEMBERED, FairQueue, Flow

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


def serve(queue: FairQueue[Item], count: int) -> list[Item]:
    """Who has the next queue, each using the whole and being ready again at once."""
    order = []
    for _ in range(count):
        item = queue.pop()
        assert item is not None
        queue.charge(item, QUANTUM)
        queue.add(item)
        order.append(item)
    return order


def test_nobody_waits() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    assert queue.pop() is None
    item = Item("a", 1)
    queue.add(item)
    assert len(queue) == 1
    assert queue.pop() is item
    assert queue.pop() is None
    assert len(queue) == 0


def test_a_removed_item_is_not_taken() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    first, second = Item("a", 1), Item("a", 1)
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    assert queue.pop() is second
    queue.charge(second, QUANTUM)
    assert queue.pop() is None


def test_the_connections_of_a_caller_take_turns() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    first, second, other = Item("a", 1), Item("a", 1), Item("b", 1)
    for item in (first, second, other):
        queue.add(item)
    assert serve(queue, 8) == [first, other, second, other, first, other, second, other]


def test_who_can_use_half_a_turn_has_twice_the_turns() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    items = half, whole = Item("half", QUANTUM // 2), Item("whole", QUANTUM)
    for item in items:
        queue.add(item)
    for _ in range(300):
        taken = queue.pop()
        assert taken is not None
        queue.charge(taken, taken.room)
        taken.sent += taken.room
        queue.add(taken)
    assert abs(half.sent - whole.sent) <= QUANTUM


def test_who_comes_is_served_first_and_then_like_everybody() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    old = [Item(str(number), QUANTUM) for number in range(5)]
    for item in old:
        queue.add(item)
    assert serve(queue, 10) == [*old, *old]
    new = Item("new", QUANTUM)
    queue.add(new)
    assert serve(queue, 14) == [new, new, *old, new, *old, new]


def test_coming_and_going_brings_nobody_a_larger_share() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    for number in range(5):
        queue.add(Item(str(number), QUANTUM))
    queue.add(Item("fickle", QUANTUM))
    served = 0
    for _ in range(600):
        item = queue.pop()
        assert item is not None
        queue.charge(item, QUANTUM)
        if item.caller == "fickle":
            served += 1
            queue.remove(item)
            queue.add(Item("fickle", QUANTUM))
        else:
            queue.add(item)
    assert served == 600 / 6


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_staying_away_brings_no_more_than_being_new(pauses: list[int]) -> None:
    """Whoever comes for one turn and stays away for some, again and again, has what who stays has, and two at most.

    One for being new, and one for having come first.
    """
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    steady = [Item(str(number), QUANTUM) for number in range(4)]
    for item in steady:
        queue.add(item)
    serve(queue, 8)
    had = dict.fromkeys(["guest", *(item.caller for item in steady)], 0)
    for pause in pauses:
        guest = Item("guest", QUANTUM)
        queue.add(guest)
        taken: Item | None = None
        while taken is not guest:
            taken = queue.pop()
            assert taken is not None
            queue.charge(taken, QUANTUM)
            had[taken.caller] += 1
            queue.add(taken) if taken is not guest else queue.remove(taken)
        for other in serve(queue, pause):
            had[other.caller] += 1
        assert had["guest"] <= min(had[item.caller] for item in steady) + 2


def test_a_caller_that_stayed_away_is_new() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    steady, guest = [Item(str(number), QUANTUM) for number in range(3)], Item("guest", QUANTUM)
    for item in (*steady, guest):
        queue.add(item)
    order = serve(queue, 4)
    assert order[-1] is guest
    queue.remove(guest)
    serve(queue, 6)
    again = Item("guest", QUANTUM)
    queue.add(again)
    assert queue.pop() is again


def test_callers_that_left_are_forgotten() -> None:
    """Any number of them, as they come from addresses without number: memory stays what it is."""
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    for number in range(3 * REMEMBERED):
        item = Item(str(number), 1)
        queue.add(item)
        assert queue.pop() is item
        queue.charge(item, 1)
        queue.remove(item)
    assert len(queue.callers) == REMEMBERED
    assert len(queue) == 0
    stayed = Item("stayed", QUANTUM)
    queue.add(stayed)
    serve(queue, 4)
    assert queue.callers == ["stayed"]


def test_a_caller_that_came_back_is_not_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    guest, steady = Item("guest", QUANTUM), Item("steady", QUANTUM)
    queue.add(guest)
    queue.remove(guest)
    queue.add(guest)
    queue.add(steady)
    assert serve(queue, 20).count(guest) == 10
    assert sorted(queue.callers) == ["guest", "steady"]


def test_who_was_blocked_lost_all_but_one_turn() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    items = [Item(str(number), QUANTUM) for number in range(4)]
    for item in items:
        queue.add(item)
    blocked = queue.pop()
    assert blocked is not None
    queue.charge(blocked, QUANTUM)
    serve(queue, 30)
    queue.add(blocked)
    assert serve(queue, 10).count(blocked) == 2 + 2, "one that it is behind, one of this round, and those of two more"


def test_what_was_overdrawn_is_owed() -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    greedy, other = Item("greedy", QUANTUM), Item("other", QUANTUM)
    queue.add(greedy)
    queue.add(other)
    assert queue.pop() is greedy
    queue.charge(greedy, 5 * QUANTUM)
    queue.add(greedy)
    assert serve(queue, 6) == [other, other, other, other, other, greedy]


callers = st.lists(st.lists(st.integers(1, 3 * QUANTUM), min_size=1, max_size=6), min_size=2, max_size=6)


@given(callers, st.integers(1, 2))
def test_callers_get_equal_bytes(rooms: list[list[int]], threads: int) -> None:
    """All have more to send than they may: after many turns nobody is further behind than its last turns explain."""
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    items = [Item(str(number), room) for number, those in enumerate(rooms) for room in those]
    for item in items:
        queue.add(item)
    # A thread is busy for as long as it sends bytes; a connection that has sent is ready again at once.
    under_way: list[tuple[int, int, Item, int]] = []
    now = count = 0
    while now < 40 * QUANTUM:
        while len(under_way) < threads and (taken := queue.pop()) is not None:
            sent = min(taken.room, QUANTUM)
            count += 1
            heapq.heappush(under_way, (now + sent, count, taken, sent))
            taken.sent += sent
        now, _, item, sent = heapq.heappop(under_way)
        queue.charge(item, sent)
        queue.add(item)
    shares = totals(items).values()
    assert max(shares) - min(shares) <= (threads + 1) * QUANTUM


@given(callers, st.data())
def test_whoever_is_ready_is_served(rooms: list[list[int]], data: st.DataObject) -> None:
    """Connections end, block and come back in any order: each one that was added is taken, once."""
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    waiting = [Item(str(number), room) for number, those in enumerate(rooms) for room in those]
    for item in waiting:
        queue.add(item)
    under_way: list[Item] = []
    for _ in range(60):
        step = data.draw(st.sampled_from(["pop", "charge", "remove", "add"]))
        if step == "pop":
            taken = queue.pop()
            assert (taken is None) == (not waiting)
            if taken is not None:
                waiting.remove(taken)
                under_way.append(taken)
        elif step == "charge" and under_way:
            item = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            queue.charge(item, data.draw(st.integers(0, 2 * QUANTUM)))
            if data.draw(st.booleans()):
                queue.remove(item)
        elif step == "remove" and waiting:
            item = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            queue.remove(item)
        elif step == "add":
            item = Item(str(data.draw(st.integers(0, 5))), 1)
            waiting.append(item)
            queue.add(item)
        assert len(queue) == len(waiting)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=20))
def test_few_of_one_caller_or_one_of_each_are_uncontended(steps: list[tuple[str, bool]]) -> None:
    queue: FairQueue[Item] = FairQueue(QUANTUM)
    there: list[Item] = []
    for caller, comes in steps:
        if comes:
            there.append(Item(caller, 1))
            queue.add(there[-1])
        elif there and (taken := queue.pop()) is not None:
            queue.charge(taken, QUANTUM)
            queue.remove(taken)
            queue.remove(taken)
            there.remove(taken)
        callers = {item.caller for item in there}
        alone = len(callers) in (1, len(there))
        assert queue.is_uncontended(3) is (alone and len(there) <= 3)
