"""Bearer tokens: one shared by the subnet, and a file that binds further ones each to a hotkey.

A presented token is never compared with a stored one. Both are run through a keyed hash whose key lives and dies with
the process, and the digests are compared in constant time, so that no timing tells how much of a guess was right.

The tokens file is TOML, `"<token>" = "<ss58 hotkey>"`, readable by its owner alone. It is read again when it changes;
a version that cannot be used leaves the last good one in force.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path

from bzstream.chain.keys import InvalidHotkey, decode_hotkey
from bzstream.config import AuthSettings
from bzstream.errors import BzstreamError

__all__ = ["MIN_SHARED_TOKEN", "TokenError", "Tokens", "TokensFile", "open_tokens"]

MIN_SHARED_TOKEN = 32
"""Characters; the contract. 32 hex digits are 128 bits."""

MAX_TOKENS_FILE = 4 * 1024 * 1024
"""Bytes. Room for about 30,000 tokens."""


class TokenError(BzstreamError):
    """The shared token or the tokens file cannot be used; the text never holds a token."""


def check_shared_token(token: str | None) -> str:
    """The token, if `serve` may start with it. Raises TokenError."""
    if not token:
        raise TokenError("no shared token is set; put at least 32 characters into BZ_AUTH_TOKEN")
    if len(token) < MIN_SHARED_TOKEN:
        raise TokenError(f"the shared token has {len(token)} characters; BZ_AUTH_TOKEN needs at least 32")
    if not is_sendable(token):
        raise TokenError(
            "the shared token holds characters that a Bearer header cannot carry; use visible ASCII without spaces"
        )
    return token


def open_tokens(settings: AuthSettings) -> TokensFile:
    """The tokens that the settings name. Raises TokenError: a server must not start half configured."""
    shared = check_shared_token(settings.token)
    return TokensFile(shared, Path(settings.tokens_file) if settings.tokens_file else None)


def is_sendable(token: str) -> bool:
    """Whether a Bearer header can carry the token: visible ASCII, no space (RFC 9110 5.5, wider than token68)."""
    return token.isascii() and token.isprintable() and " " not in token and token != ""


class Tokens:
    """Who a token stands for. Immutable; a changed file makes a new one."""

    def __init__(self, shared: str, bound: Mapping[str, str]) -> None:
        self._key = os.urandom(32)
        self._shared = self._digest(shared)
        self._bound = {self._digest(token): hotkey for token, hotkey in bound.items()}

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode("utf-8", "surrogateescape"), key=self._key, digest_size=32).digest()

    def hotkey_of(self, token: str) -> tuple[bool, str | None]:
        """(whether the token is known, the hotkey that it is bound to)."""
        digest = self._digest(token)
        if hmac.compare_digest(digest, self._shared):
            return True, None
        # The table is looked up by a keyed digest: what a guess can learn from its timing is about the digest alone.
        hotkey = self._bound.get(digest)
        return hotkey is not None, hotkey


class TokensFile:
    """Reads the tokens file, and reads it again when it changed on disk."""

    def __init__(self, shared: str, path: Path | None) -> None:
        """Raises TokenError when the file cannot be used: a server must not start half configured."""
        self._shared = shared
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self.tokens = Tokens(shared, {})
        if path is not None:
            self._stamp = _stamp(path)
            self.tokens = Tokens(shared, read_tokens(path, shared))

    def refresh(self) -> bool:
        """Take a changed file into force; whether that happened.

        Raises TokenError, once for each change, when the new file cannot be used; the last good one stays in force.
        """
        if self._path is None:
            return False
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        self.tokens = Tokens(self._shared, read_tokens(self._path, self._shared))
        return True


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_tokens(path: Path, shared: str) -> dict[str, str]:
    """Token -> hotkey. Raises TokenError, whose text names the file and the line's hotkey but never a token."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if mode & 0o077:
                raise TokenError(f"the tokens file {path} has mode {mode:04o}; others could read it: chmod 0600 it")
            raw = file.read(MAX_TOKENS_FILE + 1)
    except OSError as error:
        raise TokenError(f"the tokens file {path} cannot be read: {error.strerror}; check BZ_TOKENS_FILE") from None
    if len(raw) > MAX_TOKENS_FILE:
        raise TokenError(f"the tokens file {path} is larger than {MAX_TOKENS_FILE} bytes; split the subnet's nodes")
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
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
        if not is_sendable(token):
            raise TokenError(f"the token of {hotkey} in {path} holds characters that a Bearer header cannot carry")
        if hmac.compare_digest(token.encode(), shared.encode()):
            raise TokenError(f"the tokens file {path} binds the shared token to {hotkey}; give it a token of its own")
    return table
