"""`sync`: a peer validator's snapshot into a store, verified, only what changed.

The peer describes its snapshot (`peer_snapshot`); units that the store has already are linked, the others fetched like
those of a `pull`, with the chunks of the store's last version reused; the full model's head and hashes say that all of
it fits together (`model.replica`); then the version is put in force. Until then everything lies in STORE/incoming,
where the next call goes on from. Called by the command in its main thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Required, TypedDict, Unpack

import msgspec

from bzstream.chain.keys import Key
from bzstream.client.address import UnitRef
from bzstream.client.errors import (
    BadManifest,
    BadSignature,
    BadSnapshot,
    ClientError,
    NotFound,
    ProtocolViolation,
    UsageError,
    VersionChanged,
    WrongHash,
)
from bzstream.client.folder import lock_folder
from bzstream.client.known_peers import KnownPeers
from bzstream.client.manifest import Manifest
from bzstream.client.mirror import Mirror
from bzstream.client.peer_snapshot import MAX_DOCUMENT, PeerSnapshot, parse_snapshot
from bzstream.client.progress import Progress, UnitReport
from bzstream.client.pull import Puller
from bzstream.client.responses import refusal
from bzstream.client.session import Session
from bzstream.client.session_factory import Options, choose_receiver, open_session
from bzstream.client.sinks import disk_error
from bzstream.client.tuning import Tuning
from bzstream.errors import BzstreamError
from bzstream.model.digest import CHUNK, Digest
from bzstream.model.errors import ModelError, StoreBusy
from bzstream.model.record import SnapshotRecord, UnitRecord, read_record
from bzstream.model.replica import (
    MAX_FULL_HEAD,
    Replica,
    check_replica,
    commit_replica,
    plan_replica,
    replica_record,
)
from bzstream.model.store import Store
from bzstream.tensorfile import TensorFileError, head_size
from bzstream.util.backoff import backoff

__all__ = ["SyncOptions", "SyncReport", "follow_peer", "sync"]

INCOMING = "incoming"
MOST_MOVES = 20
"""Versions that may follow each other during one call."""
POLL_S = 0.5
LONGEST_PAUSE_S = 10.0
LIES = (BadManifest, BadSignature, BadSnapshot, WrongHash)
"""After these nothing that came is kept."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one call did. `changed`: whether another version is current now; `linked`: bytes that the store had."""

    version: str
    block: int
    sequence: int
    changed: bool
    fetched: int
    linked: int
    seconds: float
    signed_by: str | None
    retired: tuple[str, ...] = ()
    units: tuple[UnitReport, ...] = ()


class SyncOptions(TypedDict, total=False):
    """What `sync` and `follow_peer` both take; those that are not explained are the parameters of `pull`.

    `store`: the folder. `key`: proves who asks, and signs the new snapshot's manifests. `keep`: versions that stay in
    the store, 3 by default.
    """

    store: Required[str | os.PathLike[str]]
    keep: int
    hotkey: str | None
    key: str | Key | None
    token: str | None
    validator_hotkey: str | None
    receiver: str | None
    connections: int | None
    ca_file: str | None
    progress: Callable[[Progress], None] | None
    notify: Callable[[str], None] | None
    tuning: Tuning | None


def sync(url: str | Sequence[str], *, version: str | None = None, **options: Unpack[SyncOptions]) -> SyncReport:
    """Bring the peer's current snapshot, or `version`, into a store and make it current there.

    `url`: one peer or several with the same version; the first that answers says what there is, all share the work.
    Raises ClientError and ModelError; what is served is then as it was, and the same call goes on from there, unless
    the peer was found to lie.
    """
    with _session(url, options, version) as session:
        return _Sync(session, options, version).run()


