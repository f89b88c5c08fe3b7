"""`bzstream use`: make a version that is in the store the current one, to roll back or forward."""

from __future__ import annotations

from bzstream.cli._options import StoreFolder, VersionName


def use(store: StoreFolder, version: VersionName) -> None:
    """Serve a version that is in the store; running nodes take it within a second."""
    from bzstream.model.versions import use_version

    use_version(store, version)
    print(f"{version} is current")
