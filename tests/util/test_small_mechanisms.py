"""Element types, back-off, one warning a problem, results carried to a loop, and figures."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from bzstream.util.backoff import backoff
from bzstream.util.counted import Counted
from bzstream.util.dtypes import BY_FRAMEWORK_NAME, DTYPES
from bzstream.util.loops import call_in_loop, settle, settle_in_loop
from bzstream.util.statistics import jain, quantile
from bzstream.util.warn_once import WarnOnce


@pytest.mark.parametrize("name", DTYPES)
def test_an_element_type_has_one_size_everywhere(name: str) -> None:
    dtype = DTYPES[name]
    if dtype.numpy is not None:
        assert np.dtype(dtype.numpy).itemsize * 8 == dtype.bits
    if dtype.torch is not None:
        assert getattr(torch, dtype.torch).itemsize * 8 == dtype.bits
        assert BY_FRAMEWORK_NAME[dtype.torch] == name
    assert (dtype.numpy is None) == (dtype.torch is None) == (dtype.bits < 8)


def test_backoff_doubles_to_its_limit() -> None:
    pauses = [backoff(n, first=0.5, most=3.0, jitter=False) for n in (-1, 0, 1, 2, 3, 4, 5, 10**9)]
    assert pauses == [0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    some = [backoff(3, first=0.5, most=9.0) for _ in range(200)]
    assert 1.0 <= min(some) < 1.5 < 2.5 < max(some) <= 3.0


def test_a_problem_is_told_once_until_all_was_well() -> None:
    told: list[tuple[str, object]] = []
    warn = WarnOnce(lambda message, reason=None: told.append((message, reason)))
    warn.succeeded()
    for number in range(3):
        warn.failed("broken", reason=number)
    assert warn.failing is True
    warn.succeeded()
    warn.failed("again")
    assert told == [("broken", 0), ("again", None)]


def test_results_reach_a_loop_from_a_thread() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        good, bad, cancelled = (loop.create_future() for _ in range(3))
        cancelled.cancel()

        def work() -> None:
            settle_in_loop(cancelled, 1)
            settle_in_loop(bad, ValueError("no"))
            settle_in_loop(good, 2)

        thread = threading.Thread(target=work)
        thread.start()
        assert await good == 2
        with pytest.raises(ValueError, match="no"):
            await bad
        thread.join()

    asyncio.run(main())


def test_a_closed_loop_is_no_error_and_other_errors_are() -> None:
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    assert call_in_loop(loop, future.cancel)
    loop.close()
    assert not call_in_loop(loop, future.cancel)
    settle_in_loop(future, 1)
    assert not future.done()

    class Odd(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *_: object, **__: object) -> asyncio.Handle:
            raise RuntimeError("something else")

    odd = Odd()
    try:
        with pytest.raises(RuntimeError, match="something else"):
            call_in_loop(odd, print)
    finally:
        odd.close()


def test_futures_of_threads_are_settled_once() -> None:
    future: Future[int] = Future()
    settle(future, 1)
    settle(future, 2)
    assert future.result() == 1


def test_figures() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert math.isnan(quantile([], 0.5))
    assert jain([2.0, 2.0]) == jain([]) == jain([0.0, 0.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25


def test_the_last_user_closes() -> None:
    class Door(Counted):
        closed = 0

        def on_last_release(self) -> None:
            self.closed += 1

    door = Door()
    door.retain()
    door.release()
    assert door.closed == 0
    door.release()
    assert door.closed == 1
    for call in (door.retain, door.release):
        with pytest.raises(AssertionError):
            call()
    assert door.closed == 1
