"""The store's folder: one publisher at a time, and a crash at any point leaves the old snapshot served.

    STORE/.lock                              held (flock) by the publisher
    STORE/snapshots/.new-<version>/          a snapshot being written
    STORE/.current-<version>                 symlink: the flip is about to happen
    STORE/snapshots/<version>/               a snapshot; real once snapshot.json is in it and no flip is pending
    STORE/current -> snapshots/<version>     what is served
    STORE/snapshots/.old-<version>/          a snapshot being deleted
    STORE/pinned                             versions that are not to be retired yet, one a line

Publishing writes `.new-V`, syncs everything, makes the symlink `.current-V`, renames `.new-V` to `V`, and renames
`.current-V` over `current`: that rename is the moment of publication. Every name that begins with a dot is unfinished
work, so recovery, at the start of the next publish, only has to remove them; a folder V whose `.current-V` is still
there was never published and goes too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bzstream.model.errors import StoreBusy, StoreDamaged, VersionExists
from bzstream.model.record import SnapshotRecord, encode_record, read_record
from bzstream.util.durable import write_file

__all__ = ["Store"]

PENDING = ".current-"
NEW = ".new-"
OLD = ".old-"


class Store:
    """The paths of a store and the steps of a publish on them; the methods from `locked` on need it, but `pin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshots = path / "snapshots"
        self.link = path / "current"
        self.pins = path / "pinned"

    def current(self) -> str | None:
        """The version that is served, or None before the first publish."""
        try:
            return Path(os.readlink(self.link)).name or None
        except OSError:
            return None

    def versions(self) -> list[str]:
        """Published versions, in no order."""
        try:
            pending = {name.removeprefix(PENDING) for name in os.listdir(self.path) if name.startswith(PENDING)}
            found = os.listdir(self.snapshots)
        except OSError:
            return []
        return [
            name
            for name in found
            if name[0] != "." and name not in pending and os.path.lexists(self.folder(name) / "snapshot.json")
        ]

    def folder(self, version: str) -> Path:
        return self.snapshots / version

    def records(self) -> list[SnapshotRecord]:
        """Every readable published record, newest first."""
        found = []
        for version in self.versions():
            try:
                found.append(read_record(self.folder(version)))
            except StoreDamaged:
                continue
        return sorted(found, key=lambda record: record.sequence, reverse=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the store if need be and hold its lock. Raises StoreBusy when another publish holds it."""
        for folder in (self.path, self.snapshots):
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                os.chmod(folder, 0o755)  # noqa: S103  the contract's mode, whatever the umask
        fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy(f"another publish is writing to {self.path}; wait until it is done") from None
            yield
        finally:
            os.close(fd)

    def recover(self) -> None:
        """Remove what a publish that was killed left behind."""
        for name in sorted(os.listdir(self.path)):
            if name.startswith(PENDING):
                version = name.removeprefix(PENDING)
                if version != self.current():
                    _remove(self.folder(version))
                os.unlink(self.path / name)
        for name in os.listdir(self.snapshots):
            if name.startswith(".") or not os.path.lexists(self.folder(name) / "snapshot.json"):
                _remove(self.snapshots / name)

    def check_absent(self, version: str) -> None:
        """Raise VersionExists when the store has that version."""
        if version in self.versions():
            raise VersionExists(
                f"{self.path} already has a version {version}; versions are immutable, publish under a new name"
            )

    def begin(self, version: str) -> Path:
        """An empty folder to write the snapshot into. Raises VersionExists."""
        self.check_absent(version)
        folder = self.snapshots / f"{NEW}{version}"
        folder.mkdir()
        os.chmod(folder, 0o755)  # noqa: S103
        return folder

    def commit(self, folder: Path, record: SnapshotRecord) -> None:
        """Make the snapshot whose unit files lie, durable, in `folder` the current one."""
        temporary = folder / ".snapshot.json"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(fd, 0o644)
            content = memoryview(encode_record(record))
            while content:
                content = content[os.write(fd, content) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, folder / "snapshot.json")
        _sync(folder)
        pending = self.path / f"{PENDING}{record.version}"
        os.symlink(f"snapshots/{record.version}", pending)
        _sync(self.path)
        os.rename(folder, self.folder(record.version))
        _sync(self.snapshots)
        os.rename(pending, self.link)
        _sync(self.path)

    def abandon(self, folder: Path, version: str) -> None:
        """Undo a publish that failed: nothing of it is left."""
        if self.current() == version:
            return
        pending = self.path / f"{PENDING}{version}"
        if pending.is_symlink():
            _remove(self.folder(version))
            pending.unlink()
        _remove(folder)

    def pin(self, versions: Collection[str]) -> None:
        """Keep these versions from being retired, and no longer the ones pinned before. Needs no lock."""
        if set(versions) != self.pinned():
            write_file(self.pins, "".join(f"{version}\n" for version in sorted(versions)).encode())

    def pinned(self) -> set[str]:
        """The versions that `pin` keeps: the bases of rounds that are still open."""
        try:
            return set(self.pins.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return set()

    def retire(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` versions and the pinned ones (never the current one); what was deleted."""
        current = self.current()
        readable = [record.version for record in self.records()]
        kept = {current, *[version for version in readable if version != current][: keep - 1], *self.pinned()}
        if len(readable) < keep:  # an unreadable record is worth a look before newer versions push it out
            kept |= set(self.versions()) - set(readable)
        gone = sorted(set(self.versions()) - kept)
        for version in gone:
            doomed = self.snapshots / f"{OLD}{version}"
            os.rename(self.folder(version), doomed)
            _remove(doomed)
        return gone


def _remove(path: Path) -> None:
    """Delete a folder or file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
