"""Which connections a worker holds: how many of one caller, and which give way when there are too many.

A connection counts for its peer address from the moment it is accepted, and for another caller once a request proves
one. Beyond the limit of a caller a few more are held, so that they can be told 429, or prove that they belong to
another caller. When a new connection finds no room, the one that has waited longest for a request is closed. Behind a
trusted proxy a connection counts for nobody between requests, because the proxy uses it for everyone.

Pure bookkeeping, for the event loop's thread; the server opens and closes the connections.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Generic, Protocol, TypeVar

__all__ = ["EXTRA_PER_CALLER", "RESERVE", "ConnectionLimits", "Limited"]

EXTRA_PER_CALLER = 16
"""Connections of one caller beyond its limit that are held, to be told so; more are closed unheard."""
RESERVE = 256
"""Connections beyond the worker's limit that are held when nobody can give way, to be told 503 in proper form."""


class Limited(Protocol):
    """What is counted; these attributes belong to `ConnectionLimits`."""

    caller_slot: str | None
    """The caller whose place it holds."""
    extra_of: str | None
    """The caller that had no place left for it."""


C = TypeVar("C", bound=Limited)


class ConnectionLimits(Generic[C]):
    """Places of callers, and the order in which connections that wait for a request give way."""

    __slots__ = ("_extras", "_slots", "_waiting", "most", "most_per_caller")

    def __init__(self, most: int, most_per_caller: int) -> None:
        """`most`: connections of the worker; `most_per_caller`: of one caller."""
        self.most = most
        self.most_per_caller = most_per_caller
        self._slots: Counter[str] = Counter()
        self._extras: dict[str, OrderedDict[C, None]] = {}
        self._waiting: OrderedDict[C, None] = OrderedDict()

    @property
    def counts_nobody(self) -> bool:
        """Whether no connection is counted any more."""
        return not (self._slots or self._extras or self._waiting)

    def connection_to_close(self, caller: str | None, open_now: int) -> C | None:
        """The connection to close before another one of `caller` is accepted; None for none.

        `caller` is None behind a trusted proxy; `open_now` counts the worker's connections.
        """
        if self._is_crowded(caller):
            assert caller is not None
            return next((extra for extra in self._extras[caller] if extra in self._waiting), None)
        return next(iter(self._waiting), None) if open_now >= self.most else None

    def has_room(self, caller: str | None, open_now: int) -> bool:
        """Whether one more can be accepted, if only to be refused in proper form."""
        return open_now < self.most + RESERVE and not self._is_crowded(caller)

    def add(self, connection: C, caller: str | None) -> None:
        """Count a connection that was accepted; it waits for its first request."""
        if caller is not None and not self.take_slot(connection, caller):
            connection.extra_of = caller
            self._extras.setdefault(caller, OrderedDict())[connection] = None
        self._waiting[connection] = None

    def mark_waiting(self, connection: C) -> None:
        """It waits for a request, or for the rest of one, from now on."""
        self._waiting[connection] = None
        self._waiting.move_to_end(connection)

    def mark_busy(self, connection: C) -> None:
        """A request of it is under way, so it gives way to nobody."""
        self._waiting.pop(connection, None)

    def take_slot(self, connection: C, caller: str) -> bool:
        """Have a connection hold a place of `caller`, and no other; False when the caller has none left."""
        if connection.caller_slot == caller:
            return True
        if self._slots.get(caller, 0) >= self.most_per_caller:
            return False
        self.release(connection)
        self._slots[caller] += 1
        connection.caller_slot = caller
        return True

    def release(self, connection: C) -> None:
        """Take a connection's place back."""
        if (caller := connection.caller_slot) is not None:
            connection.caller_slot = None
            self._slots[caller] -= 1
            if not self._slots[caller]:
                del self._slots[caller]
        if (caller := connection.extra_of) is not None:
            connection.extra_of = None
            del self._extras[caller][connection]
            if not self._extras[caller]:
                del self._extras[caller]

    def remove(self, connection: C) -> None:
        """Forget a connection that is closed."""
        self.release(connection)
        self.mark_busy(connection)

    def _is_crowded(self, caller: str | None) -> bool:
        if caller is None or self._slots.get(caller, 0) < self.most_per_caller:
            return False
        return len(self._extras.get(caller, ())) >= EXTRA_PER_CALLER