def follow_peer(
    url: str | Sequence[str], on_report: Callable[[SyncReport], None], **options: Unpack[SyncOptions]
) -> NoReturn:
    """`sync`, and again for every version that the peer makes current, until the caller ends it (KeyboardInterrupt).

    `on_report` is called with the first report and with each that changed something. The first call's errors are
    raised. Later ones are told to `notify`, and tried again after a pause.
    """
    notify = options.get("notify") or (lambda _: None)
    failures = 0
    said = ""
    began = False
    while True:
        try:
            with _session(url, options, None) as session:
                report = _Sync(session, options, None).run()
                if report.changed or not began:
                    on_report(report)
                began, failures, said = True, 0, ""
                while _newest_version(session) == report.version:
                    time.sleep(POLL_S)
        except (ClientError, ModelError) as error:
            if not began or isinstance(error, UsageError):
                raise
            failures += 1
            if str(error) != said:
                said = str(error)
                notify(f"{said}; still following")
        time.sleep(backoff(failures, first=POLL_S, most=LONGEST_PAUSE_S))


@contextlib.contextmanager
def _session(url: str | Sequence[str], options: SyncOptions, version: str | None) -> Iterator[Session]:
    given = _options(options, version)
    if given.hotkey is None and given.key is None:
        raise UsageError("the peer has to know who asks: give --hotkey, which your token is bound to, or --key")
    tuning = options.get("tuning") or Tuning()
    session = open_session(url, given, tuning, options.get("notify"), claim_needed=True)
    try:
        choose_receiver(session)
        yield session
    finally:
        session.close()


def _options(options: SyncOptions, version: str | None) -> Options:
    return Options(
        hotkey=options.get("hotkey"),
        key=options.get("key"),
        token=options.get("token"),
        validator_hotkey=options.get("validator_hotkey"),
        receiver=options.get("receiver"),
        version=version,
        ca_file=options.get("ca_file"),
        connections=options.get("connections"),
    )


class _Index(msgspec.Struct):
    """Of `GET /model`, what says that there is something new. Nothing else depends on it."""

    current: str


def _newest_version(session: Session) -> str:
    """The version that is current on the first peer that answers."""

    def read(mirror: Mirror) -> str:
        head, data = session.document(mirror, "GET", "/model")
        if head.status != 200:
            raise refusal(head, data, mirror.address, "the list of versions")
        try:
            return msgspec.json.decode(data, type=_Index).current
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise ProtocolViolation(
                f"{mirror.address} lists its versions in another form than the contract's"
            ) from None

    return session.ask_mirrors(read)


