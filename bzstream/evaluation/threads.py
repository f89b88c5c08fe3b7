"""Threads that never keep the process alive.

The standard pools join their threads when the interpreter ends; a thread that waits for a hostile server, or for a GPU
that hangs, would then hold up the restart that is meant to cure it. These are daemons: what they were doing is in the
ledger and in the spool, and both survive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Worker", "in_thread"]

_T = TypeVar("_T")


async def in_thread(function: Callable[[], _T], name: str) -> _T:
    """Run a blocking function in a thread of its own; its result. Cancelling the wait does not stop the thread."""
    future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
    threading.Thread(target=_deliver, args=(future, function), name=name, daemon=True).start()
    return await future


class Worker:
    """One thread for work that must not run beside itself: everything that touches the model's parameters."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def run(self, function: Callable[[], _T]) -> _T:
        """The function's result, after what was handed in before it."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._work.put((future, function))
        return await future

    def _run(self) -> None:
        while True:
            _deliver(*self._work.get())


def _deliver(future: asyncio.Future[Any], function: Callable[[], Any]) -> None:
    try:
        result, error = function(), None
    except BaseException as raised:
        result, error = None, raised

    def settle() -> None:
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits any more
        pass
