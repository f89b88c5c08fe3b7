"""The plan: every byte is written once, stolen work is not lost, wrong chunks come back alone."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.client.fetch_plan import FetchPlan, Segment

KIB = 1024


def run_lanes(plan: FetchPlan, seed: int, workers: int, bad_chunks: set[int]) -> tuple[list[int], int]:
    """Lanes in random interleaving until the plan is complete: writes per byte of the last judged state, steps."""
    chance = random.Random(seed)
    written = [0] * plan.size
    holding: dict[int, Segment] = {}
    to_fail = dict.fromkeys(bad_chunks, 1)
    steps = 0
    while not plan.complete:
        steps += 1
        assert steps < 200_000, "no end"
        worker = chance.randrange(workers)
        segment = holding.get(worker)
        if segment is None:
            segment = plan.take(worker, chance.randrange(1, plan.size + 1), steps) or plan.steal(
                worker,
                steps,
                pace=chance.choice([0, 1, 100, 1e9]),
                least=chance.choice([1, 50, 1000]),
                least_s=chance.choice([0, 10]),
                stuck_s=chance.choice([1e9, 20]),
            )
            if segment is not None:
                holding[worker] = segment
            continue
        allowed = plan.claim(segment, chance.choice([1, 100, 5000]))
        if allowed == 0 or chance.random() < 0.02:  # over, or the connection breaks
            plan.release(segment)
            del holding[worker]
            continue
        count = chance.randrange(1, allowed + 1)
        for at in range(segment.received, segment.received + count):
            written[at] += 1
        segment.received += count
        full = plan.advance(segment, count, 0, steps)
        if full is not None:
            begin = full * plan.chunk_size
            assert all(n == 1 for n in written[begin : begin + plan.length(full)]), "written twice or not at all"
            if to_fail.pop(full, 0):
                plan.failed(full)
                for at in range(begin, begin + plan.length(full)):
                    written[at] = 0
            else:
                plan.verified(full)
    return written, steps


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 20_000),
    chunk=st.integers(1, 7_000),
    workers=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_byte_is_written_exactly_once(
    size: int, chunk: int, workers: int, seed: int, data: st.DataObject
) -> None:
    chunk = max(chunk, size // 200 + 1)
    count = -(-size // chunk)
    done = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=3)) - done
    plan = FetchPlan(size, chunk, done=done, min_claim=data.draw(st.sampled_from([1, 100, 65536])))
    written, _ = run_lanes(plan, seed, workers, bad)
    for at, times in enumerate(written):
        assert times == (0 if at // chunk in done else 1)
    assert plan.done_bytes == size
    assert plan.open_bytes == 0


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 5_000),
    chunk=st.integers(1, 2_000),
    spans=st.lists(st.tuples(st.integers(-10, 6_000), st.integers(-10, 6_000)), max_size=8),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_received_ranges_are_not_fetched_again(
    size: int, chunk: int, spans: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    chunk = max(chunk, size // 100 + 1)
    count = -(-size // chunk)
    done = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    plan = FetchPlan(size, chunk, done=done, received=spans)
    had = [any(a <= at < b for a, b in spans) for at in range(size)]
    for index in plan.unverified:
        plan.verified(index)
    fetched = [0] * size
    chance = random.Random(seed)
    while (segment := plan.take(0, chance.randrange(1, size + 1), 0.0)) is not None:
        while allowed := plan.claim(segment, 1000):
            for at in range(segment.received, segment.received + allowed):
                fetched[at] += 1
            segment.received += allowed
            full = plan.advance(segment, allowed, 0, 0.0)
            if full is not None:
                plan.verified(full)
        plan.release(segment)
    assert plan.complete
    for at in range(size):
        assert fetched[at] == (0 if had[at] or at // chunk in done else 1)


def test_runs_are_taken_from_the_front_in_whole_chunks_or_in_parts_of_one() -> None:
    plan = FetchPlan(1000 * KIB, 100 * KIB)
    first = plan.take(0, 150 * KIB, 0.0)
    second = plan.take(1, 100 * KIB, 0.0)
    third = plan.take(2, 30 * KIB, 0.0)
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.start, first.end) == (0, 200 * KIB)
    assert (second.start, second.end) == (200 * KIB, 300 * KIB)
    assert (third.start, third.end) == (300 * KIB, 330 * KIB)


def test_a_thief_takes_the_later_half_at_a_chunk_boundary_of_the_slowest_lane() -> None:
    plan = FetchPlan(1600 * KIB, 100 * KIB, min_claim=KIB)
    slow = plan.take(0, 800 * KIB, 0.0)
    fast = plan.take(1, 800 * KIB, 0.0)
    assert slow is not None
    assert fast is not None
    for segment, count in ((slow, 10 * KIB), (fast, 90 * KIB)):
        plan.claim(segment, count)
        segment.received += count
        plan.advance(segment, count, 0, 1.0)
    stolen = plan.steal(2, 1.0, pace=10 * KIB, least=16 * KIB, least_s=1, stuck_s=10)
    assert stolen is not None
    assert (stolen.start, stolen.end) == (500 * KIB, 800 * KIB)
    assert slow.end == 500 * KIB


def test_a_thief_splits_a_single_chunk_and_leaves_what_is_claimed() -> None:
    plan = FetchPlan(100 * KIB, 100 * KIB, min_claim=KIB)
    owner = plan.take(0, 100 * KIB, 0.0)
    assert owner is not None
    assert plan.claim(owner, 40 * KIB) == 40 * KIB
    stolen = plan.steal(1, 1.0, pace=4096, least=8 * KIB, least_s=1, stuck_s=10)
    assert stolen is not None
    assert 40 * KIB < stolen.start < 100 * KIB
    assert stolen.start % 4096 == 0
    assert owner.end == stolen.start
    assert plan.steal(2, 1.0, pace=4096, least=60 * KIB, least_s=1, stuck_s=10) is None
    assert plan.steal(2, 1.0, pace=4096, least=8 * KIB, least_s=99, stuck_s=10) is None


def test_a_stuck_lane_loses_everything_it_has_not_claimed() -> None:
    plan = FetchPlan(100 * KIB, 100 * KIB, min_claim=KIB)
    owner = plan.take(0, 100 * KIB, 0.0)
    assert owner is not None
    plan.claim(owner, 10 * KIB)
    stolen = plan.steal(1, 99.0, pace=1, least=1 * KIB, least_s=1, stuck_s=10)
    assert stolen is not None
    assert stolen.start == 10 * KIB


def test_a_wrong_chunk_is_fetched_alone_and_cannot_be_stolen() -> None:
    plan = FetchPlan(300 * KIB, 100 * KIB)
    plan.failed(1)
    again = plan.take(0, 1000 * KIB, 0.0)
    assert again is not None
    assert (again.start, again.end, again.alone) == (100 * KIB, 200 * KIB, True)
    while plan.take(1, 1000 * KIB, 0.0) is not None:
        pass
    plan.active = [again]
    assert plan.steal(2, 99.0, pace=1, least=1, least_s=0, stuck_s=1) is None


def test_a_run_is_not_passed_on_before_its_first_byte() -> None:
    plan = FetchPlan(1000 * KIB, 1000 * KIB, min_claim=64 * KIB)
    assert plan.take(0, 1000 * KIB, 0.0) is not None
    assert plan.steal(1, 0.5, pace=1e6, least=KIB, least_s=1, stuck_s=10) is None, "it has hardly begun"
    stolen = plan.steal(1, 20.0, pace=1e6, least=KIB, least_s=1, stuck_s=10)
    assert stolen is not None
    assert stolen.start == 64 * KIB
    assert plan.steal(2, 20.5, pace=1e6, least=KIB, least_s=1, stuck_s=10) is None
