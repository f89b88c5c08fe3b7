"""Threads that do jobs in queues: the jobs of one queue one after the other, the queues side by side.

Hashing a stream is sequential, but a snapshot has many streams: SHA-256 and BLAKE3 of the full model, and of each
unit, and the writing of each file. Each is a queue. The reader hands the same buffer to every queue that needs some of
its bytes and goes on to the next one; a buffer is free again when the last of its jobs is done. The number of buffers
bounds the memory, and a reader that runs ahead of the slowest queue waits for a buffer. hashlib, blake3 and the system
calls give up the interpreter's lock while they work, so plain threads use all cores.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

__all__ = ["Buffer", "HashPool", "SerialQueue"]

Job = Callable[[], object]


class Buffer:
    """A buffer that several jobs read; `users` counts those that are not done."""

    __slots__ = ("users", "view")

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))
        self.users = 0


class SerialQueue:
    """Jobs that are done in the order in which they were put."""

    __slots__ = ("_pool", "active", "jobs")

    def __init__(self, pool: HashPool) -> None:
        self._pool = pool
        self.jobs: deque[tuple[Job, Buffer | None]] = deque()
        self.active = False

    def put(self, job: Job, buffer: Buffer | None = None) -> None:
        """Queue a job; `buffer` (whose `users` the caller has counted) loses one user when it is done."""
        self._pool.put(self, job, buffer)


class HashPool:
    """A pool of threads over queues. The first exception of a job skips all later jobs and is raised by `drain`.

    A context manager: leaving it, in whatever way, skips the jobs that have not begun and joins the threads.
    """

    def __init__(self, threads: int | None = None, *, buffers: int = 0, buffer_size: int = 0) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._open = 0
        self._error: BaseException | None = None
        self._ready: SimpleQueue[SerialQueue | None] = SimpleQueue()
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(Buffer(buffer_size))
        count = threads or len(os.sched_getaffinity(0))
        self._threads = [threading.Thread(target=self._work, name=f"pool-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def stopping(self) -> bool:
        """Whether jobs that have not begun are skipped: a job failed, or the pool was left by an exception."""
        return self._error is not None

    def buffer(self) -> Buffer:
        """A free buffer; waits for one. Raises the first exception of any job."""
        buffer = self._free.get()
        if self._error is not None:
            self._free.put(buffer)
            raise self._error
        return buffer

    def use(self, buffer: Buffer, users: int) -> None:
        """Count `users` more users of a buffer."""
        with self._lock:
            buffer.users += users

    def done(self, buffer: Buffer) -> None:
        """Count one user of a buffer less; it is free when none is left."""
        with self._lock:
            self._leave(buffer)

    def put(self, queue: SerialQueue, job: Job, buffer: Buffer | None) -> None:
        with self._lock:
            self._open += 1
            queue.jobs.append((job, buffer))
            if not queue.active:
                queue.active = True
                self._ready.put(queue)

    def drain(self) -> None:
        """Wait until every job is done. Raises the first exception of any job."""
        with self._idle:
            while self._open:
                self._idle.wait()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (queue := self._ready.get()) is not None:
            job, buffer = queue.jobs[0]
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error
            del job
            with self._lock:
                queue.jobs.popleft()
                if queue.jobs:
                    self._ready.put(queue)
                else:
                    queue.active = False
                if buffer is not None:
                    self._leave(buffer)
                self._open -= 1
                if self._open == 0:
                    self._idle.notify_all()

    def _leave(self, buffer: Buffer) -> None:
        buffer.users -= 1
        if buffer.users == 0:
            self._free.put(buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._error is None:
            self._error = error
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            thread.join()
