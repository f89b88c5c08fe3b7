"""What an operator does with the versions in a store: list them, use an older one again, remove one, sign one later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bzstream.model.errors import ModelError, StoreFailed
from bzstream.model.record import ManifestSigner
from bzstream.model.store import Store

__all__ = ["list_versions", "remove_version", "sign_version", "use_version"]


def list_versions(path: Path) -> list[dict[str, Any]]:
    """The store's readable versions, the one that was activated last first, in plain values for JSON.

    `activated_at` is in seconds since 1970, `size` the full model's in bytes, `coded` that of its coded files,
    `hotkey` the signer's or None; `pinned`: whether it is the base of a round that is not settled yet.
    Raises ModelError when `path` is no store.
    """
    store = _store(path)
    current, pinned = store.current(), store.pinned()
    return [
        {
            "version": record.version,
            "current": record.version == current,
            "pinned": record.version in pinned,
            "block": record.block,
            "size": record.units[-1].size,
            "coded": _coded_bytes(store.folder(record.version)),
            "hotkey": record.hotkey,
            "activated_at": store.activation(record).at,
        }
        for record in store.records()
    ]


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
