"""The files that say who may call: shared tokens, bound tokens and the deny list, each followed as it changes.

A file is read again when it was replaced, written to, or got other rights. One that cannot be used leaves in force what
was last good, and is logged once, until a good one takes its place. The worker calls `refresh` on a thread, because a
large file takes a while to parse; meanwhile requests read `tokens` and `deny` on the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from bzstream.api.deny import DenyList, read_deny_file
from bzstream.api.tokens import TokenError, Tokens, check_shared_token, read_bound_tokens, read_shared_tokens
from bzstream.config import AuthSettings
from bzstream.errors import BzstreamError
from bzstream.util.warn_once import WarnOnce

__all__ = ["AccessFiles"]

T = TypeVar("T")


class _WatchedFile(Generic[T]):
    """The value that a file holds, read again when the file changed."""

    def __init__(self, path: str | None, read: Callable[[Path], T], default: T, warn: Callable[[str], object]) -> None:
        """`default`: the value without a file. Raises what `read` raises: a server must not start half configured."""
        self._path = None if path is None else Path(path)
        self._read = read
        self._warning = WarnOnce(warn)
        self._stamp = self._stamp_now()
        self.value = default if self._path is None else read(self._path)

    def refresh(self) -> bool:
        """Take in a changed file; whether there is a new value."""
        stamp = self._stamp_now()
        if self._path is None or stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self.value = self._read(self._path)
        except BzstreamError as error:
            self._warning.failed(f"{error} (until then what it last held stays in force)")
            return False
        self._warning.succeeded()
        return True

    def _stamp_now(self) -> tuple[int, ...] | None:
        """Changes with the file. The change time is part of it, so that a `chmod` is seen."""
        try:
            status = None if self._path is None else os.stat(self._path)
        except OSError:
            status = None
        return status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class AccessFiles:
    """What the settings and their files say of who may call. Requests read `tokens` and `deny`."""

    def __init__(self, settings: AuthSettings, warn: Callable[[str], object]) -> None:
        """Raises BzstreamError when a token or a file cannot be used."""
        shared, bound = tuple[str, ...](), dict[str, str]()
        if settings.shared_tokens_file is None:
            shared = (check_shared_token(settings.token),)
        self._warn = warn
        self._shared = _WatchedFile(settings.shared_tokens_file, read_shared_tokens, shared, warn)
        self._bound = _WatchedFile(settings.tokens_file, read_bound_tokens, bound, warn)
        self._denied = _WatchedFile(settings.deny_file, read_deny_file, DenyList(), warn)
        self.tokens = Tokens(self._shared.value, self._bound.value)
        self.deny = self._denied.value

    def refresh(self) -> bool:
        """Take in what has changed on disk; whether anything did. On any thread, one call at a time."""
        changed = [file.refresh() for file in (self._shared, self._bound, self._denied)]
        self.deny = self._denied.value
        if any(changed[:2]):
            try:
                self.tokens = Tokens(self._shared.value, self._bound.value)
            except TokenError as error:
                self._warn(f"{error} (until then the tokens before it stay in force)")
        return any(changed)
