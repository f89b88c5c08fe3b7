"""Weights through the Bittensor SDK: what the subnet demands, sending, and what its answers mean.

`WeightSetter` calls this from the chain role's event loop. The SDK's `SetWeights` chooses between plain weights and a
timelocked commit by the subnet's own setting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from bzstream.chain.keys import is_hotkey
from bzstream.chain.weight_setter import ERA_BLOCKS, NotingSigner, Subnet, WeightsRefused
from bzstream.chain.weights import U16_MAX, WeightLimits
from bzstream.errors import BzstreamError

__all__ = ["SdkChain", "missing_storage"]

_PALLET = "SubtensorModule"

_PERMANENT = frozenset(
    {
        "HotKeyNotRegisteredInSubNet",
        "HotKeyNotRegisteredInNetwork",
        "IncorrectWeightVersionKey",
        "MaxWeightExceeded",
        "NeuronNoValidatorPermit",
        "NotEnoughStakeToSetWeights",
        "StakeAmountTooLow",
        "SubnetNotExists",
        "WeightVecLengthIsLow",
    }
)
"""Errors of the pallet, and of the pool in its name, that the next block will give again."""
_PERMANENT_CODES = frozenset({"not_registered", "not_authorized", "invalid_argument"})
"""The SDK's codes of what it finds by itself before it signs, where it gives no name of the pallet."""
_OPEN = frozenset(
    {
        "AlreadyImported",
        "Dropped",
        "FinalityTimeout",
        "Invalid",
        "PriorityTooLow",
        "Retracted",
        "Stale",
        "Usurped",
    }
)
"""Answers that do not say whether our weights are, or will be, in a block. With PriorityTooLow and Stale another
extrinsic of ours has the same nonce: one that was handed to another node, perhaps."""


class UnknownOutcome(BzstreamError):
    """The extrinsic was signed and handed over, and the chain has not said what became of it."""


_NEEDED = frozenset(
    {
        "BlocksSinceLastStep",
        "CommitRevealWeightsEnabled",
        "LastEpochBlock",
        "LastUpdate",
        "MaxWeightsLimit",
        "MinAllowedWeights",
        "PendingEpochAt",
        "RevealPeriodEpochs",
        "SubnetEpochConsensus",
        "SubnetEpochIndex",
        "SubnetOwnerHotkey",
        "Tempo",
        "Uids",
        "WeightsSetRateLimit",
        "WeightsVersionKey",
    }
)
"""Storage that is read to set weights: by bittensor 11.3 (intents/weights.py), and by this file."""


async def missing_storage(substrate: Any) -> list[str]:
    """What a `bittensor.RpcSubstrate` is connected to lacks of that."""
    runtime = await substrate.raw.metadata_ir()
    (pallet,) = (pallet for pallet in runtime.pallets if pallet.name == _PALLET)
    return sorted(_NEEDED - {item.name for item in pallet.storage})


class SdkChain:
    """One connection to the chain: a `bittensor.Client` for one subnet. `missing`: see `missing_storage`."""

    def __init__(self, client: Any, netuid: int, missing: Sequence[str] = ()) -> None:
        self._client = client
        self._netuid = netuid
        self._missing = missing

    async def subnet(self) -> Subnet:
        """UIDs, limits and owner as they are now. Raises WeightsRefused when this runtime cannot be asked."""
        if self._missing:
            raise WeightsRefused(
                f"the chain's runtime lacks {', '.join(self._missing)}, which the installed Bittensor SDK asks for;"
                " install the SDK that goes with this chain",
                permanent=True,
            )
        names = ("MinAllowedWeights", "MaxWeightsLimit", "WeightsVersionKey", "SubnetOwnerHotkey")
        graph, *values = await asyncio.gather(
            self._client.subnets.metagraph(self._netuid, commitments=False),
            *(self._client.query((_PALLET, name), [self._netuid]) for name in names),
        )
        least, most, version_key, owner = values
        return Subnet(
            uids={neuron.hotkey: neuron.uid for neuron in graph or () if is_hotkey(neuron.hotkey)},
            limits=WeightLimits(int(least or 0), U16_MAX if most is None else int(most), int(version_key or 0)),
            owner=owner if is_hotkey(owner) else None,
        )

    async def settled(self, hotkey: str) -> tuple[int, int | None]:
        """The newest final block, and the LastUpdate of the hotkey's UID in it; None when it has no UID."""
        final = await self._client.finalized_block()
        uid, updates = await asyncio.gather(
            self._client.query((_PALLET, "Uids"), [self._netuid, hotkey], block=final),
            self._client.query((_PALLET, "LastUpdate"), [self._netuid], block=final),
        )
        known = uid is not None and int(uid) < len(updates)
        return final, int(updates[int(uid)]) if known else None

    async def send(self, weights: Mapping[int, float], version_key: int, signer: NotingSigner) -> int:
        """Send weights and wait until they are final; the block that holds them. Raises WeightsRefused."""
        import bittensor

        intent = bittensor.SetWeights(
            netuid=self._netuid, uids=list(weights), weights=list(weights.values()), version_key=version_key
        )
        try:
            result = await self._client.execute(intent, signer, period=ERA_BLOCKS)
        except bittensor.ChainError as error:
            if signer.signed:
                raise
            raise _refusal(error) from None
        if result.success:
            return int(result.extrinsic_id.partition("-")[0])
        failure = result.error
        if result.block_hash is None and (failure is None or failure.name is None or failure.name in _OPEN):
            raise UnknownOutcome(result.message)
        raise _refusal(failure)


def _refusal(error: Any) -> WeightsRefused:
    permanent = error.name in _PERMANENT if error.name else error.code.value in _PERMANENT_CODES
    return WeightsRefused(f"{error.name}: {error}" if error.name else str(error), permanent=permanent)
