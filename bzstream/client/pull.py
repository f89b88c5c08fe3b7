"""`pull`: units of one model version, into a folder, each complete and verified or not there at all.

For every unit: read the manifest; see what an unfinished pull left and what an older file has in common with it; fetch
the rest; check the whole; give the file its name. If the server publishes a new version in between, start again with
that one, keeping every chunk that did not change, until all units of the call are of one version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bzstream.chain.keys import Key
from bzstream.client.address import UnitRef
from bzstream.client.coded import coded_chunks
from bzstream.client.errors import ProtocolViolation, VersionChanged
from bzstream.client.fetch_plan import FetchPlan
from bzstream.client.folder import OldFile, UnitFiles, lock_folder, matching_chunks
from bzstream.client.journal import Journal
from bzstream.client.manifest import Manifest
from bzstream.client.progress import Progress, PullReport, UnitReport, unit_report
from bzstream.client.session import Session
from bzstream.client.session_factory import Options, choose_receiver, open_session, unit_refs
from bzstream.client.sinks import FileSink, disk_error
from bzstream.client.streaming_sha256 import StreamingSha256
from bzstream.client.transfer import Transfer, wrong_file_hash
from bzstream.client.tuning import Tuning

__all__ = ["Coding", "Puller", "Verify", "pull"]

Verify = Literal["sha256", "blake3", "none"]
Coding = Literal["auto", "off"]
_MOST_MOVES = 20
"""Versions that may follow each other during one pull; a server that changes more often has a fault."""


def pull(
    url: str | Sequence[str],
    *,
    out: str | os.PathLike[str],
    groups: Iterable[int] = (),
    shared: bool = False,
    full: bool = False,
    hotkey: str | None = None,
    key: str | Key | None = None,
    token: str | None = None,
    connections: int | None = None,
    verify: Verify = "sha256",
    coding: Coding = "auto",
    validator_hotkey: str | None = None,
    receiver: str | None = None,
    version: str | None = None,
    ca_file: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    notify: Callable[[str], None] | None = None,
    tuning: Tuning | None = None,
    dry_run: bool = False,
    on_open: Callable[[Session], None] | None = None,
) -> PullReport:
    """Fetch units into the folder `out`: `group-<k>.safetensors`, `shared.safetensors`, `model.safetensors`.

    `url`: one validator or several that hold the same version, used at once. `groups`, `shared`, `full`: what to fetch.
    `hotkey`: the SS58 address to claim; `key`: a key, key file or wallet that proves it for every request (proofs name
    `validator_hotkey`, or else the node that the manifest names). `token`: default BZ_AUTH_TOKEN. `connections`:
    default as many as help. `verify`: "sha256" every chunk's BLAKE3 and the file's SHA-256, "blake3" the chunks,
    "none" sizes only. `coding`: "auto" takes coded forms of a unit, which are fewer bytes, where the link is slower
    than the processor decodes; "off" never. `validator_hotkey`: SS58 address that must have signed the manifests.
    `version`: stay with this one instead of the current. `progress` is called some ten times a second in this thread;
    `notify(text)` with a line for a person, from any thread. `dry_run`: nothing is fetched but manifests, nothing is
    written; the report says what would be fetched.
    `on_open(session)` is called first: `session.stop()` ends the call from any thread.

    An interrupted call goes on where it stopped when it is made again. Raises ClientError: its subclass says what kind
    of trouble, its text what to do. A file under its final name is complete and durable.
    """
    options = Options(hotkey, key, token, validator_hotkey, receiver, version, ca_file, connections)
    units = unit_refs(groups, shared=shared, full=full)
    folder = Path(out)
    session = open_session(url, options, tuning or Tuning(), notify, claim_needed=any(w.kind != "full" for w in units))
    if on_open is not None:
        on_open(session)
    puller = Puller(session, folder, options, verify, coding, progress or (lambda _: None))
    try:
        choose_receiver(session)
        if dry_run:
            return puller.pull_all(units, puller.estimate)
        with lock_folder(folder, session.notify):
            return puller.pull_all(units, puller.pull_unit)
    finally:
        session.close()


class Puller:
    """Fetches units into one folder, with what all units of one call share."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        options: Options,
        verify: Verify,
        coding: Coding,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.session = session
        self.folder = folder
        self.options = options
        self.verify = verify
        self.coding = coding
        self.on_progress = on_progress

    def pull_all(self, units: Sequence[UnitRef], pull_unit: Callable[[UnitRef], UnitReport]) -> PullReport:
        """Every unit, all of the same version: one that was fetched before the server moved on is brought up to it."""
        reports: dict[UnitRef, UnitReport] = {}
        moves = 0
        while True:
            for unit in units:
                report = pull_unit(unit)
                before = reports.get(unit)
                if before is not None:
                    fetched = before.fetched + report.fetched
                    report = replace(report, fetched=fetched, seconds=before.seconds + report.seconds)
                reports[unit] = report
            versions = {report.version for report in reports.values()}
            if len(versions) == 1:
                return PullReport(versions.pop(), tuple(reports.values()))
            moves += 1
            if moves > _MOST_MOVES:
                raise VersionChanged(
                    f"{self.session.mirrors[0].address} publishes new versions faster than they can be fetched"
                )
            self.session.notify("the server published a new version in between; bringing the other units up to it")

    def pull_unit(self, unit: UnitRef) -> UnitReport:
        began = time.monotonic()
        previous: Manifest | None = None
        fetched = futile = moves = 0
        while True:
            manifest = self.session.manifest(unit, self.options.version, self.options.validator_hotkey)
            if previous is not None:
                moves += 1
                futile = futile + 1 if manifest.sha256 == previous.sha256 else 0
                if futile >= self.session.tuning.max_wrong or moves > _MOST_MOVES:
                    raise ProtocolViolation(
                        f"{self.session.mirrors[0].address} keeps changing what it says its version of {unit.label} is"
                    )
                if not futile:
                    self.session.notify(
                        f"the server has moved on to version {manifest.version}; starting that one "
                        f"(chunks that did not change since {previous.version} are kept)"
                    )
            try:
                report = self.pull_manifest(manifest)
            except VersionChanged as moved:
                fetched += moved.fetched
                previous = manifest
                self.session.readmit_changed()
                continue
            return replace(report, fetched=report.fetched + fetched, seconds=time.monotonic() - began)

    def estimate(self, unit: UnitRef) -> UnitReport:
        """What `pull_unit` would fetch, from the manifest and what the folder holds."""
        manifest = self.session.manifest(unit, self.options.version, self.options.validator_hotkey)
        files = UnitFiles(self.folder, unit.file_name)
        old = self._old_file(files.final, manifest)
        present = 0
        if old is not None:
            with contextlib.closing(old):
                whole = self._unchanged(old, files, manifest)
                present = manifest.size if whole else sum(map(manifest.chunk_length, old.chunks()))
        elif files.part.is_file() and (found := Journal.open(files.state, manifest, files.part.stat(), hashed=True)):
            with contextlib.closing(found[0]) as journal:
                present = sum(end - begin for begin, end in journal.received())
                present += sum(manifest.chunk_length(index) for index, byte in enumerate(journal.done) if byte)
        return unit_report(manifest, path=files.final, fetched=manifest.size - present)

    def pull_manifest(self, manifest: Manifest) -> UnitReport:
        """Fetch what exactly this manifest describes. Raises VersionChanged when no server has it any more."""
        files = UnitFiles(self.folder, manifest.unit.file_name)
        with contextlib.ExitStack() as stack:
            old = self._old_file(files.final, manifest)
            if old is not None:
                stack.callback(old.close)
                if self._unchanged(old, files, manifest):
                    files.remove_unfinished()
                    return unit_report(manifest, path=files.final)
            sink = FileSink(files.part, manifest.size, self.session.tuning)
            stack.callback(sink.close)
            try:
                journal = self._journal(files, manifest, sink)
            except OSError as error:
                raise disk_error(error, files.state) from None
            stack.callback(journal.close)
            return self._fetch(files, manifest, sink, journal, old)

    def _old_file(self, path: Path, manifest: Manifest) -> OldFile | None:
        try:
            return OldFile(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(error, path) from None

    def _unchanged(self, old: OldFile, files: UnitFiles, manifest: Manifest) -> bool:
        """Whether the finished file is already what the manifest says."""
        if not old.compare(manifest, self._watch(manifest, old.size)):
            return False
        if self.verify == "sha256":
            with files.final.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").digest() != manifest.sha256:
                    raise wrong_file_hash(manifest)
        return True

    def _watch(self, manifest: Manifest, total: int) -> Callable[[int], None]:
        """A counter that shows how far comparing with bytes on the disk is."""
        state = [0, time.monotonic()]

        def seen(count: int) -> None:
            state[0] += count
            now = time.monotonic()
            if now - state[1] > self.session.tuning.tick_s:
                state[1] = now
                label, version = manifest.unit.label, manifest.version
                moment = Progress(label, version, "comparing", total, int(state[0]), 0, 0, 0, 0.0, None, 0)
                self.on_progress(moment)

        return seen

    def _journal(self, files: UnitFiles, manifest: Manifest, sink: FileSink) -> Journal:
        """The record of what the .part file holds: kept, checked again, or made from what is there."""
        hashed = self.verify != "none"
        found = Journal.open(files.state, manifest, sink.stat(), hashed=hashed)
        if found is not None:
            journal, trusted = found
            if trusted:
                return journal
            candidates = [index for index, byte in enumerate(journal.done) if byte]
            journal.close()
        else:
            # No record of these chunks: another version's .part file, perhaps, with much in common.
            candidates = list(range(len(manifest.chunks))) if files.state.exists() else []
        done = bytearray(len(manifest.chunks))
        if candidates:
            total = len(candidates) * manifest.chunk_size
            for index in matching_chunks(sink.fd, manifest, candidates, self._watch(manifest, total)):
                done[index] = 1
        return Journal.create(files.state, manifest, sink.stat(), hashed=hashed, done=bytes(done))

    def _fetch(
        self, files: UnitFiles, manifest: Manifest, sink: FileSink, journal: Journal, old: OldFile | None
    ) -> UnitReport:
        tuning = self.session.tuning
        done = [index for index, byte in enumerate(journal.done) if byte]
        if old is not None:
            present = set(done)
            old.keep_only(lambda index: index not in present)
        plan = FetchPlan(
            manifest.size,
            manifest.chunk_size,
            done=done,
            received=journal.received(),
            reserved=old.chunks() if old is not None else (),
        )
        here = plan.size - plan.open_bytes
        if here and old is None:
            self.session.notify(
                f"{manifest.unit.label}: going on from {100 * here // plan.size}%, with {plan.open_bytes} of "
                f"{plan.size} bytes still to fetch"
            )
        sha256 = StreamingSha256(manifest.size, sink.read_into, tuning) if self.verify == "sha256" else None
        transfer = Transfer(
            self.session,
            manifest,
            plan,
            sink,
            version=self.options.version,
            workers=self.options.connections,
            check=self.verify != "none",
            sha256=sha256,
            journal=journal,
            local=old,
            coded=coded_chunks(self.session, manifest, base=old) if self.coding == "auto" else None,
        )
        try:
            transfer.run(self.on_progress)
        except VersionChanged as moved:
            moved.fetched = transfer.fetched
            raise
        self.on_progress(transfer.progress("saving"))
        sink.finish(files.final)
        files.remove_unfinished()
        return transfer.report(files.final)
