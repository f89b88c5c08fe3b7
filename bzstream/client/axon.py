"""Finds a validator by its hotkey: asks a node of the chain which address (*axon*) it lists. Blocking; any thread.

Only two values of the chain's storage are read, so this needs no Bittensor SDK: their keys and their layout are fixed
by Subtensor's pallet, and `websockets` carries the JSON-RPC. What is found becomes a URL that `parse_address` takes:
always https, because a token goes to such an address only over TLS, with the pin of the TLS key when the validator
announced one. Everything hangs on the node's word, so that it must be asked over TLS itself (wss), or on loopback.
"""

from __future__ import annotations

import hashlib
import ipaddress
import struct
import time
from urllib.parse import urlsplit

import msgspec

from bzstream.chain.keys import InvalidHotkey, decode_hotkey
from bzstream.client.errors import AxonNotFound, UsageError
from bzstream.util.key_pin import PIN_ALGORITHM

__all__ = ["find_axon"]

TIMEOUT_S = 20.0
"""Longest wait for the node, all together."""
MAX_MESSAGE = 64 * 1024
"""Bytes of one message of the node; the longest that is expected has 300."""

_AXONS = bytes.fromhex("658faa385070e074c85bf6b568cf0555b4e0c7b1d5f74994fcd58c28ab601fec")
_CERTIFICATES = bytes.fromhex("658faa385070e074c85bf6b568cf0555805f1c4b7f54d8f4208070bfc777e2db")
"""twox128 of the pallet's name (SubtensorModule) and of the item's (Axons, NeuronCertificates)."""
_AXON = struct.Struct("<QI16sHBBBB")
"""SCALE of AxonInfo: block, version, ip (u128), port, ip type (4 or 6), protocol, two placeholders."""


class _Reply(msgspec.Struct):
    result: str | None = None
    error: msgspec.Raw | None = None
    id: int | None = None


def find_axon(network: str, netuid: int, hotkey: str) -> str:
    """The URL of the validator `hotkey` on subnet `netuid`, by the node at `network` (wss://…).

    Raises UsageError for wrong arguments and AxonNotFound.
    """
    local = _check_network(network)
    try:
        account = decode_hotkey(hotkey)
    except InvalidHotkey as error:
        raise UsageError(f"{hotkey!r:.80} is not a hotkey: {error}") from None
    # Identity of the netuid (u16), Blake2_128Concat of the account.
    place = struct.pack("<H", netuid) + hashlib.blake2b(account, digest_size=16).digest() + account
    axon, certificate = _read(network, [_AXONS + place, _CERTIFICATES + place])
    if axon is None or len(axon) < _AXON.size:
        raise AxonNotFound(f"the chain lists no address for {hotkey} on subnet {netuid}; ask the validator for its URL")
    _, _, number, port, kind, *_ = _AXON.unpack_from(axon)
    value = int.from_bytes(number, "little")
    try:
        ip = ipaddress.IPv6Address(value) if kind == 6 else ipaddress.IPv4Address(value)
    except ValueError:
        raise AxonNotFound(f"what the chain lists for {hotkey} is no address") from None
    if not port or not (ip.is_global or local):
        raise AxonNotFound(f"the chain lists {ip}, port {port}, for {hotkey}, which is no public address")
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    return f"https://{host}:{port}" + _fragment(certificate)


def _check_network(network: str) -> bool:
    """Whether the node is on loopback. Raises UsageError when what it says could be changed on the way."""
    try:
        parts = urlsplit(network)
        host = parts.hostname or ""
    except ValueError:
        raise UsageError(f"{network!r:.200} is not a URL") from None
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not host or not (parts.scheme == "wss" or (parts.scheme == "ws" and local)):
        raise UsageError(
            f"{network!r:.200} cannot be used to find a validator; give a wss:// URL, so that nobody on the way can"
            " name another address (ws:// on loopback only)"
        )
    return local


def _fragment(certificate: bytes | None) -> str:
    """The pin in what the chain lists: SCALE of NeuronCertificate, a vector of bytes and the algorithm."""
    if certificate is None or len(certificate) != 34 or certificate[0] != 32 << 2 or certificate[33] != PIN_ALGORITHM:
        return ""
    return f"#pin-sha256={certificate[1:33].hex()}"


def _read(network: str, keys: list[bytes]) -> list[bytes | None]:
    """The values of storage keys in the newest final block. Raises AxonNotFound."""
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    deadline = time.monotonic() + TIMEOUT_S
    try:
        with connect(
            network, open_timeout=TIMEOUT_S, close_timeout=1, max_size=MAX_MESSAGE, compression=None
        ) as socket:

            def ask(method: str, *params: str) -> str | None:
                socket.send(
                    msgspec.json.encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}), text=True
                )
                reply = msgspec.json.decode(socket.recv(max(0.0, deadline - time.monotonic())), type=_Reply)
                if reply.error is not None or reply.id != 1:
                    raise AxonNotFound(f"the node at {network} does not answer {method}; try another node")
                return reply.result

            final = ask("chain_getFinalizedHead") or ""
            found = [ask("state_getStorage", "0x" + key.hex(), final) for key in keys]
            return [None if value is None else bytes.fromhex(value.removeprefix("0x")) for value in found]
    except (WebSocketException, OSError) as error:  # TimeoutError too
        reason = str(error) or type(error).__name__
        raise AxonNotFound(f"the chain's node at {network} cannot be asked: {reason:.200}") from None
    except (msgspec.MsgspecError, ValueError):
        raise AxonNotFound(f"the chain's node at {network} gives answers that are none; try another node") from None
