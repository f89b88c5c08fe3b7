"""Commitments through the Bittensor SDK: written by a miner's command, read by the validator's chain role."""

from __future__ import annotations

from typing import Any

from bzstream.chain.commitments import COMMITMENT, Commitment
from bzstream.chain.keys import Key, is_hotkey
from bzstream.errors import BzstreamError

__all__ = ["CommitmentFailed", "read_commitments", "write_commitment"]

_RAW = len("bz1:") + 64


class CommitmentFailed(BzstreamError):
    """The commitment is not on the chain; the sentence says why."""


async def write_commitment(endpoint: str, netuid: int, key: Key, text: str) -> int:
    """Write a commitment and wait until it is final; its block. Raises CommitmentFailed."""
    import bittensor

    substrate = bittensor.RpcSubstrate(endpoint)  # without the SDK's own fall-backs: they are mainnet's
    client = bittensor.Client(endpoint, substrate=substrate)
    info = {"fields": [{f"Raw{_RAW}": "0x" + text.encode("ascii").hex()}]}
    call = bittensor.calls.Commitments.set_commitment(netuid=netuid, info=info)
    try:
        await client.connect()
        result = await client.submit_call(call, key, signer="hotkey")
    except (bittensor.BittensorError, OSError) as error:
        raise CommitmentFailed(f"{endpoint} does not take the commitment: {error}") from None
    finally:
        await client.close()
    if not result.success:
        name = "" if result.error is None or result.error.name is None else f"{result.error.name}: "
        raise CommitmentFailed(f"the chain does not take the commitment: {name}{result.message}")
    return int(result.extrinsic_id.partition("-")[0])


async def read_commitments(client: Any, netuid: int, first: int, block: int) -> dict[str, Commitment]:
    """The commitments that stood at `block` and were written from block `first` on, by hotkey."""
    found = {}
    for hotkey, record in await client.query_map(("Commitments", "CommitmentOf"), [netuid], block=block):
        text = _text(record)
        if is_hotkey(hotkey) and text is not None and int(record["block"]) >= first:
            found[hotkey] = Commitment(text, int(record["block"]))
    return found


def _text(record: Any) -> str | None:
    """The text of a commitment of ours; None for any other."""
    fields = record["info"]["fields"]
    raw = fields[0].get(f"Raw{_RAW}") if len(fields) == 1 and isinstance(fields[0], dict) else None
    if not isinstance(raw, str):
        return None
    text = bytes.fromhex(raw[2:]).decode("ascii", "replace") if raw.startswith("0x") else raw
    return text if COMMITMENT.fullmatch(text) else None
