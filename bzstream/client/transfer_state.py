"""What all threads of one transfer share: the plan, which mirror sent what, and the check of each complete chunk.

One lock guards it; it is held for microseconds, never over I/O or hashing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from bzstream.client.coded import CodedChunks
from bzstream.client.coded_parts import CodedParts
from bzstream.client.errors import ClientError
from bzstream.client.fetch_plan import FetchPlan
from bzstream.client.journal import Journal
from bzstream.client.manifest import Manifest
from bzstream.client.mirror import Mirror
from bzstream.client.session import Session
from bzstream.client.sinks import Sink
from bzstream.client.streaming_sha256 import StreamingSha256
from bzstream.httpclient import Connection

__all__ = ["TransferState"]

READ_BACK = 1 << 20
"""Bytes of one read when a chunk has to be hashed after the fact."""


class TransferState:
    """The state of one unit's transfer. Names with a comment "lock" are touched with the lock held only."""

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        plan: FetchPlan,
        sink: Sink,
        *,
        version: str | None,
        check: bool,
        sha256: StreamingSha256 | None,
        journal: Journal | None,
        coded: CodedChunks | None,
    ) -> None:
        self.session = session
        self.tuning = session.tuning
        self.mirrors = session.mirrors
        self.manifest = manifest
        self.sink = sink
        self.version = version
        """The version that requests name; None: the server's current one."""
        self.check = check
        """Whether chunks are compared with their hashes."""
        self.sha256 = sha256
        self.journal = journal
        self.coded = coded
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        """There may be work, or everything is over."""
        self.plan = plan  # lock
        self.parts = CodedParts()  # lock
        self.over = False
        self.failure: BaseException | None = None  # lock
        """What ends the transfer."""
        self.last_error: ClientError | None = None  # lock
        self.fetched = 0  # lock
        """Bytes that came over the network, of the payload or coded."""
        self.refetched = 0  # lock
        """Chunks that were wrong and fetched again."""
        self.rate = 0.0
        """Bytes a second of all workers together, over the last seconds."""
        self.target = 0  # lock
        """How many workers there should be."""
        self.waiting = 0  # lock
        """Workers that found nothing to do."""
        self.busy: dict[int, Connection] = {}  # lock
        """FetchWorker -> the connection it works with."""
        self.connecting: set[int] = set()  # lock
        """Workers that wait for a connection to open, which cannot be interrupted."""
        self._next_byte = 0.0  # lock
        """When the next byte may come under `max_rate`."""
        self._prefix = 0  # lock
        """Chunks verified without a gap from the start."""

    def guarded(self, state: Callable[[], None]) -> None:
        """Run a thread's work; what it did not expect ends the transfer."""
        try:
            state()
        except BaseException as error:
            with self.changed:
                if self.failure is None:
                    self.failure = error
                self.changed.notify_all()

    def pause(self, count: int) -> float:
        """Seconds to wait after `count` more bytes, so that all workers together keep to `max_rate`. Lock held."""
        if self.tuning.max_rate is None:
            return 0.0
        now = time.monotonic()
        self._next_byte = max(self._next_byte, now) + count / self.tuning.max_rate
        return self._next_byte - now

    def verify_chunk(self, index: int, mirror: Mirror | None) -> None:
        """A chunk is complete: check its hash, and either count it or have it fetched again."""
        plan = self.plan
        begin, length = index * plan.chunk_size, plan.length(index)
        with self.lock:
            chunk = plan.chunk(index)
        while self.check and chunk.hashed < length:
            # Bytes that came out of order, or in an earlier process, are read back.
            count = min(READ_BACK, length - chunk.hashed)
            chunk.hasher.update(self.sink.read(begin + chunk.hashed, count))
            chunk.hashed += count
        good = not self.check or chunk.hasher.digest() == self.manifest.chunks[index]
        if good:
            self.sink.settled(begin, length)
        with self.changed:
            if good:
                plan.verified(index)
                if mirror is not None:
                    mirror.note_good_chunk()
            else:
                if self.sha256 is not None:
                    self.sha256.discard(begin, begin + length)
                plan.failed(index)
                self.refetched += 1
                self._blame(index, chunk.sources)
            if self.journal is not None:
                self.journal.mark_checked(index, good=good)
            if plan.complete or not good:
                self.changed.notify_all()
        if good:
            self.follow()

    def follow(self) -> None:
        """Tell the SHA-256 how far the verified prefix reaches."""
        if self.sha256 is None:
            return
        with self.lock:
            gap = self.plan.done.find(0, self._prefix)
            self._prefix = self.plan.count if gap < 0 else gap
            limit = min(self._prefix * self.plan.chunk_size, self.plan.size)
        self.sha256.advance(limit)

    def give_up_coded(self, mirror: Mirror) -> None:
        """Chunks that come coded from this mirror are to come in another way. With the lock held."""
        for segment in self.parts.give_up(mirror.number):
            self.plan.release(segment)
        self.changed.notify_all()

    def drop(self, mirror: Mirror, error: ClientError) -> None:
        """Say that a mirror is used no more. With the lock held."""
        mirror.dropped = error
        self.give_up_coded(mirror)
        self.last_error = error
        if len(self.mirrors) > 1:
            self.session.notify(f"{mirror.address} is left out: {error}")

    def _blame(self, index: int, sources: set[int]) -> None:
        if len(sources) != 1 or -1 in sources:
            return  # several had a hand in it; the next time it is fetched from one
        mirror = self.mirrors[next(iter(sources))]
        final = mirror.note_wrong_chunk(
            index,
            f"{mirror.address} sent chunk {index} of {self.manifest.unit.label} with a wrong hash "
            f"{self.tuning.max_wrong} times; its copy is damaged or somebody changes it on the way",
        )
        if final is not None:
            self.drop(mirror, final)
