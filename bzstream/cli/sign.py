"""`bzstream sign`: sign the manifests of a version that was published without a key, or with another."""

from __future__ import annotations

from typing import Annotated

import typer

from bzstream.cli._options import StoreFolder, VersionName


def sign(
    store: StoreFolder,
    version: VersionName,
    key: Annotated[str, typer.Option(help="Key file or wallet (<wallet>/<hotkey>) that signs the manifests.")],
) -> None:
    """Sign a version's manifests; running nodes hand out the signed ones within a second."""
    from bzstream.chain.keys import load_key
    from bzstream.model.versions import sign_version

    signer = load_key(key)
    sign_version(store, version, signer)
    print(f"{version} is signed by {signer.ss58_address}")
