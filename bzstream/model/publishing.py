"""Publishing: a checkpoint, or a state dict in memory, becomes the store's current snapshot, or nothing changes."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

from bzstream.model.checkpoint import Checkpoint, open_folder
from bzstream.model.errors import BadExpertMap, ModelError, StoreDamaged, StoreFailed
from bzstream.model.expert_map import ExpertMap, check_map, even_split, load_map
from bzstream.model.naming import find_layers, fused_orientation
from bzstream.model.plan import Plan, make_plan
from bzstream.model.record import (
    FILES,
    FORMAT,
    FileRecord,
    ManifestSigner,
    SnapshotRecord,
    UnitRecord,
    read_record,
    sign_record,
)
from bzstream.model.state_dict import open_state_dict
from bzstream.model.store import Store
from bzstream.model.write_units import Outcome, UnitOutcome, write_units
from bzstream.util.durable import write_file

__all__ = ["Publication", "PublishOptions", "PublishedUnit", "publish", "publish_state_dict"]

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The contract's form of a model version. It is also a safe file name that does not begin with a dot."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Experts = Path | Mapping[int, Mapping[int, Sequence[int]]]
"""A map's file or folder, or the map itself: group -> layer -> original indices in local request."""


@dataclass(frozen=True, slots=True)
class PublishedUnit:
    """One line of the report. `content_hash` is None in a dry run; `linked`: not written, but hard-linked."""

    unit: str
    file: str | None
    size: int
    tensors: int
    extents: int
    linked: bool
    content_hash: str | None


