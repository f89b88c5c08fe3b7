"""What a link and a validator really give: download speed by number of connections, first bytes, fairness, latency.

Every byte is received and thrown away; nothing is checked or written, so that the figure is the network's and the
server's. A sweep is one number of connections for some seconds, each connection asking for long ranges one after the
other, from places spread over the unit. The latency of small ranges is measured afterwards, on one warm connection.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bzstream.client.address import UnitRef
from bzstream.client.errors import ClientError, Stopped, UsageError
from bzstream.client.manifest import Manifest
from bzstream.client.session import Session
from bzstream.client.session_factory import Options, choose_receiver, open_session
from bzstream.client.tuning import Tuning
from bzstream.httpclient import Connection
from bzstream.util.statistics import jain, quantile

__all__ = ["LinkReport", "Sweep", "measure"]

RUN = 64 * 1024 * 1024
"""Bytes of one range: seconds of a slow link, and a request every 10 ms at 6 GB/s."""
PIECE = 256 * 1024
SMALL = 64 * 1024
SMALL_COUNT = 200


@dataclass(frozen=True, slots=True)
class Sweep:
    """One number of connections. Rates in bytes a second, times in seconds.

    `fairness` is Jain's index of the bytes each connection got: 1 all the same, 1/n one got everything. `first_byte`
    is the time from a request to the first byte of its body, connections being open already.
    """

    connections: int
    seconds: float
    bytes: int
    rate: float
    first_byte_p50: float
    first_byte_p99: float
    fairness: float
    slowest: float
    fastest: float


@dataclass(frozen=True, slots=True)
class LinkReport:
    """`rtt`: of the TCP handshake. `range_p50` and `range_p99`: a whole 64 KiB range at a random place, one by one."""

    url: str
    label: str
    version: str
    size: int
    rtt: float
    sweeps: tuple[Sweep, ...]
    range_p50: float
    range_p99: float


def measure(
    url: str,
    *,
    group: int | None = None,
    connections: Sequence[int] = (1, 8, 64),
    seconds: float = 5.0,
    hotkey: str | None = None,
    key: str | None = None,
    token: str | None = None,
    validator_hotkey: str | None = None,
    receiver: str | None = None,
    ca_file: str | None = None,
    on_sweep: Callable[[Sweep], None] | None = None,
    tuning: Tuning | None = None,
) -> LinkReport:
    """Measure the download of a group's slice (`group`) or of the shared tensors, once for each of `connections`.

    Raises ClientError when the validator cannot be reached, refuses, or breaks off a sweep.
    """
    if not connections or not all(1 <= count <= 1024 for count in connections):
        raise UsageError("connections: numbers from 1 to 1024, such as 1,8,64")
    if not 0.1 <= seconds <= 3600:
        raise UsageError("seconds: from 0.1 to 3600")
    options = Options(hotkey, key, token, validator_hotkey, receiver, ca_file=ca_file)
    session = open_session(url, options, tuning or Tuning(), claim_needed=True)
    try:
        choose_receiver(session)
        unit = UnitRef("shared") if group is None else UnitRef("partial", group)
        manifest = session.manifest(unit, None, validator_hotkey)
        sweeps = []
        for count in connections:
            sweep = _sweep(session, manifest, count, seconds)
            sweeps.append(sweep)
            if on_sweep is not None:
                on_sweep(sweep)
        times = _small_ranges(session, manifest)
        return LinkReport(
            url=str(session.mirrors[0].address),
            label=unit.label,
            version=manifest.version,
            size=manifest.size,
            rtt=session.mirrors[0].rtt,
            sweeps=tuple(sweeps),
            range_p50=quantile(times, 0.5),
            range_p99=quantile(times, 0.99),
        )
    finally:
        session.close()


def _sweep(session: Session, manifest: Manifest, count: int, seconds: float) -> Sweep:
    mirror = session.mirrors[0]
    opened = [session.connect(mirror) for _ in range(count)]
    amounts = [0] * count
    firsts: list[float] = []
    failures: list[BaseException] = []
    start = threading.Barrier(count + 1)
    over = threading.Event()

    def worker(number: int) -> None:
        connection = opened[number]
        buffer = memoryview(bytearray(PIECE))
        position = manifest.size * number // count
        start.wait()
        try:
            while not over.is_set():
                if position >= manifest.size:
                    position = 0
                end = min(position + RUN, manifest.size)
                asked = time.monotonic()
                session.open_range(connection, mirror, manifest, None, position, end)
                first = True
                while connection.remaining:
                    amounts[number] += connection.read_into(buffer)
                    if first:
                        first = False
                        firsts.append(time.monotonic() - asked)
                position = end
        except BaseException as error:
            if not over.is_set():
                failures.append(error)
                over.set()

    threads = [threading.Thread(target=worker, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.monotonic()
    try:
        stopped_early = over.wait(seconds)
        got = list(amounts)
        took = time.monotonic() - began
    finally:
        over.set()
        _close_connection(session, opened, threads)
    if stopped_early and failures:
        raise failures[0] if isinstance(failures[0], ClientError) else Stopped(str(failures[0]))
    return Sweep(
        connections=count,
        seconds=took,
        bytes=sum(got),
        rate=sum(got) / took,
        first_byte_p50=quantile(firsts, 0.5),
        first_byte_p99=quantile(firsts, 0.99),
        fairness=jain(got),
        slowest=min(got) / took,
        fastest=max(got) / took,
    )


def _close_connection(session: Session, opened: Sequence[Connection], threads: Sequence[threading.Thread]) -> None:
    for connection in opened:
        connection.interrupt()
    for thread in threads:
        thread.join()
    for connection in opened:
        session.discard(connection)


def _small_ranges(session: Session, manifest: Manifest) -> list[float]:
    """Seconds of each of some small ranges at random places, request to last byte, over one connection."""
    mirror = session.mirrors[0]
    connection = session.connect(mirror)
    buffer = memoryview(bytearray(SMALL))
    length = min(SMALL, manifest.size)
    times = []
    try:
        for _ in range(SMALL_COUNT):
            begin = random.randrange(manifest.size - length + 1)
            asked = time.monotonic()
            session.open_range(connection, mirror, manifest, None, begin, begin + length)
            while connection.remaining:
                connection.read_into(buffer)
            times.append(time.monotonic() - asked)
    finally:
        session.discard(connection)
    return times
