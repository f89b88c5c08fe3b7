"""`bzstream commit`: say on the chain which checkpoint will be submitted, before it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bzstream.cli._options import AsJson
from bzstream.errors import BzstreamError

__all__ = ["commit"]


class NoCheckpoint(BzstreamError):
    """The checkpoint cannot be read."""


def commit(
    key: Annotated[str, typer.Option(envvar="BZSTREAM_KEY", help="Key file or wallet (<wallet>/<hotkey>) that signs.")],
    checkpoint: Annotated[Path, typer.Option(help="The file that will be submitted.")],
    network: Annotated[str, typer.Option(help="WebSocket URL of a node of the chain.")],
    netuid: Annotated[int, typer.Option(min=0, max=65535, help="The subnet.")],
    as_json: AsJson = False,
) -> None:
    """Commit to a checkpoint on the chain, in the commit phase, as proof of being first.

    Nobody can tell the file from the commitment, or use it for another hotkey.
    """
    import asyncio

    from bzstream.chain.commitments import commitment_text
    from bzstream.chain.keys import load_key
    from bzstream.chain.sdk_commitments import write_commitment
    from bzstream.util.files import hash_file

    signer = load_key(key)
    try:
        text = commitment_text(signer.ss58_address, hash_file(checkpoint))
    except OSError as error:
        raise NoCheckpoint(f"the checkpoint {checkpoint} cannot be read: {error.strerror}") from None
    block = asyncio.run(write_commitment(network, netuid, signer, text))
    if as_json:
        print(json.dumps({"hotkey": signer.ss58_address, "commitment": text, "block": block}))
    else:
        print(f"committed {text} for {signer.ss58_address} in block {block}")
