"""A snapshot made of unit files that another validator published: laid out, checked and put in force like one's own.

The full model's head and the expert map decide everything else: which units there are, each one's head, and where every
tensor lies in which file (`plan.make_plan`, the same that publishing uses). So the head is all that has to be believed,
and the hashes of the full model say whether it is right. Called by the client, in one thread.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from bzstream.model.checkpoint import Place
from bzstream.model.digest import Digest
from bzstream.model.errors import BadCheckpoint
from bzstream.model.expert_map import ExpertMap, check_map
from bzstream.model.inspection import digest_view
from bzstream.model.naming import Layer, TensorInfo, find_layers, fused_orientation
from bzstream.model.plan import Plan, make_plan
from bzstream.model.record import FILES, FORMAT, FileRecord, ManifestSigner, SnapshotRecord, UnitRecord, sign_record
from bzstream.model.small_files import CONFIG, parse_config
from bzstream.model.store import Store
from bzstream.tensorfile import parse_head
from bzstream.util.durable import write_file

__all__ = ["MAX_FULL_HEAD", "Replica", "check_replica", "commit_replica", "plan_replica", "replica_record"]

MAX_FULL_HEAD = 32 * 1024 * 1024
"""Bytes of the full model's head: 200,000 tensors."""

MAX_ROWS = 1_000_000
"""Experts in all fused tensors together (Qwen3-VL-30B-A3B has 12,288), so that a small head cannot ask for a plan that
fills the memory."""


@dataclass(frozen=True, slots=True)
class Replica:
    """How a snapshot is laid out. `files` are its small files, name -> content."""

    version: str
    block: int
    plan: Plan
    layers: Mapping[int, Layer]
    orientation: str | None
    files: Mapping[str, bytes]


def plan_replica(
    head: bytes, size: int, experts: ExpertMap, files: Mapping[str, bytes], *, version: str, block: int
) -> Replica:
    """The layout of the version whose full model has `size` bytes and begins with `head`.

    Raises ModelError and TensorFileError when the head, the map and config.json do not make a snapshot that
    this release would have published.
    """
    parsed = parse_head(head, size, max_head=MAX_FULL_HEAD)
    config = parse_config(files[CONFIG]) if CONFIG in files else None
    tensors = {t.name: TensorInfo(t.name, t.dtype, t.shape, t.end - t.start) for t in parsed.tensors}
    places = {t.name: Place(0, parsed.data_start + t.start) for t in parsed.tensors}
    layers = find_layers(tensors.values(), config)
    if sum(layer.experts * max(1, len(layer.fused)) for layer in layers.values()) > MAX_ROWS:
        raise BadCheckpoint("the model has more experts than any that is known")
    check_map(experts, {number: layer.experts for number, layer in layers.items()})
    plan = make_plan(tensors, places, layers, experts, parsed.metadata)
    if plan.head != head:
        raise BadCheckpoint("the full model is laid out otherwise than this release of bzstream does it")
    return Replica(version, block, plan, layers, fused_orientation(layers, config), files)


def replica_record(replica: Replica, digests: Mapping[str, Digest], folder: Path) -> SnapshotRecord:
    """The record of the unit files that lie in `folder`; `digests` by label. Its activation is set by `commit_replica`.

    Raises OSError.
    """
    units = [
        UnitRecord(
            kind=unit.kind,
            group=unit.group,
            file=unit.file,
            size=unit.size,
            mtime_ns=os.stat(folder / unit.file).st_mtime_ns,
            sha256=digests[unit.label].sha256,
            chunks=digests[unit.label].chunks,
            experts=dict(unit.experts),
            signature=None,
        )
        for unit in replica.plan.units
    ]
    full = UnitRecord(
        kind="full", group=None, file=None, size=replica.plan.size, mtime_ns=0, sha256=digests["full"].sha256,
        chunks=digests["full"].chunks, experts={}, signature=None,
    )  # fmt: skip
    return SnapshotRecord(
        format=FORMAT,
        version=replica.version,
        block=replica.block,
        sequence=0,
        published_at=0,
        hotkey=None,
        orientation=replica.orientation,
        layers={number: layer.experts for number, layer in replica.layers.items()},
        files=tuple(
            FileRecord(name, len(c), hashlib.sha256(c).hexdigest()) for name, c in sorted(replica.files.items())
        ),
        units=(*units, full),
        view_head=base64.b64encode(replica.plan.head).decode("ascii"),
        view=tuple(replica.plan.extents()),
    )


def check_replica(replica: Replica, record: SnapshotRecord, folder: Path, seen: Callable[[int], None]) -> None:
    """Read every byte of the full model in the unit files and compare it with the record's hashes, and the heads.

    `seen(n)` is told of n more bytes read. Raises ModelError and OSError.
    """
    for unit in replica.plan.units:
        with (folder / unit.file).open("rb") as file:
            if file.read(len(unit.head)) != unit.head or os.fstat(file.fileno()).st_size != unit.size:
                raise BadCheckpoint(f"{unit.file} is not laid out as the full model and the expert map say")
    full = record.units[-1]
    if digest_view(folder, record, seen) != Digest(full.sha256, full.chunks):
        raise BadCheckpoint("the units do not make up the full model: its hashes are other ones")


def commit_replica(
    store: Store, replica: Replica, record: SnapshotRecord, folder: Path, signer: ManifestSigner | None, keep: int
) -> list[str]:
    """Make the snapshot whose checked unit files lie in `folder`, on the store's file system, the current one.

    With the store locked. Where the file system has hard links the files stay in `folder`, too, so that nothing is lost
    when this is cut short. Returns the versions that were deleted to keep no more than `keep`. Raises ModelError and
    OSError; what is served is then as it was.
    """
    place = store.begin(replica.version)
    try:
        for unit in replica.plan.units:
            os.chmod(folder / unit.file, 0o644)
            _link(folder / unit.file, place / unit.file)
        (place / FILES).mkdir()
        os.chmod(place / FILES, 0o755)  # noqa: S103
        for name, content in replica.files.items():
            write_file(place / FILES / name, content)
        activation = store.next_activation()
        record = structs.replace(record, sequence=activation.sequence, published_at=activation.at)
        store.commit(place, sign_record(record, signer) if signer is not None else record)
    except BaseException:
        store.abandon(place, replica.version)
        raise
    return store.retire(keep)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EPERM, errno.ENOTSUP):
            raise
        os.rename(source, target)
