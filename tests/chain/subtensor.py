"""One subnet of a Subtensor chain in memory: storage, a transaction pool, blocks, and the calls that set weights.

Extrinsics are decoded and their signatures checked by the SDK's core with the recorded runtime; what is applied is
what Subtensor's pallet does with `set_mechanism_weights` and `commit_timelocked_mechanism_weights`, refusals included.
Nothing here knows JSON-RPC; that is `node`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import bittensor_core

from tests.chain.runtime import SPEC_VERSION, TRANSACTION_VERSION, runtime

__all__ = ["NETUID", "Commit", "Extrinsic", "PoolError", "Subtensor", "hash_of"]

NETUID = 1
_PALLET = "SubtensorModule"
_U16 = 65535


def hash_of(block: int, fork: int = 0) -> str:
    name = f"node-{block}" if not fork else f"node-{block}-{fork}"
    return "0x" + hashlib.blake2b(name.encode(), digest_size=32).hexdigest()


class PoolError(Exception):
    """The pool refuses an extrinsic, with the node's own code and words."""

    def __init__(self, code: int, message: str, data: str) -> None:
        super().__init__(message)
        self.answer = {"code": code, "message": message, "data": data}


class Refused(Exception):
    """A call fails when it is applied; the text is the pallet's name of the error."""


@dataclass(frozen=True)
class Extrinsic:
    """A signed extrinsic, decoded."""

    data: bytes
    hash: str
    signer: str
    nonce: int
    valid_until: float
    """The last block that may include it."""
    call: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """A timelocked commit that the chain holds."""

    block: int
    hotkey: str
    arguments: dict[str, Any]


@dataclass
class Block:
    number: int
    hash: str
    extrinsics: list[Extrinsic] = field(default_factory=list)
    events: bytes = b"\0"
    storage: dict[bytes, bytes] = field(default_factory=dict)
    """As it was after the block; the head's own is `Subtensor.storage`."""
    nonces: dict[str, int] = field(default_factory=dict)
    parent: Block | None = None


