"""The store's folder: one publisher at a time, and a crash at any point leaves the old snapshot served.

    STORE/.lock                              held (flock) by the publisher
    STORE/snapshots/.new-<version>/          a snapshot being written
    STORE/.current-<version>                 symlink: the flip is about to happen
    STORE/snapshots/<version>/               a snapshot; real once snapshot.json is in it and no flip is pending
    STORE/current -> snapshots/<version>     what is served
    STORE/pinned                             versions that are not to be retired yet, one a line
    STORE/snapshots/.old-<version>/          a snapshot being deleted
    STORE/incoming/, STORE/peers.json        `client.sync`'s: an unfinished snapshot, and how new peers' last ones were

Publishing writes `.new-V`, syncs everything, makes the symlink `.current-V`, renames `.new-V` to `V`, and renames
`.current-V` over `current`: that rename is the moment of publication. Every name that begins with a dot is unfinished
work, so recovery, at the start of the next change, only has to remove them; a folder V whose `.current-V` is still
there was never published and goes too.

Making an older version current again writes `activation.json` into its folder and flips `current` the same way; the
pending symlink is then called `.again-V`, as V must not be removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bzstream.model.errors import ModelError, StoreBusy, StoreDamaged, VersionExists
from bzstream.model.record import (
    ACTIVATION,
    Activation,
    ManifestSigner,
    SnapshotRecord,
    encode_record,
    read_activation,
    read_record,
    sign_record,
)
from bzstream.util.durable import replace_file, sync_folder, write_file

__all__ = ["Store"]

RECORD = "snapshot.json"
PENDING = ".current-"
AGAIN = ".again-"
NEW = ".new-"
OLD = ".old-"


class Store:
    """The paths of a store, what can be read of it by anybody, and the steps of a change, which need `locked`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshots = path / "snapshots"
        self.link = path / "current"
        self.pins = path / "pinned"

    def current(self) -> str | None:
        """The version that `current` names, which need not be there; None before the first publish."""
        try:
            return Path(os.readlink(self.link)).name or None
        except OSError:
            return None

    def problem(self) -> str | None:
        """Why nothing can be served although there is something: a sentence for the operator, without a path."""
        if (version := self.current()) is not None:
            problem = None if (self.folder(version) / RECORD).exists() else f"names {version}, which is not there"
        elif os.path.lexists(self.link):
            problem = "is no symbolic link (was the store copied by a tool that follows links?)"
        else:
            problem = "is missing" if self.versions() else None
        return problem and f"the store's link `current` {problem}; run `bzstream use` or publish again"

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
            if name[0] != "." and name not in pending and os.path.lexists(self.folder(name) / RECORD)
        ]

    def folder(self, version: str) -> Path:
        return self.snapshots / version

    def records(self) -> list[SnapshotRecord]:
        """Every readable published record, the one that was activated last first."""
        found = []
        for version in self.versions():
            try:
                found.append(read_record(self.folder(version)))
            except StoreDamaged:
                continue
        return sorted(found, key=lambda record: self.activation(record).sequence, reverse=True)

    def activation(self, record: SnapshotRecord) -> Activation:
        """The latest activation of a version."""
        return read_activation(self.folder(record.version), record)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the store if need be, hold its lock, and remove what a change that was killed left behind.

        Raises StoreBusy when another publisher holds the lock.
        """
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
            self._recover()
            yield
        finally:
            os.close(fd)

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

    def next_activation(self) -> Activation:
        """What the next activation is to be recorded as.

        Each is later than the one before, in whole seconds, whatever the clock does: caches compare these times.
        """
        earlier = [Activation(0, 0), *map(self.activation, self.records())]
        last, at = max(each.sequence for each in earlier), max(each.at for each in earlier)
        return Activation(last + 1, max(int(time.time()), at + 1))

    def commit(self, folder: Path, record: SnapshotRecord) -> None:
        """Make the snapshot whose unit files lie, durable, in `folder` the current one."""
        write_file(folder / RECORD, encode_record(record))
        pending = self._announce(PENDING, record.version)
        os.rename(folder, self.folder(record.version))
        sync_folder(self.snapshots)
        self._flip(pending)

    def abandon(self, folder: Path, version: str) -> None:
        """Undo a publish that failed: nothing of it is left."""
        if self.current() == version:
            return
        pending = self.path / f"{PENDING}{version}"
        if pending.is_symlink():
            _remove(self.folder(version))
            pending.unlink()
        _remove(folder)

    def use(self, version: str) -> None:
        """Make a version that is in the store the current one. Raises ModelError when it is not there or damaged."""
        folder = self._require(version)
        read_record(folder)
        if self.current() == version:
            return
        write_file(folder / ACTIVATION, msgspec.json.encode(self.next_activation()))
        self._flip(self._announce(AGAIN, version))

    def remove(self, version: str) -> None:
        """Delete a version. Raises ModelError when it is current, the base of an open round, or not there."""
        self._require(version)
        if version in self.pinned():
            raise ModelError(f"{version} is the base of a round that is not settled yet; remove it later")
        if self.current() == version:
            raise ModelError(f"{version} is served; make another version current first (bzstream use)")
        self._delete(version)

    def sign(self, version: str, signer: ManifestSigner) -> None:
        """Sign a version's manifests, again if they are signed. Raises ModelError."""
        folder = self._require(version)
        write_file(folder / RECORD, encode_record(sign_record(read_record(folder), signer)))

    def retire(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` versions and the pinned ones (never the current one); what was deleted."""
        current = self.current()
        readable = [record.version for record in self.records()]
        kept = {current, *[version for version in readable if version != current][: keep - 1], *self.pinned()}
        if len(readable) < keep:  # an unreadable record is worth a look before newer versions push it out
            kept |= set(self.versions()) - set(readable)
        gone = sorted(set(self.versions()) - kept)
        for version in gone:
            self._delete(version)
        return gone

    def pin(self, versions: Collection[str]) -> None:
        """Keep these versions from being deleted, and no longer the ones pinned before. Needs no lock."""
        if set(versions) != self.pinned():
            write_file(self.pins, "".join(f"{version}\n" for version in sorted(versions)).encode())

    def pinned(self) -> set[str]:
        """The versions that `pin` keeps: the bases of rounds that are still open."""
        try:
            return set(self.pins.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return set()

    def _require(self, version: str) -> Path:
        if version not in self.versions():
            raise ModelError(f"{self.path} has no version {version}; see `bzstream versions {self.path}`")
        return self.folder(version)

    def _announce(self, prefix: str, version: str) -> Path:
        """The symlink that is to become `current`, durable. What stands in its way and is no link is put aside."""
        pending = self.path / f"{prefix}{version}"
        os.symlink(f"snapshots/{version}", pending)
        if self.link.is_dir() and not self.link.is_symlink():  # a copy of the store that followed the link
            os.rename(self.link, self.snapshots / f"{OLD}current")
        sync_folder(self.path)
        return pending

    def _flip(self, pending: Path) -> None:
        replace_file(pending, self.link)
        _remove(self.snapshots / f"{OLD}current")

    def _delete(self, version: str) -> None:
        doomed = self.snapshots / f"{OLD}{version}"
        os.rename(self.folder(version), doomed)
        _remove(doomed)

    def _recover(self) -> None:
        for name in sorted(os.listdir(self.path)):
            if name.startswith((PENDING, AGAIN)):
                version = name.removeprefix(PENDING)
                if name.startswith(PENDING) and version != self.current():
                    _remove(self.folder(version))
                os.unlink(self.path / name)
        for name in os.listdir(self.snapshots):
            if name.startswith(".") or not os.path.lexists(self.folder(name) / RECORD):
                _remove(self.snapshots / name)


def _remove(path: Path) -> None:
    """Delete a folder or file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
