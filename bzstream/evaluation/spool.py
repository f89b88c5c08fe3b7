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
        self._limit = limit
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._reserved: dict[SpoolEntry, int] = {}
        """Entry -> bytes reserved for it; every entry that is open, also those that hold nothing yet."""
        self._finished: OrderedDict[str, int] = OrderedDict()
        """Submission id -> bytes of a whole file that no open entry uses; the oldest first."""
        self._queue: list[SpoolEntry] = []
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime):
                if path.suffix == ".part":
                    path.unlink()
                elif path.is_file() and path.name[0] != ".":
                    self._finished[path.name] = path.stat().st_size
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
        with self._changed:
            entry = SpoolEntry(self, self._folder, submission_id, next(self._numbers))
            self._reserved[entry] = 0
            return entry

    def _find(self, entry: SpoolEntry) -> bool:
        with self._changed:
            if entry not in self._reserved or entry.submission_id not in self._finished:
                return False
            self._reserved[entry] = self._finished.pop(entry.submission_id)
            entry.whole = True
            return True

    def _reserve(self, entry: SpoolEntry, size: int, given_up: Callable[[], bool]) -> float | None:
        if size > self._limit:
            raise Failure("spool_error", f"the file has {size} bytes and the spool {self._limit}; raise spool_bytes")
        began = time.monotonic()
        with self._changed:
            if self._reserved.get(entry, -1) >= size:
                return 0.0
            self._queue.append(entry)
            try:
                while entry in self._reserved and not given_up():
                    self._reserved[entry] = 0  # two entries that waited with a part each could block each other
                    if self._queue[0] is entry and self._make_room(size):
                        self._reserved[entry] = size
                        return time.monotonic() - began if entry.waiting else 0.0
                    entry.waiting = entry.waited = True
                    self._changed.wait(_LOOK_S)
                return None
            finally:
                entry.waiting = False
                self._queue.remove(entry)
                self._changed.notify_all()

    def _make_room(self, size: int) -> bool:
        """Remove finished files, the oldest first, until `size` more bytes fit; False when they never will."""
        in_use = sum(self._reserved.values()) + size
        while in_use + sum(self._finished.values()) > self._limit:
            if not self._finished:
                return False
            oldest, _ = self._finished.popitem(last=False)
            (self._folder / oldest).unlink(missing_ok=True)
        return True

    def _keep(self, entry: SpoolEntry, draft: Path) -> None:
        with self._changed:
            try:
                if entry not in self._reserved:  # released while its last bytes were written
                    draft.unlink()
                    return
                size = draft.stat().st_size
                draft.rename(entry.path)
            except OSError as error:
                raise Failure("spool_error", f"the spool cannot be written: {error.strerror}") from None
            self._finished.pop(entry.submission_id, None)  # the rename replaced that file
            self._reserved[entry] = size  # until now what a server announced, or could send at most, was reserved
            entry.whole = True
            self._changed.notify_all()

    def _release(self, entry: SpoolEntry) -> None:
        with self._changed:
            if self._reserved.pop(entry, None) is None:
                return
            shared = any(e.whole and e.submission_id == entry.submission_id for e in self._reserved)
            if entry.whole and not shared and entry.path.exists():
                self._finished[entry.submission_id] = entry.path.stat().st_size
            self._changed.notify_all()

    def _discard(self, entry: SpoolEntry) -> None:
        with self._changed:
            if entry.whole:
                entry.whole = False
                entry.path.unlink(missing_ok=True)


class SpoolEntry:
    """One job's place in the spool. Made by `Spool.open`."""

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
        return self._spool._find(self)

    def reserve(self, size: int, given_up: Callable[[], bool]) -> float | None:
        """Wait for room for `size` bytes in all; seconds waited, or None when `given_up` turned true.

        Raises Failure `spool_error` when the spool is smaller than that.
        """
        return self._spool._reserve(self, size, given_up)

    def discard(self) -> None:
        """The whole file is not the right one: remove it. What was reserved for it stays reserved."""
        self._spool._discard(self)

    def draft(self) -> Path:
        """Where the file is fetched to. A draft that is there already is removed."""
        self._draft.unlink(missing_ok=True)
        return self._draft

    def keep(self) -> None:
        """The draft is whole: give it its name, and back what was reserved beyond its size. Raises Failure."""
        self._spool._keep(self, self._draft)

    def release(self) -> None:
        """The job has ended: its file stays while there is room for it. Releasing twice does nothing."""
        self._spool._release(self)
