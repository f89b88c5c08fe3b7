"""A simulated wide-area link between two network namespaces that the bench makes and removes.

netem where the kernel has it, on both ends of a veth pair; else `wan.c`, which does the same to the packets of two TUN
devices. The server's namespace uses cubic, what a Linux server does unless somebody chose otherwise: with BBR a single
stream fills a lossy link, and nothing is left to compare.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.native import MissingPeer, compiled

__all__ = ["Link", "wide_area"]

DEVICE = "wan0"
QUEUE_MS = 100.0
"""Of the bottleneck: a little more than the delay, as routers are built."""


@dataclass(frozen=True, slots=True)
class Link:
    """`server` and `client`: the words before a command that run it at that end; `address`: the server's IP."""

    server: tuple[str, ...]
    client: tuple[str, ...]
    address: str
    how: str


@contextmanager
def wide_area(*, round_trip_ms: float, loss: float, bits_per_second: float) -> Iterator[Link]:
    """Two namespaces with such a link between them. Raises MissingPeer without root, `ip` or a way to make the link."""
    if os.geteuid() != 0:
        raise MissingPeer("a simulated link needs root, for network namespaces")
    names = [f"bzbench-{os.getpid()}-{end}" for end in ("s", "c")]
    relay: subprocess.Popen[str] | None = None
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        try:
            _veth(names, round_trip_ms, loss, bits_per_second)
            how = "netem"
        except subprocess.CalledProcessError:
            relay = _tun(names, round_trip_ms, loss, bits_per_second)
            how = "user-space relay over TUN (this kernel has no netem)"
        for number, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up", "mtu", "1500")
        # On the route, as a namespace may not choose what its host does not allow for everybody.
        _ip("-n", names[0], "route", "change", "10.99.0.0/24", "dev", DEVICE, "congctl", "cubic")
        yield Link(("ip", "netns", "exec", names[0]), ("ip", "netns", "exec", names[1]), "10.99.0.1", how)
    finally:
        if relay is not None:
            relay.communicate("", timeout=10)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _veth(names: list[str], round_trip_ms: float, loss: float, bits_per_second: float) -> None:
    _ip("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
    try:
        for name in names:
            _in(
                name, "tc", "qdisc", "add", "dev", DEVICE, "root", "netem", "delay", f"{round_trip_ms / 2}ms",
                "loss", f"{100 * loss}%", "rate", f"{bits_per_second:.0f}bit", "limit", "20000",
            )  # fmt: skip
            # Whole packets, so that a loss costs one of them and not a 64 KiB super-packet.
            _in(name, "ethtool", "-K", DEVICE, "tso", "off", "gso", "off", "gro", "off")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        _ip("-n", names[0], "link", "del", DEVICE)
        if isinstance(error, FileNotFoundError):
            raise MissingPeer(
                f"{error.filename} is not here; install it with: apt-get install ethtool iproute2"
            ) from None
        raise


def _tun(names: list[str], round_trip_ms: float, loss: float, bits_per_second: float) -> subprocess.Popen[str]:
    if not Path("/dev/net/tun").exists():
        raise MissingPeer("this kernel has neither netem nor TUN devices")
    program = compiled(Path(__file__).with_name("wan.c"))
    relay = subprocess.Popen(
        [str(program), *names, DEVICE, f"{bits_per_second:.0f}", f"{round_trip_ms / 2}", f"{loss}", f"{QUEUE_MS}", "7"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert relay.stdout is not None
    if relay.stdout.readline() != "ready\n":
        raise MissingPeer("the user-space link could not be made")
    return relay


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _in(name: str, *command: str) -> None:
    _ip("netns", "exec", name, *command)
