"""The pool: order inside a queue, queues side by side, buffers that bound memory, and errors that end everything."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import pytest

from bzstream.model.hash_pool import HashPool, SerialQueue


def test_a_lane_keeps_its_order_while_lanes_run_side_by_side() -> None:
    pick = random.Random(0)
    done: dict[int, list[int]] = {queue: [] for queue in range(6)}
    inside = {queue: threading.Lock() for queue in done}

    def work(queue: int, job: int) -> None:
        assert inside[queue].acquire(blocking=False), "two jobs of one queue at once"
        done[queue].append(job)
        time.sleep(0)  # another thread's turn
        inside[queue].release()

    with HashPool(4) as pool:
        queues = {number: SerialQueue(pool) for number in done}
        for job in range(6000):
            number = pick.randrange(6)
            queues[number].put(partial(work, number, job))
            if job % 7 == 0:
                time.sleep(0)  # so that queues run dry and are filled again while they are worked on
        pool.drain()
    assert sum(map(len, done.values())) == 6000
    assert all(order == sorted(order) for order in done.values())


def test_two_lanes_really_run_at_once() -> None:
    meet = threading.Barrier(2, timeout=20)
    with HashPool(2) as pool:
        for _ in range(2):
            SerialQueue(pool).put(meet.wait)
        pool.drain()


def test_a_slab_is_free_when_its_last_job_is_done() -> None:
    gate = threading.Event()
    with HashPool(2, buffers=1, buffer_size=8) as pool:
        buffer = pool.buffer()
        buffer.users = 2
        SerialQueue(pool).put(gate.wait, buffer)
        SerialQueue(pool).put(lambda: None, buffer)
        got: list[object] = []
        waiter = threading.Thread(target=lambda: got.append(pool.buffer()))
        waiter.start()
        assert not got
        gate.set()
        waiter.join(20)
        assert got == [buffer]
        pool.drain()


def fail() -> None:
    raise ValueError("first")


def test_the_first_error_skips_the_rest_and_is_raised() -> None:
    done: list[int] = []
    with HashPool(1, buffers=1, buffer_size=1) as pool:
        queue = SerialQueue(pool)
        buffer = pool.buffer()
        buffer.users = 2
        queue.put(fail, buffer)
        queue.put(partial(done.append, 1), buffer)
        with pytest.raises(ValueError, match="first"):
            pool.drain()
        with pytest.raises(ValueError, match="first"):
            pool.buffer()  # it came back although its last job was skipped
    assert done == []


def test_leaving_early_skips_what_has_not_begun_and_joins() -> None:
    began = threading.Event()
    done: list[int] = []

    def leave() -> None:
        with HashPool(1) as pool:

            def hold() -> None:
                began.set()
                while not pool.stopping:  # under way until the pool has been told to stop
                    time.sleep(0.001)

            queue = SerialQueue(pool)
            queue.put(hold)
            queue.put(partial(done.append, 1))
            began.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pool-")]
    assert done == []
