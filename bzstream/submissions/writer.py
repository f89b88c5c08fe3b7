"""Group commit: one thread, one transaction for everything that waits, one fsync for all of it.

An fsync takes a disk 0.1 to 10 ms, whatever it carries. While one is under way, requests queue up; the next
transaction takes all of them (up to `MAX_BATCH`), so that the more there is to do the cheaper each becomes. Nobody is
answered before the commit that carries his work has returned, and if it fails everybody in it is told so.

Work of the same kind that stands together in the queue is handed over as one list, so that 64 submissions cost five
statements rather than 320. Each such group runs in a savepoint; one that fails is taken apart, so that
nobody fails with another.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError

from bzstream.errors import BzstreamError
from bzstream.submissions.database import Database, LedgerUnavailable
from bzstream.submissions.schema import LedgerError

__all__ = ["Operation", "Writer"]

_A = TypeVar("_A")
_R = TypeVar("_R")

MAX_BATCH = 256
"""Jobs of one transaction: bounds what one failure takes along and how long the lock is held (about 10 ms)."""
MAX_WAITING = 8192
"""Jobs that may wait; beyond it the caller is told at once. 30 s of work at a slow disk's pace."""

Operation = Callable[[Connection, Sequence[_A]], Sequence[_R]]
"""Does a group of jobs within a transaction: arguments to results, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    operation: Operation[Any, Any]
    argument: Any
    future: Future[Any] | asyncio.Future[Any]


class Writer:
    """The ledger's writing thread. `call` and `submit` may be used from any thread, `submit` from any event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def call(self, operation: Operation[_A, _R], argument: _A) -> _R:
        """Do one job and wait for its commit. Raises what the operation raised, or LedgerUnavailable."""
        future: Future[_R] = Future()
        self._put(_Job(operation, argument, future))
        return future.result()

    def submit(self, operation: Operation[_A, _R], argument: _A) -> asyncio.Future[_R]:
        """Like `call`, for an event loop. A caller that is cancelled while it waits does not undo its job."""
        future: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._put(_Job(operation, argument, future))
        return future

    def close(self) -> None:
        """Finish what waits, then stop."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def _put(self, job: _Job) -> None:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        if self._jobs.qsize() >= MAX_WAITING:
            raise LedgerUnavailable(f"{MAX_WAITING} writes wait for the ledger's disk already; try again later")
        self._jobs.put(job)

    def _run(self) -> None:
        open_ = True
        while open_:
            batch = [self._jobs.get()]
            while len(batch) < MAX_BATCH and not self._jobs.empty():
                batch.append(self._jobs.get())
            open_ = None not in batch
            jobs = [job for job in batch if job is not None]
            if jobs:
                _deliver(jobs, self._do(jobs))

    def _do(self, jobs: Sequence[_Job]) -> Sequence[Any]:
        """The result of each job, or the exception that it ended with."""
        results: list[Any] = []
        try:
            with self._database.write() as connection:
                for operation, group in groupby(jobs, key=lambda job: job.operation):
                    results += _together(connection, operation, [job.argument for job in group])
        except Exception as error:
            if not isinstance(error, BzstreamError):
                error = LedgerUnavailable(f"the ledger failed: {type(error).__name__}: {error}")
            return [error] * len(jobs)
        return results


def _together(connection: Connection, operation: Operation[Any, Any], arguments: list[Any]) -> Sequence[Any]:
    """The results of a group; when it fails, of each of its members alone, so that one cannot fail the others."""
    try:
        with connection.begin_nested():
            return operation(connection, arguments)
    except (BzstreamError, DataError, IntegrityError) as error:
        if len(arguments) == 1:
            return [error if isinstance(error, BzstreamError) else LedgerError(f"the ledger refuses it: {error.orig}")]
    return [result for argument in arguments for result in _together(connection, operation, [argument])]


def _deliver(jobs: Sequence[_Job], results: Sequence[Any]) -> None:
    """Wake every caller, each event loop once."""
    loops: defaultdict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = defaultdict(list)
    for job, result in zip(jobs, results, strict=True):
        if isinstance(job.future, asyncio.Future):
            loops[job.future.get_loop()].append((job.future, result))
        else:
            _settle(job.future, result)
    for loop, settled in loops.items():
        try:
            loop.call_soon_threadsafe(_settle_all, settled)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass


def _settle_all(settled: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in settled:
        if not future.done():  # cancelled
            _settle(future, result)


def _settle(future: Future[Any] | asyncio.Future[Any], result: Any) -> None:
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
