"""Group commit: one thread, one transaction for everything that waits, one fsync for all of it.

An fsync takes a disk 0.1 to 10 ms, whatever it carries. While one is under way, jobs queue up; the next transaction
takes all of them (up to `MAX_BATCH`), so that each job costs less the more there are. A caller gets its result after
the commit that carries its job has returned. If that commit fails, every caller in it gets the error.

A transaction costs 0.3 ms of processor time, whatever it carries, and the event loop that sent the jobs has to wait for
the interpreter meanwhile. On a fast disk a transaction ends before the next few jobs arrive, and most of that time
would go into transactions of two or three jobs. So a transaction begins no sooner than `PACE_S` after the one before
began, unless as many jobs wait as that one carried. A single job is done at once, and on a slow disk a job waits for
nothing but the disk.

Jobs of the same operation that stand next to each other in the queue are handed over as one list (a group), so that 64
submissions cost three statements rather than 190. A transaction in which a job fails is rolled back and done again with
every group in a savepoint. A group that fails again is done job by job, so that a job fails by its own fault alone.
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
from bzstream.util.loops import call_in_loop, settle

__all__ = ["LedgerWriter", "Operation"]

_A = TypeVar("_A")
_R = TypeVar("_R")

MAX_BATCH = 256
"""Jobs of one transaction: bounds what one failure takes along and how long the lock is held (about 10 ms)."""
PACE_S = 0.005
"""See above: at most 200 transactions a second that carry less than the one before."""
MAX_WAITING = 8192
"""Jobs that may wait; beyond it the caller is told at once. 30 s of work at a slow disk's pace."""

Operation = Callable[[Connection, Sequence[_A]], Sequence[_R]]
"""Does a group of jobs within a transaction. Takes their arguments, returns their results in the same order."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    operation: Operation[Any, Any]
    argument: Any
    future: Future[Any] | asyncio.Future[Any]


_JOB_ERRORS = (BzstreamError, DataError, IntegrityError)
"""Errors that a job can cause by itself. Every other error is the database's and fails the whole transaction."""


class _GroupFailed(Exception):
    """A job failed in a transaction that carries other jobs too."""


class LedgerWriter:
    """The ledger's writing thread. `call` and `submit` may be used from any thread, `submit` from any event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._wake_at = 1
        """The number of waiting jobs at which the writer is woken."""
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

    @property
    def waiting(self) -> int:
        """Jobs that no transaction has taken yet."""
        return len(self._jobs)

    def close(self) -> None:
        """Do the jobs that wait, then stop the thread."""
        if not self._closed:
            with self._changed:
                self._closed = True
                self._changed.notify()
            self._thread.join()

    def _put(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                raise LedgerUnavailable("the ledger is closed")
            if len(self._jobs) >= MAX_WAITING:
                raise LedgerUnavailable(f"{MAX_WAITING} writes wait for the ledger's disk already; try again later")
            self._jobs.append(job)
            if self._has_enough():
                self._changed.notify()

    def _run(self) -> None:
        jobs = self._take(1, 0.0)
        while jobs:
            next_turn = time.monotonic() + PACE_S
            _deliver(jobs, self._do(jobs))
            jobs = self._take(len(jobs), next_turn - time.monotonic())

    def _take(self, wake_at: int, patience: float) -> Sequence[_Job]:
        """The jobs of the next transaction: once `wake_at` wait, or as many as there are after `patience` seconds.

        Empty when the writer was closed and everything is done.
        """
        with self._changed:
            self._wake_at = wake_at
            self._changed.wait_for(self._has_enough, max(0.0, patience))
            self._wake_at = 1
            self._changed.wait_for(self._has_enough)
            return [self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_BATCH))]

    def _has_enough(self) -> bool:
        return len(self._jobs) >= self._wake_at or self._closed

    def _do(self, jobs: Sequence[_Job]) -> Sequence[Any]:
        """The result of each job, or the exception that it ended with."""
        groups = [
            (operation, [job.argument for job in group])
            for operation, group in groupby(jobs, key=lambda job: job.operation)
        ]
        try:
            try:
                with self._database.write() as connection:
                    return [result for group in groups for result in _run_group(connection, *group)]
            except _GroupFailed:
                with self._database.write() as connection:
                    return [result for group in groups for result in _run_savepoint(connection, *group)]
        except Exception as error:
            if not isinstance(error, BzstreamError):
                error = LedgerUnavailable(f"the ledger failed: {type(error).__name__}: {error}")
            return [error] * len(jobs)


def _run_group(connection: Connection, operation: Operation[Any, Any], arguments: list[Any]) -> Sequence[Any]:
    """The results of a group. Raises _GroupFailed when one of its jobs fails."""
    try:
        return operation(connection, arguments)
    except _JOB_ERRORS as error:
        raise _GroupFailed from error


def _run_savepoint(connection: Connection, operation: Operation[Any, Any], arguments: list[Any]) -> Sequence[Any]:
    """The results of a group, in a savepoint; when it fails, of each of its jobs in a savepoint of its own."""
    try:
        with connection.begin_nested():
            return operation(connection, arguments)
    except _JOB_ERRORS as error:
        if len(arguments) == 1:
            return [error if isinstance(error, BzstreamError) else LedgerError(f"the ledger refuses it: {error.orig}")]
    return [result for argument in arguments for result in _run_savepoint(connection, operation, [argument])]


def _deliver(jobs: Sequence[_Job], results: Sequence[Any]) -> None:
    """Wake every caller, each event loop once."""
    loops: defaultdict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = defaultdict(list)
    for job, result in zip(jobs, results, strict=True):
        if isinstance(job.future, asyncio.Future):
            loops[job.future.get_loop()].append((job.future, result))
        else:
            settle(job.future, result)
    for loop, settled in loops.items():
        call_in_loop(loop, _settle_all, settled)


def _settle_all(settled: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in settled:
        settle(future, result)
