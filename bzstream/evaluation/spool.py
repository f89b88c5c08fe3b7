"""The folder of fetched checkpoints: bounded in bytes, and every file in it whole or marked as a draft.

Each claimed job opens an entry (`Spool.open`) and releases it when the job ends, however it ends; releasing gives back
whatever the entry held. A file is fetched into the entry's draft (`<submission id>.<n>.part`) and renamed when it is
complete, so a name without `.part` is a whole file, also after a crash. Room is reserved before a body is read and
counted in bytes; an entry that finds none waits, in order, until others are released. Files of released entries stay,
for `--repeat` and for a job that comes again, until their room is needed; the oldest goes first.

All methods may be called from any thread.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from bzstream.evaluation.rejection_codes import EvaluationError, Failure

__all__ = ["Spool", "SpoolEntry"]

_LOOK_S = 0.25
"""While an entry waits for room it asks this often whether its job was given up."""


class Spool:
    """`limit` bounds the bytes of all files, those being fetched counted in full."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises EvaluationError when the folder cannot be made or read, or another evaluator uses it."""
        self._folder = folder
        self.limit = limit
        self.changed = threading.Condition()
        """Guards everything below; notified when room was given back."""
        self._numbers = itertools.count()
        self.reserved: dict[SpoolEntry, int] = {}
        """Entry -> bytes reserved for it; every entry that is open, also those that hold nothing yet."""
        self.finished: OrderedDict[str, int] = OrderedDict()
        """Submission id -> bytes of a whole file that no open entry uses; the oldest first."""
        self.queue: list[SpoolEntry] = []
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime):
                if path.suffix == ".part":
                    path.unlink()
                elif path.is_file() and path.name[0] != ".":
                    self.finished[path.name] = path.stat().st_size
        except BlockingIOError:
            raise EvaluationError(f"another evaluator uses the spool {folder}; run one for each device") from None
        except OSError as error:
            raise EvaluationError(
                f"the spool {folder} cannot be used: {error.strerror}; check evaluation.spool"
            ) from None

    def close(self) -> None:
        """Let another evaluator have the folder."""
        os.close(self._lock)

    def open(self, submission_id: str) -> SpoolEntry:
        """A place for a job's file. The job calls `release` when it ends."""
        with self.changed:
            entry = SpoolEntry(self, self._folder, submission_id, next(self._numbers))
            self.reserved[entry] = 0
            return entry

    def make_room(self, size: int) -> bool:
        """Remove finished files, the oldest first, until `size` more bytes fit; False when too much is in use.

        The caller holds `changed`.
        """
        in_use = sum(self.reserved.values()) + size
        while in_use + sum(self.finished.values()) > self.limit:
            if not self.finished:
                return False
            oldest, _ = self.finished.popitem(last=False)
            (self._folder / oldest).unlink(missing_ok=True)
        return True


class SpoolEntry:
    """One job's place in the spool. Made by `Spool.open`; once it is released it holds nothing and gets nothing."""

    def __init__(self, spool: Spool, folder: Path, submission_id: str, number: int) -> None:
        self._spool = spool
        self.submission_id = submission_id
        self.path = folder / submission_id
        """Where the whole file lies, if it does."""
        self._draft = folder / f"{submission_id}.{number}.part"
        self.whole = False
        """The whole file lies at `path` and is held by this entry."""
        self.waiting = False
        """The entry waits for room now."""
        self.waited = False
        """It has waited for room; the reader of this flag clears it."""

    def find(self) -> bool:
        """Whether the whole file of an earlier job of this submission is there; it is then held by this entry."""
        spool = self._spool
        with spool.changed:
            if self in spool.reserved and self.submission_id in spool.finished:
                spool.reserved[self] = spool.finished.pop(self.submission_id)
                self.whole = True
            return self.whole

    def reserve(self, size: int, given_up: Callable[[], bool]) -> float | None:
        """Wait for room for `size` bytes in all; seconds waited, or None when `given_up` turned true.

        Raises Failure `spool_error` when the spool is smaller than that.
        """
        spool, began = self._spool, time.monotonic()
        if size > spool.limit:
            raise Failure("spool_error", f"the file has {size} bytes and the spool {spool.limit}; raise spool_bytes")
        with spool.changed:
            if spool.reserved.get(self, -1) >= size:
                return 0.0
            spool.queue.append(self)
            try:
                while self in spool.reserved and not given_up():
                    spool.reserved[self] = 0  # two entries that waited with a part each could block each other
                    if spool.queue[0] is self and spool.make_room(size):
                        spool.reserved[self] = size
                        return time.monotonic() - began if self.waiting else 0.0
                    self.waiting = self.waited = True
                    spool.changed.wait(_LOOK_S)
                return None
            finally:
                self.waiting = False
                spool.queue.remove(self)
                spool.changed.notify_all()

    def discard(self) -> None:
        """The whole file is not the right one: remove it. What was reserved for it stays reserved."""
        with self._spool.changed:
            self.whole = False
            self.path.unlink(missing_ok=True)

    def draft(self) -> Path:
        """Where the file is fetched to. A draft that is there already is removed."""
        self._draft.unlink(missing_ok=True)
        return self._draft

    def keep(self) -> None:
        """The draft is whole: give it its name, and back what was reserved beyond its size. Raises Failure."""
        spool = self._spool
        with spool.changed:
            try:
                if self not in spool.reserved:  # released while its last bytes were written
                    self._draft.unlink()
                    return
                size = self._draft.stat().st_size
                self._draft.rename(self.path)
            except OSError as error:
                raise Failure("spool_error", f"the spool cannot be written: {error.strerror}") from None
            spool.finished.pop(self.submission_id, None)  # the rename replaced that file
            spool.reserved[self] = size  # until now what a server announced, or could send at most, was reserved
            self.whole = True
            spool.changed.notify_all()

    def release(self) -> None:
        """The job has ended: its file stays while there is room for it. Releasing twice does nothing."""
        spool = self._spool
        with spool.changed:
            if spool.reserved.pop(self, None) is None:
                return
            shared = any(entry.whole and entry.submission_id == self.submission_id for entry in spool.reserved)
            if self.whole and not shared and self.path.exists():
                spool.finished[self.submission_id] = self.path.stat().st_size
            spool.changed.notify_all()
