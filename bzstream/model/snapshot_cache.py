"""What a worker serves from: the store's snapshots, opened, and followed as they come and go.

A file that is missing, has another size than when it was published, or changes while it is open, takes its units (and
the full model) out of service; it is never served with wrong bytes, and `SnapshotCache.damaged` names it. A file whose
modification time is another than when it was published was changed before it was opened, or the whole store was copied:
a thread reads it, and it is served if every chunk has its published hash.

A cache belongs to one thread, a worker's event loop; only `scan` may run on another.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bzstream.model.codings import RECORD as CODINGS
from bzstream.model.digest import digest_chunks
from bzstream.model.errors import StoreDamaged
from bzstream.model.record import ACTIVATION
from bzstream.model.snapshot import Snapshot, open_snapshot
from bzstream.model.store import RECORD, Store
from bzstream.util.files import FileStamp, file_stamp
from bzstream.util.warn_once import WarnOnce

__all__ = ["ScanResult", "SnapshotCache", "Verifier"]

Stamp = tuple[FileStamp | None, ...]
"""Of a version's record, activation and codings: changes when a version is replaced, signed, used again or coded."""


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What `SnapshotCache.scan` found: the version that is current, every version's stamp, and what was opened."""

    wanted: str | None
    problem: str | None
    """Why nothing can be served although the store is not empty."""
    stamps: Mapping[str, Stamp]
    opened: Mapping[str, Snapshot | None]
    """None: unusable for good."""


class SnapshotCache:
    """The snapshots of a store, as one worker sees them."""

    def __init__(self, path: Path, *, warn: Callable[[str], None] | None = None) -> None:
        self._store = Store(path)
        self._warn = warn or logging.getLogger(__name__).warning
        self._snapshots: dict[str, Snapshot] = {}
        self._stamps: dict[str, Stamp] = {}
        self._reported: set[str] = set()
        self._warn_problem = WarnOnce(self._warn)
        self.verifiers: list[Verifier] = []
        """Threads that read unverified files again, ended or not."""
        self.current: Snapshot | None = None
        self.problem: str | None = None
        """Why nothing newer, or nothing at all, is served: a sentence for the operator, without a path."""

    def refresh(self) -> bool:
        """Take in what was published and dropped since the last call; whether anything changed.

        Cheap when nothing did (a few system calls). A new snapshot that cannot be read is reported once, and the
        current one stays.
        """
        return self.apply(self.scan())

    def scan(self) -> ScanResult:
        """The first half of `refresh`, on any thread: see what the store has, and open what is new.

        Opening a snapshot as finely cut as that of Qwen3-VL-30B-A3B (12,290 parts) took 20 ms, as long as the event
        loop may stall at all. Changes nothing that `get` and `current` answer from. One call at a time, and each result
        goes to `apply`.
        """
        wanted = self._store.current()
        stamps = {version: stamp for version in self._store.versions() if (stamp := self._stamp(version))}
        opened: dict[str, Snapshot | None] = {}
        for version, stamp in stamps.items():
            if self._stamps.get(version) != stamp:
                try:
                    opened[version] = self._open(version)
                except OSError as error:  # may be tried again: no stamp is kept
                    self._report(version, str(error))
        return ScanResult(wanted, self._store.problem(), stamps, opened)

    def apply(self, found: ScanResult) -> bool:
        """The second half of `refresh`, on the thread that owns the cache: put in place what `scan` found."""
        self.problem = found.problem
        if found.problem is None:
            self._warn_problem.succeeded()
        else:
            self._warn_problem.failed(found.problem)
        changed = False
        for version, snapshot in found.opened.items():
            self._stamps[version] = found.stamps[version]
            if snapshot is not None:
                self._put(version, snapshot)
                changed = True
        wanted = found.wanted
        if wanted is not None and wanted in self._snapshots and self._snapshots[wanted] is not self.current:
            self.current = self._snapshots[wanted]
            changed = True
        for version in self._snapshots.keys() - found.stamps.keys():
            # The last good snapshot outlives its folder for as long as nothing readable has taken its place.
            if self._snapshots[version] is not self.current:
                self._snapshots.pop(version).release()
                changed = True
        self._stamps = {version: stamp for version, stamp in self._stamps.items() if version in found.stamps}
        if self.problem is None and wanted is not None and wanted not in self._snapshots:
            self.problem = f"version {wanted} cannot be opened; the log says why"
        return changed

    def get(self, version: str) -> Snapshot | None:
        """A retained version, or None."""
        return self._snapshots.get(version)

    def versions(self) -> list[Snapshot]:
        """Every retained version, newest first."""
        return sorted(self._snapshots.values(), key=lambda snapshot: snapshot.sequence, reverse=True)

    @property
    def damaged(self) -> list[str]:
        """Labels of the current snapshot's units that are not served because a file was cut or changed."""
        if self.current is None:
            return []
        return [label for label, unit in self.current.units.items() if not unit.intact()]

    def close(self) -> None:
        """Release every snapshot, and end the checks under way."""
        for verifier in self.verifiers:
            verifier.stop()
        self.verifiers.clear()
        for snapshot in self._snapshots.values():
            snapshot.release()
        self._snapshots.clear()
        self._stamps.clear()
        self.current = None

    def _stamp(self, version: str) -> Stamp | None:
        folder = self._store.folder(version)
        record = file_stamp(folder / RECORD)
        return None if record is None else (record, file_stamp(folder / ACTIVATION), file_stamp(folder / CODINGS))

    def _open(self, version: str) -> Snapshot | None:
        """Open a version; None if it is unusable. Raises OSError if it may be tried again."""
        try:
            return open_snapshot(self._store.folder(version), self._snapshots.get(version))
        except StoreDamaged as error:
            self._report(version, str(error))
            return None

    def _report(self, version: str, problem: str) -> None:
        if self._stamp(version) is not None and problem not in self._reported:  # else it was deleted meanwhile
            self._reported.add(problem)
            self._warn(problem)

    def _put(self, version: str, snapshot: Snapshot) -> None:
        if snapshot.unverified:
            self._warn(
                f"{len(snapshot.unverified)} files of version {version} have another modification time than when they "
                "were published; each is read again before it is served"
            )
            self.verifiers = [verifier for verifier in self.verifiers if verifier.running] + [Verifier(snapshot)]
        old = self._snapshots.pop(version, None)
        self._snapshots[version] = snapshot
        if old is not None:
            if old is self.current:
                self.current = snapshot
            old.release()


class Verifier:
    """A thread that reads a snapshot's unverified files and puts those into service that are undamaged."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._unverified = snapshot.unverified
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End it at the next block it reads, and wait for that."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Until every suspect was read."""
        self._thread.join()

    def _run(self) -> None:
        for file, chunks in self._unverified:
            try:
                # A descriptor of its own: the file may be released, and counting references is the loop's alone.
                # If the path leads to another file by now, that one's bytes say nothing of the open one's.
                with file.path.open("rb", buffering=0) as opened:
                    same = os.path.sameopenfile(opened.fileno(), file.fd)
                    if same and digest_chunks(opened.fileno(), stop=self._stopped.is_set) == chunks:
                        file.broken = False
            except OSError:
                pass  # unreadable: it stays out of service