class Subtensor:
    """The chain. `set` and `get` are its storage, `submit` its pool, `mine` its blocks."""

    def __init__(self, block: int) -> None:
        self.runtime = runtime()
        self.storage: dict[bytes, bytes] = {}
        """The head's; earlier blocks keep a copy of their own."""
        self.pool: list[Extrinsic] = []
        self.nonces: dict[str, int] = {}
        self.commits: list[Commit] = []
        self.included: list[tuple[int, Extrinsic, str | None]] = []
        """Block, extrinsic and why it failed, of all that was ever included and stayed."""
        self.fork = 0
        self.finalized = block
        self.head = Block(block, hash_of(block))
        self.blocks: dict[str, Block] = {self.head.hash: self.head}
        self._neurons: list[tuple[str, bool]] = []
        self.stakes: dict[str, int] = {}
        """Total stake of hotkeys, in rao."""
        self._error_index = _errors(self.runtime)
        self.on_included: Callable[[Block], None] = lambda block: None

    # ---- Storage ----------------------------------------------------------------------------------------------------

    def set(self, item: str, *keys: Any, value: Any) -> None:
        entry = self.runtime.storage_entry(_PALLET, item)
        self.storage[self.key(item, keys)] = bytes(self.runtime.encode(entry.value_type, value))

    def get(self, item: str, *keys: Any) -> Any:
        entry = self.runtime.storage_entry(_PALLET, item)
        raw = self.storage.get(self.key(item, keys))
        if raw is None:
            return (
                None
                if entry.modifier == "Optional"
                else self.runtime.decode(entry.value_type, bytes(entry.default_bytes), True)
            )
        return self.runtime.decode(entry.value_type, raw, True)

    def key(self, item: str, keys: Sequence[Any]) -> bytes:
        """The storage key of an item."""
        return bytes(self.runtime.storage_key(_PALLET, item, list(keys)))

    @property
    def neurons(self) -> list[tuple[str, bool]]:
        """(hotkey, validator permit), by uid. Assign a list to register; whose UID changed hands loses its weights."""
        return self._neurons

    @neurons.setter
    def neurons(self, neurons: list[tuple[str, bool]]) -> None:
        updates = list(self.get("LastUpdate", NETUID)) + [0] * len(neurons)
        before = dict(enumerate(self._neurons))
        for hotkey, _ in self._neurons:
            self.storage.pop(self.key("Uids", [NETUID, hotkey]), None)
        for uid, (hotkey, _) in enumerate(neurons):
            self.set("Uids", NETUID, hotkey, value=uid)
            self.set("Keys", NETUID, uid, value=hotkey)
            if uid in before and before[uid][0] != hotkey:
                updates[uid] = self.head.number
                self.set("Weights", NETUID, uid, value=[])
        self.set("ValidatorPermit", NETUID, value=[permit for _, permit in neurons])
        self.set("LastUpdate", NETUID, value=updates[: len(neurons)])
        self._neurons = list(neurons)

    def weights_of(self, hotkey: str) -> dict[str, int]:
        """The weights (u16) that stand on the chain for a validator, by hotkey."""
        uid = self.get("Uids", NETUID, hotkey)
        return {self._neurons[to][0]: weight for to, weight in self.get("Weights", NETUID, uid)}

    def metagraph(self, netuid: int) -> bytes:
        """SCALE of Option<Metagraph>: None but for our subnet; all fields zero but for who is registered."""
        if netuid != NETUID:
            return b"\0"
        kind = self.runtime.runtime_api_map()["SubnetInfoRuntimeApi"]["get_metagraph"]["output"]
        graph = self.runtime.decode(kind, b"\1" + bytes(5000), False)
        graph["hotkeys"] = graph["coldkeys"] = [hotkey for hotkey, _ in self._neurons]
        graph["validator_permit"] = [permit for _, permit in self._neurons]
        graph["total_stake"] = [self.stakes.get(hotkey, 0) for hotkey, _ in self._neurons]
        graph["last_update"] = self.get("LastUpdate", NETUID)
        graph["block"] = self.head.number
        return bytes(self.runtime.encode(kind, graph))

    # ---- The pool ---------------------------------------------------------------------------------------------------

    def submit(self, data: bytes) -> Extrinsic:
        """Take an extrinsic into the pool. Raises PoolError as Substrate does: a bad signature, a stale nonce."""
        extrinsic = self._decode(data)
        expected = self.next_nonce(extrinsic.signer)
        if extrinsic.nonce < expected:
            raise PoolError(1010, "Invalid Transaction", "Transaction is outdated")
        if any(waiting.hash == extrinsic.hash for waiting in self.pool):
            raise PoolError(1013, "Transaction is already imported", "already imported")
        self.pool.append(extrinsic)
        return extrinsic

    def next_nonce(self, address: str) -> int:
        return self.nonces.get(address, 0) + sum(extrinsic.signer == address for extrinsic in self.pool)

    def _decode(self, data: bytes) -> Extrinsic:
        found = self.runtime.decode_extrinsic(data, True)
        ((scheme, signature),) = found["signature"].items()
        # Compact length, version, address with its tag, signature with its tag, then the extensions' own bytes; the
        # call is what is left. What was signed is the call, those bytes and what they imply.
        size = {0: 1, 1: 2, 2: 4}[data[0] & 3]
        at = size + 1 + 33 + 65
        mortal, born, valid_until = self._era(data[at : at + 2])
        era = {"period": 64, "current": 0} if mortal else "00"
        extra, additional = self.runtime.signature_payload_parts(
            era=era,
            nonce=found["nonce"],
            tip=found["tip"],
            tip_asset_id=None,
            genesis_hash=bytes.fromhex(hash_of(0)[2:]),
            era_block_hash=bytes.fromhex(born[2:]),
            metadata_hash=None,
        )
        end = at + len(bytes(extra))
        payload = data[end:] + data[at:end] + bytes(additional)
        payload = payload if len(payload) <= 256 else hashlib.blake2b(payload, digest_size=32).digest()
        kind = {"Ed25519": bittensor_core.CRYPTO_ED25519, "Sr25519": bittensor_core.CRYPTO_SR25519}[scheme]
        if not bittensor_core.verify(payload, bytes.fromhex(signature[2:]), found["address"], kind):
            raise PoolError(1010, "Invalid Transaction", "Transaction has a bad signature")
        if self.head.number >= valid_until:
            raise PoolError(1010, "Invalid Transaction", "Transaction is outdated")
        call = found["call"]
        assert call["call_module"] in (_PALLET, "Commitments")
        arguments = {argument["name"]: argument["value"] for argument in call["call_args"]}
        return Extrinsic(
            data,
            found["extrinsic_hash"],
            found["address"],
            found["nonce"],
            valid_until,
            call["call_function"],
            arguments,
        )

    def _era(self, raw: bytes) -> tuple[bool, str, float]:
        """Whether an era is mortal, the hash of the block it is born at, and the last block it lives at."""
        if raw[0] == 0:
            return False, hash_of(0), float("inf")
        encoded = int.from_bytes(raw, "little")
        period = 2 << (encoded % 16)
        phase = (encoded >> 4) * max(period >> 12, 1)
        born = (max(self.head.number, phase) - phase) // period * period + phase
        return True, self.hash_at(born), born + period - 1

    # ---- Blocks -----------------------------------------------------------------------------------------------------

    def hash_at(self, number: int) -> str:
        """The hash of a block of the chain that is in force; blocks that were never mined one by one have one too."""
        known = [block.hash for block in self.blocks.values() if block.number == number]
        return known[-1] if known else hash_of(number)

    def reorganise(self, depth: int) -> None:
        """Another fork wins: the newest blocks, none of them final, are gone, and their extrinsics wait again."""
        for _ in range(depth):
            gone = self.head
            if gone.parent is None or gone.number <= self.finalized:
                break
            del self.blocks[gone.hash]
            self.head = gone.parent
            self.storage, self.nonces = dict(self.head.storage), dict(self.head.nonces)
            self.pool = [*gone.extrinsics, *self.pool]
        self.included = [one for one in self.included if one[0] <= self.head.number]
        self.commits = [commit for commit in self.commits if commit.block <= self.head.number]
        self.fork += 1

    def mine(self, number: int) -> Block:
        """Make block `number` with everything in the pool that may go into it."""
        self.head.storage, self.head.nonces = dict(self.storage), dict(self.nonces)
        block = Block(number, hash_of(number, self.fork), parent=self.head)
        self.head = block
        self.blocks[block.hash] = block
        records = []
        self.pool = [waiting for waiting in self.pool if waiting.valid_until >= number]
        for extrinsic in [waiting for waiting in self.pool if waiting.nonce == self.nonces.get(waiting.signer, 0)]:
            self.pool.remove(extrinsic)
            self.nonces[extrinsic.signer] = extrinsic.nonce + 1
            error = self._apply(extrinsic)
            records.append(self._event(len(block.extrinsics), error))
            block.extrinsics.append(extrinsic)
            self.included.append((number, extrinsic, error))
        entry = self.runtime.storage_entry("System", "Events")
        block.events = bytes(self.runtime.encode(entry.value_type, records))
        return block

    def read(self, key: bytes, block: Block) -> bytes | None:
        """A value of the storage as it was after `block`."""
        if key == bytes(self.runtime.storage_key("System", "Events", [])):
            return block.events
        return (self.storage if block is self.head else block.storage).get(key)

    def keys(self, prefix: bytes, block: Block) -> list[bytes]:
        """The keys with this prefix in the storage as it was after `block`."""
        storage = self.storage if block is self.head else block.storage
        return sorted(key for key in storage if key.startswith(prefix))

    def _event(self, index: int, error: str | None) -> dict[str, Any]:
        info = {"weight": {"ref_time": 1, "proof_size": 1}, "class": "Normal", "pays_fee": "No"}
        if error is None:
            event: dict[str, Any] = {"ExtrinsicSuccess": {"dispatch_info": info}}
        else:
            module = {"index": self._error_index[0], "error": f"0x{self._error_index[1][error]:02x}000000"}
            event = {"ExtrinsicFailed": {"dispatch_error": {"Module": module}, "dispatch_info": info}}
        return {"phase": {"ApplyExtrinsic": index}, "event": {"System": event}, "topics": []}

    def _apply(self, extrinsic: Extrinsic) -> str | None:
        """Do what the call says; the name of the error when the pallet refuses it."""
        calls = {
            "set_mechanism_weights": self._set_weights,
            "commit_timelocked_mechanism_weights": self._commit_weights,
            "set_commitment": self._set_commitment,
            "serve_axon": self._serve_axon,
            "serve_axon_tls": self._serve_axon,
        }
        try:
            calls[extrinsic.call](extrinsic.signer, extrinsic.arguments)
        except Refused as refused:
            return str(refused)
        return None

    def _set_weights(self, signer: str, arguments: dict[str, Any]) -> None:
        if self.get("CommitRevealWeightsEnabled", NETUID):
            raise Refused("CommitRevealEnabled")
        uid = self._may_set(signer, arguments)
        if arguments["version_key"] < self.get("WeightsVersionKey", NETUID):
            raise Refused("IncorrectWeightVersionKey")
        to, weights = arguments["dests"], arguments["weights"]
        if len(to) != len(weights):
            raise Refused("WeightVecNotEqualSize")
        if len(set(to)) != len(to):
            raise Refused("DuplicateUids")
        if any(one >= len(self._neurons) for one in to):
            raise Refused("UidVecContainInvalidOne")
        if to != [uid]:
            if len(to) < self.get("MinAllowedWeights", NETUID):
                raise Refused("WeightVecLengthIsLow")
            if max(weights) * _U16 > self.get("MaxWeightsLimit", NETUID) * sum(weights):
                raise Refused("MaxWeightExceeded")
        # The pallet keeps weights scaled up so that the largest is u16's largest.
        scaled = [round(weight * _U16 / max(weights)) for weight in weights]
        self.set("Weights", NETUID, uid, value=list(zip(to, scaled, strict=True)))
        self._updated(uid)

    def _commit_weights(self, signer: str, arguments: dict[str, Any]) -> None:
        if not self.get("CommitRevealWeightsEnabled", NETUID):
            raise Refused("CommitRevealDisabled")
        uid = self._may_set(signer, arguments)
        self.commits.append(Commit(self.head.number, signer, arguments))
        self._updated(uid)

    def _set_commitment(self, signer: str, arguments: dict[str, Any]) -> None:
        entry = self.runtime.storage_entry("Commitments", "CommitmentOf")
        held = {"deposit": 0, "block": self.head.number, "info": arguments["info"]}
        key = bytes(self.runtime.storage_key("Commitments", "CommitmentOf", [arguments["netuid"], signer]))
        self.storage[key] = bytes(self.runtime.encode(entry.value_type, held))

    def _serve_axon(self, signer: str, arguments: dict[str, Any]) -> None:
        if self.get("Uids", arguments["netuid"], signer) is None:
            raise Refused("HotKeyNotRegisteredInNetwork")
        before = self.get("Axons", arguments["netuid"], signer)
        limit = self.get("ServingRateLimit", NETUID)
        if before is not None and before["block"] and self.head.number - before["block"] < limit:
            raise Refused("ServingRateLimitExceeded")
        fields = ("version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2")
        axon = {"block": self.head.number, **{name: arguments[name] for name in fields}}
        self.set("Axons", arguments["netuid"], signer, value=axon)
        if (certificate := arguments.get("certificate")) is not None:
            data = bytes.fromhex(certificate[2:])
            held = {"algorithm": data[0], "public_key": "0x" + data[1:].hex()}
            self.set("NeuronCertificates", arguments["netuid"], signer, value=held)

    def forget(self, item: str, *keys: Any) -> None:
        """Remove a value from the storage."""
        del self.storage[self.key(item, keys)]

    def _may_set(self, signer: str, arguments: dict[str, Any]) -> int:
        if (arguments["netuid"], arguments["mecid"]) != (NETUID, 0):
            raise Refused("SubnetNotExists")
        uid = self.get("Uids", NETUID, signer)
        if uid is None:
            raise Refused("HotKeyNotRegisteredInSubNet")
        last = self.get("LastUpdate", NETUID)[uid]
        if last and self.head.number - last < self.get("WeightsSetRateLimit", NETUID):
            raise Refused("SettingWeightsTooFast")
        if not self.get("ValidatorPermit", NETUID)[uid]:
            raise Refused("NeuronNoValidatorPermit")
        return int(uid)

    def _updated(self, uid: int) -> None:
        updates = list(self.get("LastUpdate", NETUID))
        updates[uid] = self.head.number
        self.set("LastUpdate", NETUID, value=updates)


def _errors(runtime: Any) -> tuple[int, dict[str, int]]:
    """The pallet's index, and the index of each of its errors by name."""
    (pallet,) = (pallet for pallet in runtime.metadata_ir()["pallets"] if pallet["name"] == _PALLET)
    return pallet["index"], {error["name"]: error["index"] for error in pallet["errors"]}


VERSION = {
    "specName": "node-subtensor",
    "specVersion": SPEC_VERSION,
    "transactionVersion": TRANSACTION_VERSION,
}
"""What `state_getRuntimeVersion` answers."""
