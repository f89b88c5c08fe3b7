"""Group commit: one thread, one transaction for everything that waits, one fsync for all of it.

An fsync takes a disk 0.1 to 10 ms, whatever it carries. While one is under way, requests queue up; the next
transaction takes all of them (up to `MAX_BATCH`), so that the more there is to do the cheaper each becomes. Nobody is
answered before the commit that carries his work has returned, and if it fails everybody in it is told so.

A transaction takes the processor 0.3 ms, whatever it carries, from the event loop whose jobs it does. On a fast disk it
would be over before the next few jobs are there, and most of that time would go into transactions of two or three. So a
transaction begins no sooner than `PACE_S` after the one before began, unless as many jobs as that one carried wait
already: who comes alone is done at once, and on a slow disk nobody ever waits for anything but the disk.

Work of the same kind that stands together in the queue is handed over as one list, so that 64 submissions cost three
statements rather than 190. A transaction in which one job fails is rolled back and done again with every group in a
savepoint; a group that fails is taken apart, so that nobody fails with another.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
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
PACE_S = 0.005
"""See above: at most 200 transactions a second that carry less than the one before."""
MAX_WAITING = 8192
"""Jobs that may wait; beyond it the caller is told at once. 30 s of work at a slow disk's pace."""

Operation = Callable[[Connection, Sequence[_A]], Sequence[_R]]
"""Does a group of jobs within a transaction: arguments to results, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    operation: Operation[Any, Any]
    argument: Any
    future: Future[Any] | asyncio.Future[Any]


_OF_ONE_JOB = (BzstreamError, DataError, IntegrityError)
"""What a job may fail with by its own fault. Everything else is the database's, and fails the transaction."""


class _Spoiled(Exception):
    """A job failed in a transaction with others."""


class Writer:
    """The ledger's writing thread. `call` and `submit` may be used from any thread, `submit` from any event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._news = threading.Condition()
        self._enough = 1
        """Jobs for which the writer is to be woken."""
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
            with self._news:
                self._closed = True
                self._news.notify()
            self._thread.join()

    def _put(self, job: _Job) -> None:
        with self._news:
            if self._closed:
                raise LedgerUnavailable("the ledger is closed")
            if len(self._jobs) >= MAX_WAITING:
                raise LedgerUnavailable(f"{MAX_WAITING} writes wait for the ledger's disk already; try again later")
            self._jobs.append(job)
            if self._is_enough():
                self._news.notify()

    def _run(self) -> None:
        jobs = self._take(1, 0.0)
        while jobs:
            next_turn = time.monotonic() + PACE_S
            _deliver(jobs, self._do(jobs))
            jobs = self._take(len(jobs), next_turn - time.monotonic())

    def _take(self, enough: int, patience: float) -> Sequence[_Job]:
        """The jobs of the next transaction, once there are `enough`, or any after `patience` seconds.

        Empty when the writer was closed and everything is done.
        """
        with self._news:
            self._enough = enough
            self._news.wait_for(self._is_enough, max(0.0, patience))
            self._enough = 1
            self._news.wait_for(self._is_enough)
            return [self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_BATCH))]

    def _is_enough(self) -> bool:
        return len(self._jobs) >= self._enough or self._closed

    def _do(self, jobs: Sequence[_Job]) -> Sequence[Any]:
        """The result of each job, or the exception that it ended with."""
        groups = [
            (operation, [job.argument for job in group])
            for operation, group in groupby(jobs, key=lambda job: job.operation)
        ]
        try:
            try:
                with self._database.write() as connection:
                    return [result for group in groups for result in _plainly(connection, *group)]
            except _Spoiled:
                with self._database.write() as connection:
                    return [result for group in groups for result in _together(connection, *group)]
        except Exception as error:
            if not isinstance(error, BzstreamError):
                error = LedgerUnavailable(f"the ledger failed: {type(error).__name__}: {error}")
            return [error] * len(jobs)


def _plainly(connection: Connection, operation: Operation[Any, Any], arguments: list[Any]) -> Sequence[Any]:
    """The results of a group. Raises _Spoiled when one of its jobs fails."""
    try:
        return operation(connection, arguments)
    except _OF_ONE_JOB as error:
        raise _Spoiled from error


def _together(connection: Connection, operation: Operation[Any, Any], arguments: list[Any]) -> Sequence[Any]:
    """The results of a group; when it fails, of each of its members alone, so that one cannot fail the others."""
    try:
        with connection.begin_nested():
            return operation(connection, arguments)
    except _OF_ONE_JOB as error:
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
