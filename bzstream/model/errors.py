"""What can go wrong with a checkpoint, a map or a store. Each message is a sentence for the operator."""

from __future__ import annotations

from bzstream.errors import BzstreamError

__all__ = [
    "BadCheckpoint",
    "BadExpertMap",
    "ModelError",
    "SourceChanged",
    "StoreBusy",
    "StoreDamaged",
    "StoreFailed",
    "VersionExists",
]


class ModelError(BzstreamError):
    """Base of this package's errors. When publishing raises one, what is served is as it was before."""


class BadCheckpoint(ModelError):
    """The checkpoint is incomplete, contradicts itself, or has a form that bzstream does not know."""


class BadExpertMap(ModelError):
    """The expert map is unreadable or does not fit the checkpoint."""


class SourceChanged(ModelError):
    """A file of the checkpoint was written to while it was being published."""


class StoreBusy(ModelError):
    """Another publish holds the store's lock."""


class StoreFailed(ModelError):
    """The operating system refused to write the store: disk full, no permission, no such device."""


class StoreDamaged(ModelError):
    """A snapshot's record cannot be read, or does not say what it said when it was written."""


class VersionExists(ModelError):
    """The store holds a snapshot of that version; versions are immutable."""
