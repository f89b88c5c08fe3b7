"""`bzstream commit`: say on the chain which checkpoint will be submitted, before it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bzstream.cli._options import AsJson, Config, settings_of
from bzstream.errors import BzstreamError

__all__ = ["commit"]


class NoCheckpoint(BzstreamError):
    """The checkpoint cannot be read."""


def commit(
    key: Annotated[str, typer.Option(envvar="BZSTREAM_KEY", help="Key file or wallet (<wallet>/<hotkey>) that signs.")],
    checkpoint: Annotated[Path, typer.Option(help="The file that will be submitted.")],
    network: Annotated[str, typer.Option(help="WebSocket URL of a node of the chain.")],
    netuid: Annotated[int, typer.Option(min=0, max=65535, help="The subnet.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Commit to a checkpoint on the chain, in the commit phase, as proof of being first.

    Nobody can tell the file from the commitment, or use it for another hotkey. A commitment outside the commit phase is
    made but warned of. The phases are those of [chain] in --config, by default the ones of `bzstream settings`.
    """
    import asyncio

    from bzstream.chain.clock import Cycle
    from bzstream.chain.commitments import commitment_text
    from bzstream.chain.keys import load_key
    from bzstream.chain.sdk_commitments import write_commitment
    from bzstream.util.files import hash_file

    cycle = Cycle.of(settings_of(config, {}).chain)
    signer = load_key(key)
    try:
        text = commitment_text(signer.ss58_address, hash_file(checkpoint))
    except OSError as error:
        raise NoCheckpoint(f"the checkpoint {checkpoint} cannot be read: {error.strerror}") from None
    block = asyncio.run(write_commitment(network, netuid, signer, text))
    phase = cycle.commit_phase(block)
    if block not in phase:
        when = f"blocks {phase.start} to {phase.stop - 1} of this cycle" if phase else "this cycle has none"
        print(
            f"bzstream: block {block} is not in the commit phase ({when}), so this commitment may count for no"
            " submission; if your subnet has other phases, name its settings with --config",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps({"hotkey": signer.ss58_address, "commitment": text, "block": block}))
    else:
        print(f"committed {text} for {signer.ss58_address} in block {block}")
