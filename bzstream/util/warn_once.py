"""A problem that lasts is told once, and again only after things were good in between. One thread at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["WarnOnce"]


class WarnOnce:
    """Wraps a function that warns, such as a logger's `warning`."""

    def __init__(self, warn: Callable[..., object]) -> None:
        self._warn = warn
        self.failing = False
        """Whether the last report was a failure."""

    def failed(self, message: str, **fields: Any) -> None:
        """Report a failure: told if the last report was not one."""
        if not self.failing:
            self.failing = True
            self._warn(message, **fields)

    def succeeded(self) -> None:
        """Report that all is well: the next failure is told again."""
        self.failing = False
