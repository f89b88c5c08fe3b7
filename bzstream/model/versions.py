"""What an operator does with the versions in a store: list them, use an older one again, remove one, sign one later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bzstream.model.errors import ModelError, StoreFailed
from bzstream.model.record import ManifestSigner
from bzstream.model.store import Store

__all__ = ["Version", "list_versions", "remove_version", "sign_version", "use_version"]


@dataclass(frozen=True, slots=True)
class Version:
    """One version. `hotkey` is the signer's, `size` the full model's in bytes, `activated_at` in seconds since 1970."""

    version: str
    current: bool
    pinned: bool
    """Whether it is the base of a round that is not settled yet."""
    coded: int
    """Bytes of its coded files (docs/coding.md)."""
    hotkey: str | None
    block: int
    size: int
    activated_at: int


def list_versions(path: Path) -> tuple[Version, ...]:
    """The store's readable versions, the one that was activated last first. Raises ModelError when it is no store."""
    store = _store(path)
    current, pinned = store.current(), store.pinned()
    return tuple(
        Version(
            version=record.version,
            block=record.block,
            activated_at=store.activation(record).at,
            size=record.units[-1].size,
            hotkey=record.hotkey,
            current=record.version == current,
            pinned=record.version in pinned,
            coded=_coded_bytes(store.folder(record.version)),
        )
        for record in store.records()
    )


def use_version(path: Path, version: str) -> None:
    """Make a version current again; servers take it within a second. Raises ModelError; nothing changed then."""
    with _changing(path) as store:
        store.use(version)


def remove_version(path: Path, version: str) -> None:
    """Delete a version that is neither current nor pinned. Raises ModelError."""
    with _changing(path) as store:
        store.remove(version)


def sign_version(path: Path, version: str, signer: ManifestSigner) -> None:
    """Sign a version's manifests, anew if they are signed; the units stay what they are. Raises ModelError."""
    with _changing(path) as store:
        store.sign(version, signer)


def _coded_bytes(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in (folder / "coded").iterdir())
    except OSError:
        return 0  # it has none, or they are going away


def _store(path: Path) -> Store:
    store = Store(path)
    if not store.snapshots.is_dir():
        raise ModelError(f"{path} is no store: it has no folder 'snapshots'; publish a checkpoint into it first")
    return store


@contextmanager
def _changing(path: Path) -> Iterator[Store]:
    store = _store(path)
    try:
        with store.locked():
            yield store
    except OSError as error:
        raise StoreFailed(f"the store {path} cannot be changed: {error}") from error
