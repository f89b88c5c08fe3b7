"""`bzstream remove`: delete a version, to make room."""

from __future__ import annotations

from bzstream.cli._options import StoreFolder, VersionName


def remove(store: StoreFolder, version: VersionName) -> None:
    """Delete a version from the store. Downloads under way from it go on to their end."""
    from bzstream.model.versions import remove_version

    remove_version(store, version)
    print(f"{version} was deleted")