class _Sync:
    """One snapshot into one store."""

    def __init__(self, session: Session, options: SyncOptions, version: str | None) -> None:
        self._session = session
        self._store = store = Store(Path(options["store"]))
        self._options = _options(options, version)
        self._keep = options.get("keep", 3)
        self._on_progress = options.get("progress") or (lambda _: None)
        self._peers = KnownPeers(store.path)
        self._incoming = store.path / INCOMING

    def run(self) -> SyncReport:
        began = time.monotonic()
        try:
            if not self._store.path.is_dir():
                self._store.path.mkdir(parents=True)
                os.chmod(self._store.path, 0o755)  # noqa: S103  the contract's mode, whatever the umask
            with lock_folder(self._incoming, self._session.notify):
                report = self._newest()
        except OSError as error:
            raise disk_error(error, self._store.path) from None
        return replace(report, seconds=time.monotonic() - began)

    def _newest(self) -> SyncReport:
        """Fetch what the peer shows; when it moves on meanwhile, what it shows then; after a lie, ask the next."""
        for _ in range(MOST_MOVES):
            before = [(mirror, mirror.dropped) for mirror in self._session.mirrors]
            found, source = self._session.ask_mirrors(self._describe)
            try:
                report = self._take(found, str(source.address))
            except (VersionChanged, NotFound) as error:
                self._session.readmit_changed()
                gone = isinstance(error, VersionChanged) or _newest_version(self._session) != found.version
                if self._options.version is not None or not gone:
                    raise
                self._session.notify(f"the peer no longer has {found.version}; starting its next version")
                continue
            except LIES as error:
                self._clear()
                if not any(mirror is not source and dropped is None for mirror, dropped in before):
                    raise
                # All that disagreed with a peer that lied may be right: only this one is left out.
                for mirror, dropped in before:
                    mirror.dropped = error if mirror is source else dropped
                self._session.notify(f"{source.address} is left out: {error}")
                continue
            self._clear()
            return report
        raise VersionChanged("the peer makes new versions current faster than they can be fetched")

    def _describe(self, mirror: Mirror) -> tuple[PeerSnapshot, Mirror]:
        """What a peer says that it holds. Raises BadSnapshot also for an old snapshot that it shows as its newest."""
        version = self._options.version
        target = "/model/snapshot" + (f"?version={version}" if version is not None else "")
        head, data = self._session.document(mirror, "GET", target, limit=MAX_DOCUMENT)
        if head.status != 200:
            raise refusal(head, data, mirror.address, "its snapshot" if version is None else f"version {version}")
        found = parse_snapshot(data, version=version, signer=self._options.validator_hotkey)
        if version is None:
            self._peers.check(found, str(mirror.address))
        return found, mirror

    def _take(self, found: PeerSnapshot, address: str) -> SyncReport:
        report = SyncReport(found.version, found.block, found.sequence, False, 0, 0, 0.0, found.hotkey)
        if self._holds(found):
            with self._locked():
                self._peers.remember(found, address)
                changed = self._store.current() != found.version
                self._store.use(found.version)
            return replace(report, changed=changed)
        full = self._manifest("full", found)
        replica = self._session.ask_mirrors(lambda mirror: self._plan(found, self._read_head(mirror, full)))
        digests = {"full": Digest(full.sha256.hex(), tuple(chunk.hex() for chunk in full.chunks))}
        units = []
        linked = 0
        for unit in replica.plan.units:
            digest = self._link_known(unit.label, unit.file, found)
            if digest is None:
                manifest = self._manifest(unit.label, found)
                digest = Digest(manifest.sha256.hex(), tuple(chunk.hex() for chunk in manifest.chunks))
                units.append(self._fetch(manifest, found.version))
            else:
                linked += unit.size
            digests[unit.label] = digest
        record = replica_record(replica, digests, self._incoming)
        try:
            check_replica(replica, record, self._incoming, self._watch(found.version, full.size))
        except ModelError as error:
            raise BadSnapshot(f"{address} shows a snapshot that cannot be right: {error}") from None
        with self._locked():
            self._peers.remember(found, address)
            signer = self._session.credentials.key
            retired = commit_replica(self._store, replica, record, self._incoming, signer, self._keep)
        fetched = sum(unit.fetched for unit in units)
        return replace(report, changed=True, fetched=fetched, linked=linked, retired=tuple(retired), units=tuple(units))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The store's lock, for which a publish that is under way is waited for."""
        deadline = time.monotonic() + self._session.tuning.patience_s
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._store.locked())
                    break
                except StoreBusy:
                    if time.monotonic() > deadline:
                        raise
                self._session.stopping.wait(POLL_S)
                self._session.raise_if_stopped()
            yield

    def _holds(self, found: PeerSnapshot) -> bool:
        """Whether the store has this very version. Raises BadSnapshot when its version of that name is another one."""
        if found.version not in self._store.versions():
            return False
        record = read_record(self._store.folder(found.version))
        own = {unit.label: (unit.size, unit.content_hash) for unit in record.units}
        files = {file.name: file.sha256 for file in record.files}
        theirs = {name: hashlib.sha256(content).hexdigest() for name, content in found.files.items()}
        if (record.block, own, files) != (found.block, found.units, theirs):
            raise BadSnapshot(
                f"the peer's version {found.version} is not the one that {self._store.path} has under that name; "
                "versions never change, so that one of the two validators has to publish under another name"
            )
        return True

    def _manifest(self, label: str, found: PeerSnapshot) -> Manifest:
        """The manifest of a unit, which must be the one that the snapshot names."""
        kind, _, group = label.partition("/")
        unit = UnitRef(kind, int(group) if group else None)  # type: ignore[arg-type]  # one of the plan's labels
        if label not in found.units:
            raise BadSnapshot(f"the peer's snapshot does not name its {unit.label}")

        def read(mirror: Mirror) -> Manifest:
            manifest = self._session.manifest_from(mirror, unit, found.version, self._options.validator_hotkey)
            told = (manifest.size, manifest.content_hash, manifest.block)
            if told != (*found.units[label], found.block):
                raise BadSnapshot(f"{mirror.address} has a manifest of {unit.label} that its snapshot does not name")
            if manifest.chunk_size != CHUNK:
                raise BadSnapshot(f"the chunks of {mirror.address} have {manifest.chunk_size} bytes, not {CHUNK}")
            return manifest

        return self._session.ask_mirrors(read)

    def _read_head(self, mirror: Mirror, full: Manifest) -> bytes:
        """The full model's bytes before its data. What they say is checked against its hashes in the end."""
        try:
            first = self._read_range(mirror, full, 8)
            return self._read_range(mirror, full, head_size(first, full.size, max_head=MAX_FULL_HEAD))
        except TensorFileError as error:
            raise BadSnapshot(f"{mirror.address} has a full model that is none: {error}") from None

    def _read_range(self, mirror: Mirror, full: Manifest, end: int) -> bytes:
        connection = self._session.connect(mirror)
        try:
            self._session.open_range(connection, mirror, full, full.version, 0, end)
            data = memoryview(bytearray(end))
            done = 0
            while done < end:
                done += connection.read_into(data[done:])
        except BaseException:
            self._session.discard(connection)
            raise
        self._session.keep(connection)
        return bytes(data)

    def _plan(self, found: PeerSnapshot, head: bytes) -> Replica:
        size = found.units["full"][0]
        try:
            replica = plan_replica(head, size, found.experts, found.files, version=found.version, block=found.block)
        except BzstreamError as error:
            raise BadSnapshot(f"the peer's model, config.json and expert map do not fit together: {error}") from None
        sizes = {unit.label: unit.size for unit in replica.plan.units} | {"full": size}
        if sizes != {label: size for label, (size, _) in found.units.items()}:
            raise BadSnapshot("the peer's units are not those that its model and its expert map make")
        return replica

    def _link_known(self, label: str, name: str, found: PeerSnapshot) -> Digest | None:
        """The unit from a version in the store, if one has these very bytes; else the likeliest base of a fetch.

        Either way it lies in the incoming folder then, as a further name of the same bytes.
        """
        base: Path | None = None
        target = self._incoming / name
        for record in self._store.records():
            for unit in record.units:
                if unit.file is None or not self._intact(record, unit):
                    continue
                file = self._store.folder(record.version) / unit.file
                if (unit.size, unit.content_hash) == found.units[label] and _link(file, target):
                    return Digest(unit.sha256, unit.chunks)
                if unit.label == label and base is None:
                    base = file
        if base is not None and not target.exists():
            _link(base, target)
        return None

    def _intact(self, record: SnapshotRecord, unit: UnitRecord) -> bool:
        """Whether the file is still the one that was published, as far as its size and time say."""
        assert unit.file is not None
        try:
            status = os.stat(self._store.folder(record.version) / unit.file, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (unit.size, unit.mtime_ns)

    def _fetch(self, manifest: Manifest, version: str) -> UnitReport:
        options = replace(self._options, version=version)
        puller = Puller(self._session, self._incoming, options, "sha256", "auto", self._on_progress)
        began = time.monotonic()
        report = puller.pull_manifest(manifest)
        return replace(report, seconds=time.monotonic() - began, path=None)  # its name there does not last

    def _watch(self, version: str, total: int) -> Callable[[int], None]:
        """Shows how far reading the whole model back is."""
        done, shown = 0, time.monotonic()

        def seen(count: int) -> None:
            nonlocal done, shown
            done += count
            now = time.monotonic()
            if now - shown > self._session.tuning.tick_s:
                shown = now
                self._session.raise_if_stopped()
                self._on_progress(Progress("full model", version, "hashing", total, done, done, done, 0, 0.0, None, 0))

        return seen

    def _clear(self) -> None:
        """Remove what lies in the incoming folder, but not the folder, which is locked."""
        for path in self._incoming.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _link(source: Path, target: Path) -> bool:
    """Whether `target` is now another name of `source`; not every file system has such names."""
    new = target.with_name(f".{target.name}.link")
    try:
        new.unlink(missing_ok=True)
        os.link(source, new, follow_symlinks=False)
        os.replace(new, target)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)  # a rename between two names of one file does nothing (rename(2))
    return True
