"""Who is calling: the token, the hotkey it is bound to, a signed-request proof, and the claim of X-Hotkey.

Three kinds of evidence name a hotkey, from the strongest to the weakest: the token is bound to it; the request carries
a `btauth/1` proof by it; the X-Hotkey header says so. The first two make an identity. The third is a claim that anyone
with the shared token can write; it is used where nothing depends on it (who asked for this slice), never for access.

`authenticate` runs on the head of every request that needs a token (401); `authorise` runs later, in its place in the
contract's order of checks (400 for a malformed X-Hotkey, then 403).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bzstream.api.tokens import Tokens
from bzstream.chain.keys import InvalidHotkey, decode_hotkey
from bzstream.chain.proofs import PROOF_HEADERS, InvalidProof, NonceCache, carries_proof, verify_request
from bzstream.config import AuthSettings
from bzstream.http import HttpError, Request

__all__ = ["Identity", "authenticate", "authorise", "claimed_hotkey"]

CHALLENGE = (("WWW-Authenticate", "Bearer"),)


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of a caller after its head was read, and, after `authorise`, what it claims."""

    bound: str | None = None
    proven: str | None = None
    proof_unsupported: bool = False
    claimed: str | None = None

    @property
    def hotkey(self) -> str | None:
        """The hotkey that the caller really holds, or None."""
        return self.bound or self.proven


def authenticate(request: Request, tokens: Tokens, node_hotkey: str | None, nonces: NonceCache) -> Identity:
    """The identity behind the request's head; sets `request.caller` to its hotkey, if it has one.

    Raises HttpError 401 for a missing or unknown token and for a proof that does not hold.
    """
    values = request.headers.all("authorization")
    if len(values) != 1:
        what = "is missing" if not values else "is repeated"
        raise HttpError(401, "unauthorized", f"the Authorization header {what}; send 'Bearer <token>'", CHALLENGE)
    scheme, _, token = values[0].partition(" ")
    known, bound = tokens.hotkey_of(token.strip(" \t")) if scheme.lower() == "bearer" else (False, None)
    if not known:
        raise HttpError(401, "unauthorized", "the token is not known here; send 'Bearer <token>'", CHALLENGE)
    proven, unsupported = None, False
    if carries_proof(lambda name: next(iter(request.headers.all(name)), None)):
        unsupported = node_hotkey is None
        proven = None if node_hotkey is None else _prove(request, node_hotkey, nonces)
    request.caller = bound or proven or request.caller
    return Identity(bound, proven, unsupported)


def _prove(request: Request, node_hotkey: str, nonces: NonceCache) -> str:
    """The hotkey that the proof proves. Raises HttpError 401."""
    try:
        if request.method not in ("GET", "HEAD"):
            raise InvalidProof("a signed-request proof authorises GET and HEAD only")
        if repeated := [name for name in PROOF_HEADERS if len(request.headers.all(name)) > 1]:
            raise InvalidProof(f"{repeated[0]} is repeated; sign the request once")
        return verify_request(request.headers.get, request.method, request.target, node_hotkey, nonces)
    except InvalidProof as error:
        raise HttpError(401, "invalid_proof", str(error), CHALLENGE) from None


def claimed_hotkey(request: Request) -> str | None:
    """What X-Hotkey says, or None without one. Raises HttpError 400 when it is repeated or no SS58 hotkey."""
    claims = request.headers.all("x-hotkey")
    if len(claims) > 1:
        raise HttpError(400, "invalid_hotkey", "X-Hotkey is repeated; send it once")
    if claims:
        try:
            decode_hotkey(claims[0])
        except InvalidHotkey as error:
            raise HttpError(400, "invalid_hotkey", f"X-Hotkey is not an SS58 hotkey: {error}") from None
    return claims[0] if claims else None


def authorise(request: Request, settings: AuthSettings, *, loopback: bool) -> Identity:
    """The caller's identity with its claim, after the checks that any endpoint with a token makes.

    Raises HttpError 400 when X-Hotkey is malformed or repeated; 403 when the node cannot check proofs, when a bound
    token came over a plain connection that is not loopback, and when the hotkeys named differ.
    """
    identity: Identity = request.context
    claimed = claimed_hotkey(request)
    if identity.bound and not (loopback or request.secure or settings.allow_plaintext_tokens):
        raise HttpError(
            403, "plaintext_token", "this token names a hotkey and must not cross a network in clear; use https"
        )
    if identity.proof_unsupported:
        raise HttpError(403, "proof_not_supported", "this node has no hotkey set, so it cannot check a signed request")
    named = {hotkey for hotkey in (identity.bound, identity.proven, claimed) if hotkey is not None}
    if len(named) > 1:
        raise HttpError(403, "hotkey_mismatch", "the token, the proof and X-Hotkey name different hotkeys")
    return replace(identity, claimed=claimed)
