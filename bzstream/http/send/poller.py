"""Tells sending threads which sockets have room again, and wakes threads that wait.

One epoll set of its own, apart from the event loop's. A socket is armed for one event at a time. Any thread may call
any method, but a descriptor is armed only by the thread that sends for it.
"""

from __future__ import annotations

import os
import select

__all__ = ["Poller"]

_EVENTS = 256
_ARMED = select.EPOLLOUT | select.EPOLLONESHOT


class Poller:
    """An epoll set of sockets that were full, and an eventfd to wake by."""

    __slots__ = ("_epoll", "_wakeup_fd")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # Edge-triggered, so that every write wakes one thread and nobody needs to read it.
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wakeup_fd, select.EPOLLIN | select.EPOLLET)

    def register(self, fd: int) -> None:
        """Have a socket reported once, as soon as it has room or its peer is gone. Raises OSError (epoll(7))."""
        self._epoll.register(fd, _ARMED)

    def rearm(self, fd: int) -> None:
        """The same for a socket that is registered. Not edge-triggered: a send that was short for another reason than
        want of room would wait for ever."""
        self._epoll.modify(fd, _ARMED)

    def unregister(self, fd: int) -> None:
        """Forget a socket."""
        self._epoll.unregister(fd)

    def poll(self, *, wait: bool) -> list[int]:
        """Descriptors with room; the one to wake by may be among them. `wait`: until there is any."""
        return [fd for fd, _ in self._epoll.poll(-1 if wait else 0, _EVENTS)]

    def wake(self) -> None:
        """Have one thread return from `poll`."""
        os.eventfd_write(self._wakeup_fd, 1)

    def close(self) -> None:
        """Nobody may use it afterwards."""
        self._epoll.close()
        os.close(self._wakeup_fd)