@dataclass(frozen=True, slots=True)
class Publication:
    """What a publish did, or in a dry run would do. Sizes in bytes."""

    version: str
    block: int
    dry_run: bool
    units: tuple[PublishedUnit, ...]
    bytes_source: int
    bytes_written: int
    bytes_linked: int
    bytes_repeated: int
    """Bytes stored more than once because an expert is in several groups."""
    files: tuple[str, ...]
    """The checkpoint's small files that the snapshot keeps."""
    files_left_out: tuple[str, ...]
    """Small files for which a snapshot has no room."""
    retired: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class PublishOptions(TypedDict, total=False):
    """What `publish` and `publish_state_dict` both take.

    Either `experts` (a JSON file, the subnet's folder of tasks, or the map itself) or `groups` (an even split) says
    which group trains which experts. The newest `keep` versions stay, 3 by default. `signer` signs the manifests.
    `progress` is called with (bytes done, bytes in all). With `dry_run` nothing is written, not even the store's
    folder.
    """

    block: Required[int]
    version: Required[str]
    experts: Experts | None
    groups: int | None
    keep: int
    signer: ManifestSigner | None
    progress: Progress | None
    dry_run: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The options, checked. Raises ModelError when they make no sense."""

    block: int
    version: str
    experts: Experts | None = None
    groups: int | None = None
    keep: int = 3
    signer: ManifestSigner | None = None
    progress: Progress | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.version):
            raise ModelError(
                f"{self.version!r} is no model version; use up to 64 letters, digits, dots, dashes and underscores, "
                "with a letter or digit first"
            )
        if not 0 <= self.block < 1 << 53:
            raise ModelError(f"{self.block} is no block number; blocks count from 0")
        if self.keep < 1:
            raise ModelError("at least one version must be kept")
        if (self.experts is None) == (self.groups is None):
            raise BadExpertMap("give either an expert map or a number of groups")

    def expert_map(self, layers: Mapping[int, int]) -> ExpertMap:
        """The checked map; `layers` is layer -> number of experts."""
        if self.groups is not None:
            found = even_split(layers, self.groups)
        elif isinstance(self.experts, Path):
            found = load_map(self.experts)
        else:
            assert self.experts is not None
            found = {group: {n: tuple(row) for n, row in rows.items()} for group, rows in self.experts.items()}
        check_map(found, layers)
        return found


def publish(source: Path, store: Path, **options: Unpack[PublishOptions]) -> Publication:
    """Publish the checkpoint folder `source` to the folder `store` as `version`, taken at chain block `block`.

    `PublishOptions` says what else there is. Raises ModelError; what is served is then as it was.
    """
    request = _Request(**options)
    with open_folder(source) as checkpoint:
        return _publish(checkpoint, Store(store), request)


def publish_state_dict(
    tensors: Mapping[str, Any], config: Mapping[str, Any] | None, store: Path, **options: Unpack[PublishOptions]
) -> Publication:
    """As `publish`, for a model in memory: `tensors` maps names to numpy arrays or torch tensors (any device).

    `config` is what config.json would hold (`model.config.to_dict()`). The tensors must not change meanwhile: unlike
    a file's, their change cannot be noticed. Contiguous CPU tensors are read in place; others are copied one by one.
    """
    request = _Request(**options)
    with open_state_dict(tensors, config) as checkpoint:
        return _publish(checkpoint, Store(store), request)


def _publish(checkpoint: Checkpoint, store: Store, request: _Request) -> Publication:
    started = time.monotonic()
    layers = find_layers(checkpoint.tensors.values(), checkpoint.config)
    orientation = fused_orientation(layers, checkpoint.config)
    experts = request.expert_map({number: layer.experts for number, layer in layers.items()})
    plan = make_plan(checkpoint.tensors, checkpoint.places, layers, experts, checkpoint.metadata)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if request.progress is not None:
            request.progress(done, plan.size)

    outcome: Outcome | None = None
    retired: list[str] = []
    if request.dry_run:
        store.check_absent(request.version)
        # Without an earlier snapshot there is nothing to compare, and the checkpoint need not be read.
        if candidates := _candidates(plan, store):
            outcome = write_units(plan, checkpoint, None, candidates, report)
        return _publication(plan, checkpoint, outcome, request, retired, started)
    with _explained(store, plan, request), store.locked():
        candidates = _candidates(plan, store)
        _check_free_space(plan, store, candidates)
        folder = store.begin(request.version)
        try:
            outcome = write_units(plan, checkpoint, folder, candidates, report)
            checkpoint.check()
            activation = store.next_activation()
            record = SnapshotRecord(
                format=FORMAT,
                version=request.version,
                block=request.block,
                sequence=activation.sequence,
                published_at=activation.at,
                hotkey=None,
                orientation=orientation,
                layers={number: layer.experts for number, layer in layers.items()},
                files=_write_files(checkpoint, folder),
                units=_unit_records(plan, outcome, folder),
                view_head=base64.b64encode(plan.head).decode("ascii"),
                view=tuple(plan.extents()),
            )
            store.commit(folder, sign_record(record, request.signer) if request.signer else record)
        except BaseException:
            store.abandon(folder, request.version)
            raise
        retired = store.retire(request.keep)
    return _publication(plan, checkpoint, outcome, request, retired, started)


def _write_files(checkpoint: Checkpoint, folder: Path) -> tuple[FileRecord, ...]:
    """Keep the checkpoint's small files, durably."""
    place = folder / FILES
    place.mkdir()
    os.chmod(place, 0o755)  # noqa: S103  the contract's mode, whatever the umask
    for name, content in checkpoint.files.items():
        write_file(place / name, content)
    return tuple(
        FileRecord(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in sorted(checkpoint.files.items())
    )


def _candidates(plan: Plan, store: Store) -> dict[int, Path]:
    """Unit index -> the current snapshot's file of the same unit, which it may turn out to equal."""
    current = store.current()
    if current is None:
        return {}
    try:
        files = {unit.file for unit in read_record(store.folder(current)).units}
    except StoreDamaged:
        return {}
    return {n: store.folder(current) / unit.file for n, unit in enumerate(plan.units) if unit.file in files}


def _unit_records(plan: Plan, outcome: Outcome, folder: Path) -> tuple[UnitRecord, ...]:
    assert outcome.view is not None
    records = []
    for item, done in zip(plan.units, outcome.units, strict=True):
        assert done.digest is not None
        records.append(
            UnitRecord(
                kind=item.kind,
                group=item.group,
                file=item.file,
                size=item.size,
                mtime_ns=os.stat(folder / item.file).st_mtime_ns,
                sha256=done.digest.sha256,
                chunks=done.digest.chunks,
                experts=dict(item.experts),
                signature=None,
            )
        )
    full = UnitRecord(
        kind="full", group=None, file=None, size=plan.size, mtime_ns=0, sha256=outcome.view.sha256,
        chunks=outcome.view.chunks, experts={}, signature=None,
    )  # fmt: skip
    return (*records, full)


def _publication(
    plan: Plan,
    checkpoint: Checkpoint,
    outcome: Outcome | None,
    request: _Request,
    retired: Sequence[str],
    started: float,
) -> Publication:
    extents = plan.extents()
    pieces = Counter(unit for run in plan.runs for unit, _ in run.targets)
    results = outcome.units if outcome else (UnitOutcome(None, False),) * len(plan.units)
    units = [
        PublishedUnit(
            unit=item.label,
            file=item.file,
            size=item.size,
            tensors=len(item.tensors),
            extents=pieces[number],
            linked=done.linked,
            content_hash=f"sha256:{done.digest.sha256}" if done.digest else None,
        )
        for number, (item, done) in enumerate(zip(plan.units, results, strict=True))
    ]
    view = outcome.view if outcome else None
    units.append(
        PublishedUnit("full", None, plan.size, len(plan.tensors), len(extents), False, view and f"sha256:{view.sha256}")
    )
    return Publication(
        version=request.version,
        block=request.block,
        dry_run=request.dry_run,
        units=tuple(units),
        bytes_source=sum(run.length for run in plan.runs),
        bytes_written=sum(unit.size for unit in units if unit.file and not unit.linked),
        bytes_linked=sum(unit.size for unit in units if unit.linked),
        bytes_repeated=sum(run.length * (len(run.targets) - 1) for run in plan.runs),
        files=tuple(sorted(checkpoint.files)),
        files_left_out=checkpoint.left_out,
        retired=tuple(retired),
        seconds=time.monotonic() - started,
    )


def _check_free_space(plan: Plan, store: Store, candidates: Mapping[int, Path]) -> None:
    """Raise ENOSPC now rather than many gigabytes later. What may turn out to be linked is not counted."""
    disk = os.statvfs(store.path)
    if sum(unit.size for n, unit in enumerate(plan.units) if n not in candidates) > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _explained(store: Store, plan: Plan, request: _Request) -> Iterator[None]:
    """Turn what the operating system refuses into a sentence, in one place."""
    try:
        yield
    except OSError as error:
        if store.current() == request.version:
            raise StoreFailed(
                f"{request.version} was published, but {store.path} could not be tidied up: {error}; "
                "the next publish tries again"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFailed(
                f"there is not enough room at {store.path} for the new snapshot, which takes up to "
                f"{sum(unit.size for unit in plan.units):,} bytes ({error.strerror}); nothing was published"
            ) from error
        raise StoreFailed(f"the store {store.path} cannot be written: {error}; nothing was published") from error
