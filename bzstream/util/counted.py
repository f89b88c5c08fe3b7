"""Something that several users hold and that is closed when the last one lets go. For one thread, the event loop's."""

from __future__ import annotations

from abc import abstractmethod

__all__ = ["Counted"]


class Counted:
    """Starts with one user. The caller of `retain` must already hold, or be lent, a reference."""

    __slots__ = ("_references",)

    def __init__(self) -> None:
        self._references = 1

    def retain(self) -> None:
        """Count one more user; pair each call with one `release`."""
        assert self._references > 0, "something closed was retained"
        self._references += 1

    def release(self) -> None:
        """Give one reference back; the last one closes."""
        assert self._references > 0, "something was released more often than retained"
        self._references -= 1
        if self._references == 0:
            self.on_last_release()

    @abstractmethod
    def on_last_release(self) -> None:
        """Close; called once, by `release` alone."""
