"""SS58: the text form of a public key, with a checksum and the network that it is meant for.

    address = base58(prefix || public key || checksum)
    prefix: 1 byte (0-63) or 2 bytes; Bittensor's is the single byte 42
    checksum: the first 2 bytes of BLAKE2b-512("SS58PRE" || prefix || public key)
(Substrate's SS58 registry, "Address Type" and "Checksum".) bittensor_core decodes every network's prefix; a hotkey
written for another network would then be a second name of the same key, and one miner could be two. Here an address
has one spelling: prefix 42, 32 bytes, no leading ones, the checksum exact.
"""

from __future__ import annotations

import hashlib

from bzstream.errors import BzstreamError

__all__ = ["SS58_PREFIX", "InvalidHotkey", "decode_hotkey", "encode_hotkey", "is_hotkey"]

SS58_PREFIX = 42
"""Bittensor's network, which is also Substrate's generic one (SS58 registry)."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {sign: value for value, sign in enumerate(_ALPHABET)}
_LENGTH = 35  # 1 byte prefix, 32 bytes key, 2 bytes checksum
_TEXT_LENGTH = 48
"""A 35-byte number that starts with 42 lies between 58^47 and 58^48, so that its base58 form has 48 digits."""


class InvalidHotkey(BzstreamError):
    """The text is not the SS58 address of a Bittensor hotkey; the sentence says what is wrong with it."""


def decode_hotkey(address: str) -> bytes:
    """The 32 bytes of the public key that `address` names. Raises InvalidHotkey."""
    # The length first: it bounds the work that a hostile text can cause.
    if len(address) != _TEXT_LENGTH:
        raise InvalidHotkey(f"a hotkey is an SS58 address of {_TEXT_LENGTH} characters; this one has {len(address)}")
    number = 0
    for sign in address:
        digit = _DIGITS.get(sign)
        if digit is None:
            raise InvalidHotkey("a hotkey is an SS58 address in base58; this one has another character in it")
        number = number * 58 + digit
    # 48 base58 digits can hold a little more than 35 bytes.
    if number.bit_length() > 8 * _LENGTH:
        raise InvalidHotkey("the hotkey does not decode to 35 bytes; copy the SS58 address again")
    raw = number.to_bytes(_LENGTH, "big")
    if raw[0] != SS58_PREFIX:
        raise InvalidHotkey(f"the hotkey is not a Bittensor address (SS58 prefix {SS58_PREFIX})")
    if _checksum(raw[:-2]) != raw[-2:]:
        raise InvalidHotkey("the hotkey's checksum is wrong; copy the SS58 address again")
    return raw[1:-2]


def encode_hotkey(public_key: bytes) -> str:
    """The SS58 address of a 32-byte public key with Bittensor's prefix."""
    assert len(public_key) == 32, "a public key has 32 bytes"
    body = bytes([SS58_PREFIX]) + public_key
    number = int.from_bytes(body + _checksum(body), "big")
    signs = []
    while number:
        number, digit = divmod(number, 58)
        signs.append(_ALPHABET[digit])
    return "".join(reversed(signs))


def is_hotkey(address: object) -> bool:
    """Whether `address` is the text of a Bittensor hotkey."""
    if not isinstance(address, str):
        return False
    try:
        decode_hotkey(address)
    except InvalidHotkey:
        return False
    return True


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(b"SS58PRE" + body, digest_size=64).digest()[:2]
