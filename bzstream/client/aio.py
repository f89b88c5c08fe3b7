"""`pull_async` and `fetch_tensors_async`: the same calls for asyncio.

The transfer runs in a thread of its own, with blocking sockets, because that is what fills memory fastest from Python.
The coroutine waits for that thread. When it is cancelled it stops the transfer and waits until its threads are gone
before the cancellation goes on: no file is written after the caller believes that it is over.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from bzstream.client.pull import pull
from bzstream.client.session import Session
from bzstream.client.tensors import fetch_tensors

__all__ = ["fetch_tensors_async", "pull_async"]

P = ParamSpec("P")
T = TypeVar("T")


def _awaitable(call: Callable[P, T], name: str) -> Callable[P, Coroutine[Any, Any, T]]:
    @functools.wraps(call)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        import asyncio  # 20 ms that a command without a loop need not pay

        opened: list[Session] = []
        cancelled = False

        def note(session: Session) -> None:
            opened.append(session)
            if cancelled:
                session.stop()

        kwargs["on_open"] = note
        state = asyncio.create_task(asyncio.to_thread(call, *args, **kwargs))
        try:
            return await asyncio.shield(state)
        except asyncio.CancelledError:
            cancelled = True
            for session in opened:
                session.stop()
            while not state.done():
                with contextlib.suppress(BaseException):
                    await asyncio.shield(state)
            raise

    run.__name__ = run.__qualname__ = name
    return run


pull_async = _awaitable(pull, "pull_async")
"""`await pull_async(...)`: `pull` (a PullReport) without blocking the event loop."""

fetch_tensors_async = _awaitable(fetch_tensors, "fetch_tensors_async")
"""`await fetch_tensors_async(...)`: `fetch_tensors` without blocking the event loop."""
