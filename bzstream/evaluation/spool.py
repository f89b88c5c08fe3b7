"""The folder of fetched checkpoints: bounded, and whole or not there.

A file is fetched as `<submission id>.part` and renamed when it is complete, so a name without `.part` is a whole file,
also after a crash. Room is reserved before a body is read and counted in bytes; a fetch that finds none waits, in
order, until another submission is done with. Files of finished submissions stay, for `--repeat`, until their room is
needed; the oldest goes first.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from bzstream.evaluation.codes import EvaluationError, Failure

__all__ = ["Spool"]


class Spool:
    """Thread-safe. `limit` bounds the bytes of all files, those being fetched counted in full."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises EvaluationError when the folder cannot be made or read."""
        self._folder = folder
        self._limit = limit
        self._changed = threading.Condition()
        self._held: dict[str, int] = {}
        self._done: OrderedDict[str, int] = OrderedDict()
        self._turns: list[object] = []
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime):
                if path.suffix == ".part":
                    path.unlink()
                elif path.is_file() and path.name[0] != ".":
                    self._done[path.name] = path.stat().st_size
        except BlockingIOError:
            raise EvaluationError(f"another evaluator uses the spool {folder}; run one for each device") from None
        except OSError as error:
            raise EvaluationError(
                f"the spool {folder} cannot be used: {error.strerror}; check evaluation.spool"
            ) from None

    def close(self) -> None:
        """Let another evaluator have the folder."""
        os.close(self._lock)

    def path(self, submission_id: str) -> Path:
        """Where the whole file lies, if it does."""
        return self._folder / submission_id

    def draft(self, submission_id: str) -> Path:
        """Where the file is fetched to. A draft that is there already is removed."""
        draft = self._folder / f"{submission_id}.part"
        draft.unlink(missing_ok=True)
        return draft

    def keep(self, submission_id: str) -> Path:
        """The draft is whole: give it its name."""
        return (self._folder / f"{submission_id}.part").rename(self.path(submission_id))

    def find(self, submission_id: str) -> Path | None:
        """The whole file of an earlier attempt, now held."""
        with self._changed:
            if submission_id not in self._done:
                return None
            self._held[submission_id] = self._done.pop(submission_id)
        return self.path(submission_id)

    def reserve(self, submission_id: str, size: int, given_up: Callable[[], bool]) -> bool:
        """Wait for room for `size` bytes; False when `given_up` turned true. Raises Failure when it can never fit."""
        if size > self._limit:
            raise Failure("spool_error", f"the file has {size} bytes and the spool {self._limit}; raise spool_bytes")
        turn = object()
        with self._changed:
            self._turns.append(turn)
            try:
                while self._turns[0] is not turn or not self._make_room(submission_id, size):
                    if given_up():
                        return False
                    self._changed.wait(0.25)
                self._held[submission_id] = size
                return True
            finally:
                self._turns.remove(turn)
                self._changed.notify_all()

    def _make_room(self, submission_id: str, size: int) -> bool:
        self._held.pop(submission_id, None)  # an earlier attempt of the same fetch
        while sum(self._held.values()) + sum(self._done.values()) + size > self._limit:
            if not self._done:
                return False
            oldest, _ = self._done.popitem(last=False)
            self.path(oldest).unlink(missing_ok=True)
        return True

    def settle(self, submission_id: str) -> None:
        """The submission is done with: its file stays while there is room for it."""
        with self._changed:
            size = self._held.pop(submission_id, None)
            if size is not None and self.path(submission_id).exists():
                self._done[submission_id] = size
            self._changed.notify_all()
