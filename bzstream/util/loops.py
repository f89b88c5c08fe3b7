"""Carries calls and results from a thread to an event loop; dropped if the loop is closed by then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVarTuple

__all__ = ["call_in_loop", "settle", "settle_in_loop"]

_Ts = TypeVarTuple("_Ts")


def call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[*_Ts], object], *args: *_Ts) -> bool:
    """Have the loop call `function(*args)` soon; from any thread.

    False if the loop is closed: then nothing waits for the call any more.
    """
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return False
    return True


def settle(future: Future[Any] | asyncio.Future[Any], outcome: object) -> None:
    """Give a future its result, or its exception if `outcome` is one. A cancelled future is left alone.

    An asyncio future belongs to its loop: call this there.
    """
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def settle_in_loop(future: asyncio.Future[Any], outcome: object) -> None:
    """`settle`, from any thread."""
    call_in_loop(future.get_loop(), settle, future, outcome)
