"""Bearer tokens: those that the subnet shares, and those that are each bound to a hotkey.

A presented token is never compared with a stored one. Both are run through a keyed hash whose key lives and dies with
the process, and the digests are compared in constant time, so that no timing tells how much of a guess was right.
Pure but for the files that it reads; any thread.

Two files, both readable by their owner alone:
    auth.shared_tokens_file     one shared token a line; empty lines and lines that begin with # are skipped
    auth.tokens_file            TOML, "<token>" = "<ss58 hotkey>"
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from bzstream.chain.keys import InvalidHotkey, decode_hotkey
from bzstream.errors import BzstreamError
from bzstream.util.files import read_small_file

__all__ = ["TokenError", "Tokens", "check_shared_token", "lines_of", "read_bound_tokens", "read_shared_tokens"]

MIN_SHARED_TOKEN = 32
"""Characters; the contract. 32 hex digits are 128 bits."""

MAX_FILE = 4 * 1024 * 1024
"""Bytes of a file of tokens or denied callers. Room for about 30,000 bound tokens."""


class TokenError(BzstreamError):
    """A token or a file of tokens cannot be used; the text never holds a token."""


class Tokens:
    """Whom a token stands for. Immutable; a changed file makes a new one."""

    def __init__(self, shared: Iterable[str], bound: Mapping[str, str]) -> None:
        """`bound`: token -> hotkey. Raises TokenError when a token is shared and bound."""
        self._key = os.urandom(32)
        self._shared = [self._digest(token) for token in shared]
        self._bound = {self._digest(token): hotkey for token, hotkey in bound.items()}
        for digest in self._shared:
            if (hotkey := self._bound.get(digest)) is not None:
                raise TokenError(f"the tokens file binds a shared token to {hotkey}; give that hotkey one of its own")

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode("utf-8", "surrogateescape"), key=self._key, digest_size=32).digest()

    def hotkey_of(self, token: str) -> tuple[bool, str | None]:
        """(whether the token is known, the hotkey that it is bound to)."""
        digest = self._digest(token)
        # Every shared token is compared, whichever matches: the time tells nothing of their order.
        if sum(hmac.compare_digest(digest, shared) for shared in self._shared):
            return True, None
        # The table is looked up by a keyed digest: what a guess can learn from its timing is about the digest alone.
        hotkey = self._bound.get(digest)
        return hotkey is not None, hotkey


def check_shared_token(token: str | None, place: str = "BZ_AUTH_TOKEN") -> str:
    """The token, if it may be a shared one. `place`: where it was given. Raises TokenError."""
    if not token:
        raise TokenError(f"no shared token is set; put at least {MIN_SHARED_TOKEN} characters into {place}")
    if len(token) < MIN_SHARED_TOKEN:
        raise TokenError(f"a shared token in {place} has {len(token)} characters; it needs {MIN_SHARED_TOKEN} or more")
    if not _is_sendable(token):
        raise TokenError(
            f"a shared token in {place} holds characters that a Bearer header cannot carry; use visible ASCII"
        )
    return token


def read_shared_tokens(path: Path) -> tuple[str, ...]:
    """The shared tokens of `auth.shared_tokens_file`, one at the least. Raises TokenError."""
    tokens = lines_of(_read_secret(path, "shared tokens file"))
    if not tokens:
        raise TokenError(f"the shared tokens file {path} holds no token; write one token a line")
    if len(set(tokens)) != len(tokens):
        raise TokenError(f"the shared tokens file {path} holds a token twice; remove one of the lines")
    return tuple(check_shared_token(token, f"the file {path}") for token in tokens)


def read_bound_tokens(path: Path) -> dict[str, str]:
    """Token -> hotkey, from `auth.tokens_file`. Raises TokenError, whose text names the line's hotkey but no token."""
    try:
        table = tomllib.loads(_read_secret(path, "tokens file"))
    except tomllib.TOMLDecodeError:
        # The decoder's own message can quote the line, and so a token.
        raise TokenError(
            f'the tokens file {path} is not valid TOML or names a token twice; each line is "<token>" = "<hotkey>"'
        ) from None
    for token, hotkey in table.items():
        if not isinstance(hotkey, str):
            raise TokenError(f'a line of the tokens file {path} is not of the form "<token>" = "<hotkey>"; quote both')
        try:
            decode_hotkey(hotkey)
        except InvalidHotkey as error:
            raise TokenError(
                f"the tokens file {path} binds a token to {hotkey!r}, which is no hotkey: {error}"
            ) from None
        if not _is_sendable(token):
            raise TokenError(f"the token of {hotkey} in {path} holds characters that a Bearer header cannot carry")
    return table


def lines_of(text: str) -> list[str]:
    """The lines that say something, without the white space around them."""
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def _read_secret(path: Path, name: str) -> str:
    """The text of a file that nobody but its owner may be able to read. Raises TokenError."""

    def is_private(status: os.stat_result) -> None:
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise TokenError(f"the {name} {path} has mode {mode:04o}; others could read it: chmod 0600 it")

    try:
        return read_small_file(path, MAX_FILE, check=is_private).decode("utf-8")
    except OSError as error:
        raise TokenError(f"the {name} {path} cannot be read: {error.strerror}; check its name and its rights") from None
    except UnicodeDecodeError:
        raise TokenError(f"the {name} {path} is not UTF-8 text; write it again") from None


def _is_sendable(token: str) -> bool:
    """Whether a Bearer header can carry the token: visible ASCII, no space (RFC 9110 5.5, wider than token68)."""
    return token.isascii() and token.isprintable() and " " not in token and token != ""
