"""Tells sending threads which transfers' sockets have room again, and wakes threads that wait.

One epoll set of its own, apart from the event loop's. Any thread may call any method, with two exceptions: a transfer
is armed only by the thread that sends for it, and forgotten under the sender's lock.
"""

from __future__ import annotations

import os
import select

from bzstream.http.send.transfer import Transfer

__all__ = ["Poller"]

_EVENTS = 256
_ARMED = select.EPOLLOUT | select.EPOLLONESHOT
"""Not edge-triggered: after a send that was short for another reason than want of room, no event would ever come."""


class Poller:
    """An epoll set of sockets that were full, and an eventfd to wake by."""

    __slots__ = ("_epoll", "_transfers", "_wakeup_fd")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._transfers: dict[int, Transfer] = {}
        """By descriptor, as long as the epoll set has it."""
        # Edge-triggered, so that every write wakes one thread and nobody needs to read it.
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wakeup_fd, select.EPOLLIN | select.EPOLLET)

    def __len__(self) -> int:
        """Transfers that were armed and not forgotten."""
        return len(self._transfers)

    def arm(self, transfer: Transfer) -> None:
        """Have a transfer reported once, as soon as its socket has room or its peer is gone.

        Raises OSError (ENOMEM, ENOSPC: the limits of epoll(7)).
        """
        if transfer.fd in self._transfers:
            self._epoll.modify(transfer.fd, _ARMED)
            return
        self._transfers[transfer.fd] = transfer
        try:
            self._epoll.register(transfer.fd, _ARMED)
        except OSError:
            del self._transfers[transfer.fd]
            raise

    def forget(self, transfer: Transfer) -> None:
        """A transfer is over; does nothing when it was never armed."""
        if self._transfers.pop(transfer.fd, None) is not None:
            self._epoll.unregister(transfer.fd)

    def poll(self, *, wait: bool) -> list[Transfer]:
        """Transfers whose sockets have room, or are gone (sending will find that). `wait`: until any or `wake`."""
        events = self._epoll.poll(-1 if wait else 0, _EVENTS)
        return [transfer for fd, _ in events if (transfer := self._transfers.get(fd)) is not None]

    def wake(self) -> None:
        """Have one thread return from `poll`."""
        os.eventfd_write(self._wakeup_fd, 1)

    def close(self) -> None:
        """Nobody may use it afterwards."""
        self._epoll.close()
        os.close(self._wakeup_fd)
