"""Threads that never keep the process alive.

The standard pools join their threads when the interpreter ends; a thread that waits for a hostile server, or for a GPU
that hangs, would then hold up the restart that is meant to cure it. These are daemons: what they were doing is in the
ledger and in the spool, and both survive. `pipeline.py` uses them from the event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from bzstream.util.loops import settle_in_loop

__all__ = ["WorkerThread", "in_thread"]

_T = TypeVar("_T")


async def in_thread(function: Callable[[], _T], name: str) -> _T:
    """Run a blocking function in a thread of its own; its result. Cancelling the wait does not stop the thread."""
    return await WorkerThread(name, once=True).run(function)


class WorkerThread:
    """One thread for work that must not run beside itself: everything that touches the model's parameters."""

    def __init__(self, name: str, *, once: bool = False) -> None:
        """`once`: the thread ends after its first function."""
        self._work: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._once = once
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def run(self, function: Callable[[], _T]) -> _T:
        """The function's result, after what was handed in before it."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._work.put((future, function))
        return await future

    def _run(self) -> None:
        while True:
            future, function = self._work.get()
            try:
                outcome = function()
            except BaseException as error:
                outcome = error
            settle_in_loop(future, outcome)
            if self._once:
                return
