"""Signed requests: the Bittensor SDK's `btauth/1` headers, made and checked without the SDK.

A caller proves "hotkey X asks hotkey Y for exactly this, now" with six headers and a signature over
    btauth/1 \\n scheme \\n METHOD \\n target \\n sha256(body) hex \\n nonce \\n sender \\n receiver
The target is the path with its query as sent, the nonce is the time in nanoseconds (bittensor 11.3,
bittensor/http_auth.py: `build_payload`). A proof is accepted once, within 10 s, and 2 s early for clocks that differ.

The cache of seen nonces is bounded and still never lets a replay through: when it has to forget a nonce, it refuses
every nonce up to that one from then on. Under a flood of proofs the window gets shorter for every caller.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bzstream.chain.keys import Key
from bzstream.chain.signatures import SCHEMES, Scheme, verify
from bzstream.chain.ss58 import is_hotkey
from bzstream.errors import BzstreamError

__all__ = ["PROOF_HEADERS", "InvalidProof", "NonceCache", "Proof", "carries_proof", "sign_request", "verify_request"]

_VERSION = "X-Bittensor-Version"
_HOTKEY = "X-Bittensor-Hotkey"
_RECEIVER = "X-Bittensor-Receiver"
_NONCE = "X-Bittensor-Nonce"
_CRYPTO = "X-Bittensor-Crypto"
_SIGNATURE = "X-Bittensor-Signature"
PROOF_HEADERS = (_VERSION, _HOTKEY, _RECEIVER, _NONCE, _CRYPTO, _SIGNATURE)
"""Names of the headers; a request that carries any of them carries a proof."""

MAX_AGE_S = 10.0
ALLOWED_SKEW_S = 2.0
"""The SDK's own window: DEFAULT_MAX_AGE and DEFAULT_ALLOWED_SKEW."""

_DEFAULT_SCHEME: Scheme = "sr25519"  # what an absent X-Bittensor-Crypto means
_NONCE_FORM = re.compile(r"0|[1-9][0-9]{0,19}", re.ASCII)
_SIGNATURE_FORM = re.compile(r"(?:0x)?([0-9a-fA-F]{128})", re.ASCII)


class InvalidProof(BzstreamError):
    """A signed-request proof is present and not good; the sentence is safe to show to the caller."""


class Proof(NamedTuple):
    """A proof that is good, and was not used before."""

    hotkey: str
    """SS58 address of the hotkey that made the request."""
    nonce: int
    """Nanoseconds since the epoch."""
    oldest: int
    """Nonces below this were stale when the proof was verified."""


class NonceCache:
    """The (hotkey, nonce) pairs accepted within the window, at most `capacity` of them.

    One thread uses it. 262,144 pairs are 12 s of 20,000 proofs a second, more than one core can verify.
    """

    def __init__(self, capacity: int = 262_144) -> None:
        self._capacity = capacity
        self._seen: set[tuple[int, str]] = set()
        self._oldest: list[tuple[int, str]] = []
        self._floor = -1
        """Largest nonce ever forgotten: at or below it a replay cannot be told from a first use."""

    def __len__(self) -> int:
        return len(self._seen)

    def is_used(self, hotkey: str, nonce: int) -> bool:
        """Whether `nonce` of `hotkey` was, or may have been, used before."""
        return nonce <= self._floor or (nonce, hotkey) in self._seen

    def use(self, proof: Proof) -> bool:
        """Count the proof's nonce as used; False if it was, or may have been, before."""
        while self._oldest and self._oldest[0][0] < proof.oldest:
            self._forget()
        if self.is_used(proof.hotkey, proof.nonce):
            return False
        if len(self._seen) >= self._capacity:
            self._forget()
            if proof.nonce <= self._floor:
                return False
        entry = (proof.nonce, proof.hotkey)
        self._seen.add(entry)
        heapq.heappush(self._oldest, entry)
        return True

    def _forget(self) -> None:
        entry = heapq.heappop(self._oldest)
        self._seen.discard(entry)
        self._floor = max(self._floor, entry[0])


