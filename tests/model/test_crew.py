"""The crew: order inside a lane, lanes side by side, slabs that bound memory, and errors that end everything."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import pytest

from bzstream.model.crew import Crew, Lane


def test_a_lane_keeps_its_order_while_lanes_run_side_by_side() -> None:
    pick = random.Random(0)
    done: dict[int, list[int]] = {lane: [] for lane in range(6)}
    inside = {lane: threading.Lock() for lane in done}

    def work(lane: int, job: int) -> None:
        assert inside[lane].acquire(blocking=False), "two jobs of one lane at once"
        done[lane].append(job)
        time.sleep(0)  # another thread's turn
        inside[lane].release()

    with Crew(4) as crew:
        lanes = {number: Lane(crew) for number in done}
        for job in range(6000):
            number = pick.randrange(6)
            lanes[number].put(partial(work, number, job))
            if job % 7 == 0:
                time.sleep(0)  # so that lanes run dry and are filled again while they are worked on
        crew.drain()
    assert sum(map(len, done.values())) == 6000
    assert all(order == sorted(order) for order in done.values())


def test_two_lanes_really_run_at_once() -> None:
    meet = threading.Barrier(2, timeout=20)
    with Crew(2) as crew:
        for _ in range(2):
            Lane(crew).put(meet.wait)
        crew.drain()


def test_a_slab_is_free_when_its_last_job_is_done() -> None:
    gate = threading.Event()
    with Crew(2, slabs=1, slab_size=8) as crew:
        slab = crew.slab()
        slab.users = 2
        Lane(crew).put(gate.wait, slab)
        Lane(crew).put(lambda: None, slab)
        got: list[object] = []
        waiter = threading.Thread(target=lambda: got.append(crew.slab()))
        waiter.start()
        assert not got
        gate.set()
        waiter.join(20)
        assert got == [slab]
        crew.drain()


def fail() -> None:
    raise ValueError("first")


def test_the_first_error_skips_the_rest_and_is_raised() -> None:
    done: list[int] = []
    with Crew(1, slabs=1, slab_size=1) as crew:
        lane = Lane(crew)
        slab = crew.slab()
        slab.users = 2
        lane.put(fail, slab)
        lane.put(partial(done.append, 1), slab)
        with pytest.raises(ValueError, match="first"):
            crew.drain()
        with pytest.raises(ValueError, match="first"):
            crew.slab()  # it came back although its last job was skipped
    assert done == []


def test_leaving_early_skips_what_has_not_begun_and_joins() -> None:
    began = threading.Event()
    done: list[int] = []

    def leave() -> None:
        with Crew(1) as crew:

            def hold() -> None:
                began.set()
                while crew._error is None:  # under way until the crew has been told to stop
                    time.sleep(0.001)

            lane = Lane(crew)
            lane.put(hold)
            lane.put(partial(done.append, 1))
            began.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crew-")]
    assert done == []
