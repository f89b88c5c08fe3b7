"""Threads that do jobs in lanes: the jobs of one lane one after the other, the lanes side by side.

Hashing a stream is sequential, but a snapshot has many streams: SHA-256 and BLAKE3 of the full model, and of each
unit, and the writing of each file. Each is a lane. The reader hands the same slab of bytes to every lane that needs
some of it and goes on to the next slab; a slab is free again when the last of its jobs is done. The number of slabs
bounds the memory, and a reader that runs ahead of the slowest lane waits for a slab. hashlib, blake3 and the system
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

__all__ = ["Crew", "Lane", "Slab"]

Job = Callable[[], object]


class Slab:
    """A buffer that several jobs read; `users` counts those that are not done."""

    __slots__ = ("users", "view")

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))
        self.users = 0


class Lane:
    """Jobs that are done in the order in which they were put."""

    __slots__ = ("_crew", "active", "jobs")

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.jobs: deque[tuple[Job, Slab | None]] = deque()
        self.active = False

    def put(self, job: Job, slab: Slab | None = None) -> None:
        """Queue a job; `slab` (whose `users` the caller has counted) loses one user when it is done."""
        self._crew.put(self, job, slab)


class Crew:
    """A pool of threads over lanes. The first exception of a job skips all later jobs and is raised by `drain`.

    A context manager: leaving it, in whatever way, skips the jobs that have not begun and joins the threads.
    """

    def __init__(self, threads: int | None = None, *, slabs: int = 0, slab_size: int = 0) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._open = 0
        self._error: BaseException | None = None
        self._ready: SimpleQueue[Lane | None] = SimpleQueue()
        self._free: SimpleQueue[Slab] = SimpleQueue()
        for _ in range(slabs):
            self._free.put(Slab(slab_size))
        count = threads or len(os.sched_getaffinity(0))
        self._threads = [threading.Thread(target=self._work, name=f"crew-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def slab(self) -> Slab:
        """A free slab; waits for one. Raises the first exception of any job."""
        slab = self._free.get()
        if self._error is not None:
            self._free.put(slab)
            raise self._error
        return slab

    def use(self, slab: Slab, users: int) -> None:
        """Count `users` more users of a slab."""
        with self._lock:
            slab.users += users

    def done(self, slab: Slab) -> None:
        """Count one user of a slab less; it is free when none is left."""
        with self._lock:
            self._leave(slab)

    def put(self, lane: Lane, job: Job, slab: Slab | None) -> None:
        with self._lock:
            self._open += 1
            lane.jobs.append((job, slab))
            if not lane.active:
                lane.active = True
                self._ready.put(lane)

    def drain(self) -> None:
        """Wait until every job is done. Raises the first exception of any job."""
        with self._idle:
            while self._open:
                self._idle.wait()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (lane := self._ready.get()) is not None:
            job, slab = lane.jobs[0]
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error
            del job
            with self._lock:
                lane.jobs.popleft()
                if lane.jobs:
                    self._ready.put(lane)
                else:
                    lane.active = False
                if slab is not None:
                    self._leave(slab)
                self._open -= 1
                if self._open == 0:
                    self._idle.notify_all()

    def _leave(self, slab: Slab) -> None:
        slab.users -= 1
        if slab.users == 0:
            self._free.put(slab)

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