def carries_proof(header: Callable[[str], str | None]) -> bool:
    """Whether a request carries a proof, good or not. `header(name)` gives a header's value or None."""
    return any(header(name) is not None for name in PROOF_HEADERS)


def sign_request(
    key: Key, method: str, target: str, receiver: str, *, body: bytes = b"", nonce: int | None = None
) -> dict[str, str]:
    """The headers that prove one request; make them afresh for each, retries and ranges too.

    `target`: path and query exactly as sent. `receiver`: SS58 hotkey of the node. `nonce`: nanoseconds since the epoch.
    """
    moment = time.time_ns() if nonce is None else nonce
    signature = key.sign(_payload(key.scheme, method, target, body, moment, key.ss58_address, receiver))
    headers = {
        _VERSION: "1",
        _HOTKEY: key.ss58_address,
        _RECEIVER: receiver,
        _NONCE: str(moment),
        _SIGNATURE: "0x" + signature.hex(),
    }
    if key.scheme != _DEFAULT_SCHEME:
        headers[_CRYPTO] = key.scheme
    return headers


def verify_request(
    header: Callable[[str], str | None],
    method: str,
    target: str,
    receiver: str,
    nonces: NonceCache,
    *,
    body: bytes = b"",
    now: float | None = None,
    schemes: Sequence[Scheme] = SCHEMES,
) -> Proof:
    """The proof of a request, when it is good and was not used before. Raises InvalidProof.

    `header(name)`: a header's value or None; a header sent twice must not come this far. `now`: seconds since the
    epoch. The proof is not used up yet: `nonces.use(proof)` does that, when the request is about to be answered.
    """
    if header(_VERSION) != "1":
        raise InvalidProof(f"{_VERSION} is missing or not 1; sign the request with btauth/1")
    sender = header(_HOTKEY)
    if not is_hotkey(sender) or sender is None:
        raise InvalidProof(f"{_HOTKEY} is missing or not a hotkey; send the SS58 address that signs")
    raw_nonce = header(_NONCE)
    if raw_nonce is None or not _NONCE_FORM.fullmatch(raw_nonce):
        raise InvalidProof(f"{_NONCE} is missing or not a decimal number; send the time in nanoseconds")
    scheme = next((known for known in SCHEMES if known == (header(_CRYPTO) or _DEFAULT_SCHEME)), None)
    if scheme is None or scheme not in schemes:
        raise InvalidProof(f"{_CRYPTO} names no accepted scheme; use one of {', '.join(schemes)}")
    raw_signature = header(_SIGNATURE)
    form = _SIGNATURE_FORM.fullmatch(raw_signature or "")
    if form is None:
        raise InvalidProof(f"{_SIGNATURE} is missing or not 64 bytes in hex")
    if header(_RECEIVER) != receiver:
        raise InvalidProof(f"{_RECEIVER} does not name this node; sign the request for its hotkey")
    nonce = int(raw_nonce)
    moment = time.time_ns() if now is None else int(now * 1e9)
    oldest = moment - int(MAX_AGE_S * 1e9)
    if nonce < oldest:
        raise InvalidProof(f"the proof is older than {MAX_AGE_S:g} s; sign each request afresh and check the clock")
    if nonce > moment + int(ALLOWED_SKEW_S * 1e9):
        raise InvalidProof(f"the proof is more than {ALLOWED_SKEW_S:g} s in the future; check the clock")
    message = _payload(scheme, method, target, body, nonce, sender, receiver)
    if not verify(sender, message, bytes.fromhex(form[1]), (scheme,)):
        raise InvalidProof("the proof's signature is not by its hotkey over this request")
    if nonces.is_used(sender, nonce):
        raise InvalidProof("the proof was used before; sign each request afresh")
    return Proof(sender, nonce, oldest)


def _payload(scheme: str, method: str, target: str, body: bytes, nonce: int, sender: str, receiver: str) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    lines = ("btauth/1", scheme, method.upper(), target, digest, str(nonce), sender, receiver)
    return "\n".join(lines).encode("utf-8", "surrogateescape")
