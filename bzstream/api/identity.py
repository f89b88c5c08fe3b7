"""Who is calling: the token, the hotkey it is bound to, a signed-request proof, and the claim of X-Hotkey.

Three kinds of evidence name a hotkey, from the strongest to the weakest: the token is bound to it; the request carries
a `btauth/1` proof by it; the X-Hotkey header says so. The first two make an identity. The third is a claim that anyone
with the shared token can write. It is used where nothing depends on it (who asked for this slice), never for access.

`authenticate` runs on the head of every request that needs a token (401). `authorise` runs later, in its place in the
contract's order of checks (400 for a malformed X-Hotkey, then 403). Both run on the worker's event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bzstream.api.state import WorkerState
from bzstream.chain.keys import InvalidHotkey, decode_hotkey
from bzstream.chain.proofs import PROOF_HEADERS, InvalidProof, Proof, carries_proof, verify_request
from bzstream.http import HttpError, Request

__all__ = ["Credentials", "authenticate", "authorise", "claimed_hotkey", "refuse_denied", "spend_proof"]

_CHALLENGE = (("WWW-Authenticate", "Bearer"),)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the head of a request says of its caller. `authorise` adds the claim."""

    bound: str | None = None
    proof: Proof | None = None
    proof_unsupported: bool = False
    claimed: str | None = None

    @property
    def proven(self) -> str | None:
        return None if self.proof is None else self.proof.hotkey

    @property
    def hotkey(self) -> str | None:
        """The hotkey that the caller really holds, or None."""
        return self.bound or self.proven


def authenticate(request: Request, state: WorkerState) -> Credentials:
    """The credentials in the request's head; sets `request.caller`, which limits and fairness count under.

    Raises HttpError 401 for a missing or unknown token and for a proof that does not hold.
    """
    values = request.headers.all("authorization")
    if len(values) != 1:
        what = "is missing" if not values else "is repeated"
        raise _unauthorized("unauthorized", f"the Authorization header {what}; send 'Bearer <token>'")
    scheme, _, token = values[0].partition(" ")
    known, bound = state.access.tokens.hotkey_of(token.strip(" \t")) if scheme.lower() == "bearer" else (False, None)
    if not known:
        raise _unauthorized("unauthorized", "the token is not known here; send 'Bearer <token>'")
    credentials = Credentials(bound)
    if carries_proof(lambda name: next(iter(request.headers.all(name)), None)):
        node = state.settings.node.hotkey
        credentials = Credentials(bound, None if node is None else _prove(request, node, state), node is None)
    # Anybody can make a key. One that the chain does not list gets no share and no connections of its own by it.
    proven = credentials.proven
    listed = proven is not None and state.chain is not None and state.chain.lists(proven)
    request.caller = bound or (proven if listed and proven else request.caller)
    return credentials


def _prove(request: Request, node_hotkey: str, state: WorkerState) -> Proof:
    """The request's proof, which was not used before. Raises HttpError 401."""
    try:
        if request.method not in ("GET", "HEAD"):
            raise InvalidProof("a signed-request proof authorises GET and HEAD only")
        if repeated := [name for name in PROOF_HEADERS if len(request.headers.all(name)) > 1]:
            raise InvalidProof(f"{repeated[0]} is repeated; sign the request once")
        return verify_request(request.headers.get, request.method, request.target, node_hotkey, state.nonces)
    except InvalidProof as error:
        raise _unauthorized("invalid_proof", str(error)) from None


def spend_proof(credentials: Credentials, state: WorkerState) -> None:
    """Count the proof as used, now that its request is answered. Raises HttpError 401 if another took it meanwhile."""
    if credentials.proof is not None and not state.nonces.use(credentials.proof):
        raise _unauthorized("invalid_proof", "the proof was used before; sign each request afresh")


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


def refuse_denied(request: Request, state: WorkerState, *hotkeys: str | None) -> None:
    """Raises HttpError 403 when the deny list holds one of the hotkeys, the request's own, or one of its addresses."""
    credentials: Credentials = request.context
    deny = state.access.deny
    if deny.has_hotkey(credentials.bound, credentials.proven, *hotkeys) or deny.has_address(
        request.peer, request.address
    ):
        raise HttpError(403, "denied", "this node's operator has denied you access")


def authorise(request: Request, state: WorkerState) -> Credentials:
    """The caller's credentials with its claim, after the checks that every endpoint with a token makes.

    Raises HttpError 400 when X-Hotkey is malformed or repeated; 403 when the caller is denied, when the node cannot
    check proofs, when a bound token came over a plain connection that is not loopback, and when hotkeys differ.
    """
    credentials: Credentials = request.context
    claimed = claimed_hotkey(request)
    refuse_denied(request, state, claimed)
    if credentials.bound and not (state.loopback or request.secure or state.settings.auth.allow_plaintext_tokens):
        raise HttpError(
            403, "plaintext_token", "this token names a hotkey and must not cross a network in clear; use https"
        )
    if credentials.proof_unsupported:
        raise HttpError(403, "proof_not_supported", "this node has no hotkey set, so it cannot check a signed request")
    if len({credentials.bound, credentials.proven, claimed} - {None}) > 1:
        raise HttpError(403, "hotkey_mismatch", "the token, the proof and X-Hotkey name different hotkeys")
    return replace(credentials, claimed=claimed)


def _unauthorized(code: str, detail: str) -> HttpError:
    return HttpError(401, code, detail, _CHALLENGE)
