"""SHA-256 of the whole file, computed in a thread of its own while the file arrives.

SHA-256 runs at 1.2-1.6 GB/s and cannot be split, so on a fast link it decides when a pull ends, and anything that
makes it wait or read from the disk costs. Fetch workers therefore hand over the buffers they have just written. This
thread hashes them from memory when their turn comes, up to a bounded number, and reads back what was not handed over.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
import time
from collections.abc import Callable

from bzstream.client.sinks import Buffer
from bzstream.client.tuning import Tuning

__all__ = ["StreamingSha256"]


class StreamingSha256:
    """Hashes bytes [0, size) in order as `advance` says that they are final.

    `read_into(position, view)` fills the view from the file. A failure of it is kept and raised by `digest`.
    """

    def __init__(self, size: int, read_into: Callable[[int, memoryview], None], tuning: Tuning) -> None:
        self.position = 0
        """Bytes hashed so far."""
        self._size = size
        self._read_into = read_into
        self._tuning = tuning
        self._limit = 0
        self._hash = hashlib.sha256()
        self._changed = threading.Condition()
        self._handed: dict[int, Buffer] = {}
        self._spare: list[Buffer] = []
        self._made = 0
        self._busy_s = 0.0
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bzstream-sha256", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def advance(self, limit: int) -> None:
        """Bytes below `limit` are final."""
        with self._changed:
            if limit > self._limit:
                self._limit = limit
                self._changed.notify()

    @property
    def backlog(self) -> int:
        """Final bytes that are not hashed yet."""
        return self._limit - self.position

    @property
    def rate(self) -> float:
        """Bytes a second while it works; a usual processor's rate as long as nothing is known."""
        return self.position / self._busy_s if self._busy_s > 0.05 else 1.5e9

    def hand_over(self, position: int, buffer: Buffer) -> Buffer:
        """Offer a whole buffer whose bytes are in the file at `position`; returns one to go on with, perhaps the same.

        Whether the bytes are right is not known yet: `discard` takes them back.
        """
        with self._changed:
            window = self._tuning.handoff
            if not self.position <= position < self.position + 2 * window:
                return buffer
            if self._spare:
                fresh = self._spare.pop()
            elif self._made < window // self._tuning.buffer:
                self._made += 1
                area = mmap.mmap(-1, self._tuning.buffer)
                fresh = (area, memoryview(area))
            else:
                return buffer
            self._handed[position] = buffer
            return fresh

    def discard(self, begin: int, end: int) -> None:
        """The bytes in [begin, end) turned out wrong."""
        with self._changed:
            for position in [p for p in self._handed if begin - self._tuning.buffer < p < end]:
                self._spare.append(self._handed.pop(position))

    def stop(self) -> None:
        """End the thread, finished or not, and wait for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._handed.clear()
        self._spare.clear()

    def wait(self, seconds: float) -> bool:
        """Whether the hash, or a failure, is there within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def digest(self) -> bytes:
        """SHA-256 of everything, once finished. Raises what reading raised."""
        if self._failure is not None:
            raise self._failure
        assert self.position == self._size, "the hash is not finished"
        return self._hash.digest()

    def _run(self) -> None:
        area = mmap.mmap(-1, self._tuning.buffer)
        own = memoryview(area)
        try:
            while self.position < self._size:
                with self._changed:
                    while self.position >= self._limit and not self._stopped:
                        self._changed.wait()
                    if self._stopped:
                        return
                    limit = self._limit
                    buffer = self._handed.pop(self.position, None)
                    if buffer is not None and self.position + self._tuning.buffer > limit:
                        # Its chunk is not checked yet in its whole length: hash what is final, read the rest later.
                        self._spare.append(buffer)
                        buffer = None
                began = time.monotonic()
                if buffer is not None:
                    self._hash.update(buffer[1])
                    self._busy_s += time.monotonic() - began
                    with self._changed:
                        self.position += self._tuning.buffer
                        self._spare.append(buffer)
                    continue
                count = min(len(own), limit - self.position, self._next_handed() - self.position)
                self._read_into(self.position, own[:count])
                self._hash.update(own[:count])
                self._busy_s += time.monotonic() - began
                self.position += count
        except Exception as error:
            self._failure = error

    def _next_handed(self) -> int:
        """Where the next buffer that was handed over begins, so that reading stops there."""
        with self._changed:
            return min((p for p in self._handed if p > self.position), default=self._size)
