"""Checkpoints to snapshots: expert map, slicing, hashing, units. Knows nothing of HTTP.

May import: `payload`, `tensorfile`, `util`, `errors`. What publishing needs beyond that (numpy, blake3, yaml) is
imported when `publish` or `publish_state_dict` is first used, so that a worker that only serves does not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bzstream.model.errors import (
    BadCheckpoint,
    BadExpertMap,
    ModelError,
    SourceChanged,
    StoreBusy,
    StoreDamaged,
    StoreFailed,
    VersionExists,
)
from bzstream.model.record import ManifestSigner
from bzstream.model.snapshot import Snapshot, Unit, open_snapshot
from bzstream.model.snapshot_cache import SnapshotCache

if TYPE_CHECKING:
    from bzstream.model.publishing import Publication, PublishedUnit, PublishOptions, publish, publish_state_dict

__all__ = [
    "BadCheckpoint",
    "BadExpertMap",
    "ManifestSigner",
    "ModelError",
    "Publication",
    "PublishOptions",
    "PublishedUnit",
    "Snapshot",
    "SnapshotCache",
    "SourceChanged",
    "StoreBusy",
    "StoreDamaged",
    "StoreFailed",
    "Unit",
    "VersionExists",
    "open_snapshot",
    "publish",
    "publish_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in ("Publication", "PublishOptions", "PublishedUnit", "publish", "publish_state_dict"):
        return getattr(importlib.import_module("bzstream.model.publishing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
