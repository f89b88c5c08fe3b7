"""What every call of the client's API begins with: arguments checked, a session opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from bzstream.chain.keys import InvalidHotkey, Key, decode_hotkey, load_key
from bzstream.client.address import VERSION_FORM, UnitRef, parse_address
from bzstream.client.credentials import Credentials
from bzstream.client.errors import TransientError, UsageError
from bzstream.client.session import Session
from bzstream.client.tuning import Tuning

__all__ = ["Options", "choose_receiver", "open_session", "unit_refs"]

MAX_GROUP = 999_999_999


@dataclass(frozen=True, slots=True)
class Options:
    """Who asks, for which version, how."""

    hotkey: str | None = None
    key: str | Key | None = None
    token: str | None = None
    validator_hotkey: str | None = None
    """Who must have signed the manifests."""
    receiver: str | None = None
    """Whom proofs name; default: `validator_hotkey`, else what the node says of itself."""
    version: str | None = None
    ca_file: str | None = None
    connections: int | None = None


def unit_refs(groups: Iterable[int], *, shared: bool, full: bool) -> list[UnitRef]:
    """The units of a call, each once. Raises UsageError."""
    units: list[UnitRef] = []
    for group in dict.fromkeys(groups):
        if not 0 <= group <= MAX_GROUP:
            raise UsageError(f"{group} is not the number of a group")
        units.append(UnitRef("partial", group))
    if shared:
        units.append(UnitRef("shared"))
    if full:
        units.append(UnitRef("full"))
    if not units:
        raise UsageError("nothing to fetch: ask for a group, the shared tensors or the full model")
    return units


def open_session(
    url: str | Sequence[str],
    options: Options,
    tuning: Tuning,
    notify: Callable[[str], None] | None = None,
    *,
    claim_needed: bool,
) -> Session:
    """A session for the validators at `url`. `claim_needed`: whether a hotkey has to be named.

    Raises UsageError, BadUrl, and KeyUnavailable when `options.key` cannot be loaded.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise UsageError("give the URL of a validator")
    addresses = list(dict.fromkeys(map(parse_address, urls)))
    if options.hotkey is not None and options.key is not None:
        raise UsageError("give a hotkey to claim or a key that proves it, not both")
    if claim_needed and options.hotkey is None and options.key is None:
        raise UsageError("a group's slice and the shared tensors need to know who asks: give your hotkey or your key")
    for hotkey in (options.hotkey, options.validator_hotkey, options.receiver):
        if hotkey is not None:
            try:
                decode_hotkey(hotkey)
            except InvalidHotkey as error:
                raise UsageError(f"{hotkey!r:.80} is not a hotkey: {error}") from None
    if options.version is not None and not VERSION_FORM.fullmatch(options.version):
        raise UsageError(f"{options.version!r:.80} is not a model version")
    if options.connections is not None and not 1 <= options.connections <= 1024:
        raise UsageError("connections: from 1 to 1024")
    token = options.token if options.token is not None else os.environ.get("BZ_AUTH_TOKEN") or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("the token has characters that no token can have; check BZ_AUTH_TOKEN")
    key = load_key(options.key) if isinstance(options.key, str) else options.key
    credentials = Credentials(token, options.hotkey, key, options.receiver or options.validator_hotkey)
    return Session(addresses, credentials, tuning, ca_file=options.ca_file, notify=notify)


class _NodeInfo(msgspec.Struct):
    """Of `GET /model`, what says whose node it is."""

    validator_hotkey: str | None = None


def choose_receiver(session: Session) -> None:
    """With a key but no receiver: take each node's own word (`GET /model`) for whom its proofs are.

    A node that lies about it could pass a proof on to the node that it names, so that the caller is told; whoever knows
    the validator's hotkey gives it. Raises UsageError when the only node does not say, and what the request raises.
    """
    credentials = session.credentials
    if credentials.key is None or credentials.receiver is not None:
        return
    for mirror in session.mirrors:
        try:
            _, data = session.request_with_retries(
                "GET", "/model", patience_s=session.tuning.first_patience_s, mirror=mirror
            )
        except TransientError as error:
            if len(session.mirrors) == 1:
                raise
            mirror.dropped = error
            continue
        try:
            mirror.receiver = msgspec.json.decode(data, type=_NodeInfo).validator_hotkey
            decode_hotkey(mirror.receiver or "")
        except (msgspec.MsgspecError, UnicodeDecodeError, InvalidHotkey):
            raise UsageError(
                f"{mirror.address} does not say whose node it is, which proofs must name; give its hotkey as receiver"
            ) from None
        session.notify(f"proofs are made for {mirror.receiver}, as {mirror.address} says; --receiver makes sure")
