"""`verify` decides whether a signature is good: for submissions, signed requests and manifests. Pure; any thread.

A hotkey's address does not say which scheme its key belongs to, so every scheme that the caller allows is tried.
- ed25519 goes through PyNaCl: libsodium refuses small-order and non-canonical keys, small-order R and S >= L.
  bittensor_core verifies ed25519 too, but accepts forgeries for small-order keys.
- sr25519 goes through bittensor_core (schnorrkel). It accepts a forgery for the all-zero key, which is the neutral
  element of the group, so that key is refused before. It also takes a signature over `<Bytes>message</Bytes>`, as
  browser wallets make them, for one over the message; here the signed bytes are the message and nothing else.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Literal

import bittensor_core
import nacl.exceptions
import nacl.signing

from bzstream.chain.ss58 import InvalidHotkey, decode_hotkey
from bzstream.errors import BzstreamError

__all__ = ["SCHEMES", "InvalidSignature", "Scheme", "decode_signature", "encode_signature", "verify"]

Scheme = Literal["ed25519", "sr25519"]
SCHEMES: tuple[Scheme, ...] = ("ed25519", "sr25519")
SIGNATURE_LENGTH = 64

# 64 bytes in the URL-safe alphabet of RFC 4648 section 5: 86 characters, then two of padding or none. The last
# character carries 4 unused bits that must be zero, which leaves it one of AQgw.
_SIGNATURE = re.compile(r"[A-Za-z0-9_-]{85}[AQgw](?:==)?", re.ASCII)


class InvalidSignature(BzstreamError):
    """A signature is not well formed, or it is not by the key over the message."""


def decode_signature(text: str) -> bytes:
    """The 64 bytes of a URL-safe base64 signature, padded or not, in its one canonical spelling.

    Raises InvalidSignature.
    """
    if not _SIGNATURE.fullmatch(text):
        raise InvalidSignature("a signature is the URL-safe base64 (RFC 4648 section 5) of exactly 64 bytes")
    return base64.urlsafe_b64decode(text[:86] + "==")


def encode_signature(signature: bytes) -> str:
    """URL-safe base64 with padding, which every decoder reads."""
    return base64.urlsafe_b64encode(signature).decode("ascii")


def verify(hotkey: str, message: bytes, signature: bytes, schemes: Sequence[Scheme] = SCHEMES) -> bool:
    """Whether `signature` is by `hotkey` (SS58) over exactly `message`, in one of `schemes`. Never raises."""
    try:
        public_key = decode_hotkey(hotkey)
    except InvalidHotkey:
        return False
    if len(signature) != SIGNATURE_LENGTH or not any(public_key):
        return False
    return any(_BY_SCHEME[scheme](hotkey, public_key, message, signature) for scheme in schemes)


def _ed25519(_hotkey: str, public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        nacl.signing.VerifyKey(public_key).verify(message, signature)
    except nacl.exceptions.BadSignatureError:
        return False
    return True


def _sr25519(hotkey: str, _public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        return _core(hotkey, message, signature) and not _core(hotkey, b"<Bytes>" + message + b"</Bytes>", signature)
    except ValueError:  # 32 bytes that are no point of the group
        return False


def _core(hotkey: str, message: bytes, signature: bytes) -> bool:
    return bool(bittensor_core.verify(message, signature, hotkey, bittensor_core.CRYPTO_SR25519))


_BY_SCHEME = {"ed25519": _ed25519, "sr25519": _sr25519}
