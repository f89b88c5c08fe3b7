"""SS58: the text form of a public key, with a checksum and the network that it is meant for.

    address = base58(prefix || public key || first 2 bytes of BLAKE2b-512("SS58PRE" || prefix || public key))
(Substrate's SS58 registry, "Address Type" and "Checksum".) bittensor_core decodes the addresses of every network. An
address written for another network would be a second name of the same key, and one miner could be two. So an address
is accepted only when the key that it decodes to is encoded as the very same text with Bittensor's prefix, 42.
"""

from __future__ import annotations

import bittensor_core

from bzstream.errors import BzstreamError

__all__ = ["SS58_PREFIX", "InvalidHotkey", "decode_hotkey", "encode_hotkey", "is_hotkey"]

SS58_PREFIX = 42
"""Bittensor's network, which is also Substrate's generic one (SS58 registry)."""

_TEXT_LENGTH = 48
"""35 bytes (prefix, key, checksum) that start with 42 are a number between 58^47 and 58^48: 48 base58 digits."""


class InvalidHotkey(BzstreamError):
    """The text is not the SS58 address of a Bittensor hotkey; the sentence says what is wrong with it."""


def decode_hotkey(address: str) -> bytes:
    """The 32 bytes of the public key that `address` names. Raises InvalidHotkey."""
    if len(address) != _TEXT_LENGTH:  # first, because it bounds the work that a hostile text can cause
        raise InvalidHotkey(f"a hotkey is an SS58 address of {_TEXT_LENGTH} characters; this one has {len(address)}")
    try:
        public_key = bytes(bittensor_core.ss58_decode(address))
    except ValueError:
        raise InvalidHotkey("the hotkey is not an SS58 address with a good checksum; copy it again") from None
    if len(public_key) != 32 or bittensor_core.ss58_encode(public_key, SS58_PREFIX) != address:
        raise InvalidHotkey(f"the hotkey is not a Bittensor address (SS58 prefix {SS58_PREFIX})")
    return public_key


def encode_hotkey(public_key: bytes) -> str:
    """The SS58 address of a 32-byte public key with Bittensor's prefix."""
    assert len(public_key) == 32, "a public key has 32 bytes"
    return str(bittensor_core.ss58_encode(public_key, SS58_PREFIX))


def is_hotkey(address: object) -> bool:
    """Whether `address` is the text of a Bittensor hotkey."""
    if not isinstance(address, str):
        return False
    try:
        decode_hotkey(address)
    except InvalidHotkey:
        return False
    return True
