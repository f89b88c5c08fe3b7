"""Whether chunks are fetched coded, and which of a unit's codings serve: fewer bytes on the link, at a core's expense.

Pure decisions and decoding; the workers do the fetching. A coding is used as long as the processor decodes faster than
the link brings coded bytes: `update` is told what has come, and every decoded chunk shows the processor's rate. On a
far link coding begins at once, on a near one when even its best quarter of a second is far below that rate. A
difference needs the file of its base: the file of an earlier pull, if its SHA-256 is the one that the coding names.

Nothing here is trusted: the coded bytes are compared with the manifest's hash of them, decoded within bounds, and the
result is compared with the manifest's hash of the chunk. Any thread; the lock is held for microseconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from blake3 import blake3

from bzstream.client.manifest import Coding, Manifest
from bzstream.client.session import Session
from bzstream.client.tuning import Tuning

if TYPE_CHECKING:
    from bzstream.coding import Decoder

__all__ = ["BaseFile", "CodedChunks", "coded_chunks"]

FIRST_DECODE_RATE = 0.5e9
"""Bytes of chunks that a core is taken to decode a second before the first was decoded (measured: 0.6 to 1.3 GB/s)."""
HEADROOM = 3.0
"""Decoding must stay so many times faster than the link: the cores also receive, hash and write."""
CLEARLY = 10.0
"""So many times faster it must be for a near link to begin with coded chunks. A transfer on loopback is slowed by the
cores alone, also by what else they do, and decoding would slow it more; with two cores it begins below 66 MB/s."""
WINDOW_S = 0.25
"""The rate of a near link is the highest over so many seconds: pauses and the start of connections do not count."""
SUPPORTED = "planes-1"
"""bzstream.coding.NAME, written here because importing that package costs numpy, which a plain pull does not need."""


class BaseFile(Protocol):
    """The file of an earlier pull."""

    size: int

    def sha256(self, stopped: threading.Event) -> bytes | None:
        """The digest of the whole file; None when it was stopped."""

    def read_at(self, offset: int, view: memoryview) -> bool:
        """Fill `view`; False if the file ends first."""


class CodedChunks:
    """The codings of one unit that is being fetched. `cores`: how many may decode."""

    def __init__(
        self, manifest: Manifest, tuning: Tuning, *, far: bool, base: BaseFile | None = None, cores: int | None = None
    ) -> None:
        self._manifest = manifest
        self._tuning = tuning
        self._cores = cores or len(os.sched_getaffinity(0))
        known = [coding for coding in manifest.codings if coding.name == SUPPORTED]
        self._alone = [coding for coding in known if coding.base is None][:1]
        self._differences = [coding for coding in known if coding.base is not None] if base is not None else []
        self._base = base
        self._base_hash: bytes | None = None
        self._stopped = threading.Event()
        self._base_thread: threading.Thread | None = None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._first: float | None = None
        """When the first byte had come."""
        self._window = (0.0, 0)
        """When it began, and the bytes that had come by then."""
        self._best_rate = 0.0
        self._without: set[int] = set()  # lock
        """Numbers of mirrors that do not have these codings, or sent wrong bytes of them."""
        self._decoded_bytes, self._decode_s = 0, 0.0  # lock
        self.gained = 0  # lock
        """Bytes of decoded chunks less those that came over the network for them."""
        self.active = False
        """Whether chunks are to be fetched coded now."""
        if far or tuning.coded_after_s == 0:
            self._decide(True)

    def update(self, fetched: int, now: float) -> None:
        """`fetched` bytes have come by `now` (of the monotonic clock). Called some ten times a second by one thread."""
        if self._tuning.coded_after_s == 0 or not fetched or not (self._alone or self._differences):
            return
        if self._first is None:
            self._first, self._window = now, (now, fetched)
        began, before = self._window
        if now - began >= WINDOW_S:
            self._window = (now, fetched)
            rate = (fetched - before) / (now - began)
            if self.active:
                self._decide(self._worth(rate / self.share, HEADROOM))
                self._best_rate = rate
            else:
                self._best_rate = max(rate, self._best_rate)
                if now - self._first >= self._tuning.coded_after_s:
                    self._decide(self._worth(self._best_rate / self.share, CLEARLY))
                    self._best_rate = 0.0 if self.active else self._best_rate * 0.9  # what was long ago counts less

    def _worth(self, rate: float, headroom: float) -> bool:
        """Whether the cores decode `rate` bytes a second of the unit, with headroom."""
        with self._lock:
            decode_rate = self._decoded_bytes / self._decode_s if self._decode_s > 0.01 else FIRST_DECODE_RATE
        return rate * headroom < decode_rate * self._cores

    @property
    def share(self) -> float:
        """Bytes on the link for one byte of the unit, with the best coding at hand."""
        usable = self._usable()
        return min((coding.size / self._manifest.size for coding in usable), default=1.0) or 1.0

    @property
    def waiting(self) -> bool:
        """Whether to begin with no further chunk for a moment: the older file is being hashed (1.6 GB/s), and if it is
        the base, each chunk that comes before that is known has twice the bytes."""
        return self.active and self._hashing

    @property
    def hopeful(self) -> bool:
        """Whether the older file may well be the base, so that meanwhile one chunk is fetched as its difference."""
        return bool(self._differences) and self._base is not None and self._base.size == self._manifest.size

    @property
    def _hashing(self) -> bool:
        return self._base_thread is not None and self._base_thread.is_alive()

    def choose(self, index: int, mirror: int) -> Coding | None:
        """The coding with which to fetch a chunk from a mirror; None: as it is."""
        with self._lock:
            if not self.active or mirror in self._without:
                return None
        best = min(self._usable(), key=lambda coding: coding.chunks[index][1], default=None)
        return best if best is not None and best.chunks[index][1] < self._manifest.chunk_length(index) else None

    def await_base(self, coding: Coding) -> bool:
        """Whether the base of `coding` is here; waits until that is known. False also when the transfer ends."""
        if coding.base is not None and self._base_thread is not None:
            self._base_thread.join()
        return coding.base is None or coding.base == self._base_hash

    def decode(self, index: int, coding: Coding, coded: memoryview, chunk: memoryview) -> blake3 | None:
        """Decode into `chunk` and check it: its hasher. None: it is not the chunk, and `coding` is used no more."""
        decoder, base = self._tools()
        other: memoryview | None = None
        if coding.base is not None:
            assert self._base is not None
            start = index * self._manifest.chunk_size
            other = base[: max(0, min(len(chunk), self._base.size - start))]
            if not self._base.read_at(start, other):
                other = None
        from bzstream.coding import CodingError

        began = time.monotonic()  # not CPU time: cores that are busy with other things decode slowly
        hasher = blake3()
        try:
            decoder.decode(coded, chunk, other)
            hasher.update(chunk)
            good = hasher.digest() == self._manifest.chunks[index]
        except CodingError:
            good = False
        spent = time.monotonic() - began
        if not good:
            self._give_up(coding)
            return None
        with self._lock:
            self._decoded_bytes += len(chunk)
            self._decode_s += spent
            self.gained += len(chunk) - len(coded)
        return hasher

    def skip_mirror(self, mirror: int) -> bool:
        """Nothing coded comes from this mirror; whether that is news."""
        with self._lock:
            news = mirror not in self._without
            self._without.add(mirror)
        return news

    def close(self) -> None:
        """End what runs in the background."""
        self._stopped.set()
        if self._base_thread is not None:
            self._base_thread.join()

    def _decide(self, active: bool) -> None:
        self.active = active and bool(self._alone or self._differences)
        if self.active and self._differences and self._base_thread is None:
            self._base_thread = threading.Thread(target=self._hash_base, name="bzstream-base", daemon=True)
            self._base_thread.start()

    def _hash_base(self) -> None:
        assert self._base is not None
        self._base_hash = self._base.sha256(self._stopped)

    def _usable(self) -> Sequence[Coding]:
        if self.hopeful and self._hashing:
            return [*self._alone, *self._differences]
        known = self._base_hash
        return [*self._alone, *(coding for coding in self._differences if known is not None and coding.base == known)]

    def _give_up(self, coding: Coding) -> None:
        self._alone = [other for other in self._alone if other is not coding]
        self._differences = [other for other in self._differences if other is not coding]

    def _tools(self) -> tuple[Decoder, memoryview]:
        """This thread's decoder and memory for a chunk of the base."""
        if not hasattr(self._local, "decoder"):
            from bzstream.coding import Decoder

            self._local.decoder = Decoder()
            self._local.base = memoryview(bytearray(self._manifest.chunk_size if self._base is not None else 0))
        return self._local.decoder, self._local.base


def coded_chunks(session: Session, manifest: Manifest, *, base: BaseFile | None = None) -> CodedChunks | None:
    """The coded forms of a unit for a transfer by this session; None when the manifest lists none."""
    if not manifest.codings:
        return None
    rtts = [mirror.rtt for mirror in session.mirrors if mirror.rtt]
    far = bool(rtts) and min(rtts) >= session.tuning.near_rtt_s
    return CodedChunks(manifest, session.tuning, far=far, base=base)
