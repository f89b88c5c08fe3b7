"""The sockets that clients connect to. The supervisor opens them once and hands one to each HTTP worker.

A worker that died and was started again inherits the connections that the kernel queued meanwhile.
"""

from __future__ import annotations

import socket

from bzstream.config import HttpSettings, MetricsSettings
from bzstream.node.errors import NodeError

__all__ = ["check_address", "check_metrics_port", "open_listeners"]


def open_listeners(settings: HttpSettings) -> list[socket.socket]:
    """One SO_REUSEPORT socket a worker, bound and listening. Raises NodeError when the address cannot be had.

    SO_REUSEPORT would let a second node of the same user take half of the connections without any error, so a plain
    bind goes first: it fails when anybody else listens.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            address = probe.getsockname()
        listeners = []
        for _ in range(settings.workers):
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(settings.backlog)
            listener.setblocking(False)
            listeners.append(listener)
    except OSError as error:
        raise NodeError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return listeners


def check_address(listeners: list[socket.socket], settings: HttpSettings) -> None:
    """Raise NodeError unless inherited sockets listen on the port of the settings (0: whichever it is)."""
    for listener in listeners:
        port = listener.getsockname()[1]
        if settings.port not in (0, port):
            raise NodeError(f"the node to take over from listens on port {port}; give --port {port}, or stop it first")


def check_metrics_port(settings: MetricsSettings) -> None:
    """Raise NodeError when the address of /metrics cannot be had."""
    try:
        socket.create_server((settings.host, settings.port or 0)).close()
    except OSError as error:
        raise NodeError(
            f"cannot serve metrics on {settings.host} port {settings.port}: {error.strerror}; set metrics.port"
        ) from None
