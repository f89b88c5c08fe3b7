"""The fleet: 256 simulated miners of 16 groups fetch their slices inside one window from the real node.

    python -m bench.fleet [--quick] [--json FILE]

Every miner has a token of its own, so the server knows it as a caller of its own; all start in the same instant, as
when a distribute phase begins. One C process (fleet.c) plays them all, drops the bodies in the kernel and checks every
status and length. Three kinds of windows:

- clean: every miner on one connection. Speed, the slowest miner against the median, Jain's index, CPU time.
- misbehaving: of every twenty miners one stops reading for good somewhere, and another breaks off and resumes by Range.
  What matters is what that does to the other eighteen. Windows of both kinds take turns.
- greedy: 64 miners at once for some seconds, half with 1 connection, half with 16 that ask for a range at a time.

In each round of the driver a miner takes at most 256 KiB, however many connections it has: that is its own link. Two
shares of the time say who was the bottleneck: where the driver computed all the time, it was; where it mostly waited
for the node, the node was; where it did neither, both waited for cores.

A slice must be large beside what the node sends until it has read the last of 256 requests: at 10 GB/s 32 MB go out in
3 ms, so whoever asks first could have everything before the last has asked. A slice of Qwen3-VL-30B-A3B takes 0.4 s.

Before them a window that is not timed compares what sixteen miners (one a group) and all that resumed have received
with the published files, byte by byte. The figures of a window are then extrapolated, on paper, to Qwen3-VL-30B-A3B.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from bench.command import command
from bench.native import compiled
from bench.node import Miner, cost, miners, publish_slices, serve
from bench.rows import row_of
from bzstream.demo.running_node import RunningNode
from bzstream.util.statistics import jain, quantile

__all__ = ["Play", "Result", "Window", "extrapolate", "habits", "measure"]

GROUPS, FLEET, GREEDY = 16, 256, 64
GREEDY_CONNECTIONS = 16
GREEDY_RANGES = (1 << 20, 8 << 20)
"""Bytes of a range: what aria2c -k1M asks for, and a chunk of the manifest."""
MISBEHAVING = 0.05
"""Share of the miners that stall, and again that drop."""
LIMIT_S = 120.0
"""A window that takes longer has failed."""
DRIVER = Path(__file__).with_name("fleet.c")
SLICE = "/model/partial"

Habit = Literal["plain", "stall", "drop"]


@dataclass(frozen=True, slots=True)
class Play:
    """What one miner does. `size`: bytes of its slice as sent; `at`: the byte at which it misbehaves."""

    miner: Miner
    group: int
    size: int
    connections: int = 1
    range_bytes: int = 0
    habit: Habit = "plain"
    at: int = 0
    compare_with: Path | None = None

    def line(self) -> str:
        """As the driver reads it."""
        file = self.compare_with or "-"
        return (
            f"{self.group} {self.size} {self.connections} {self.range_bytes} {self.habit} {self.at} {file} "
            f"{self.miner.token} {self.miner.hotkey}\n"
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one miner: `seconds` until it had everything, 0 if it never did."""

    seconds: float
    bytes: int
    first_byte: float
    resumed: int
    compared: int
    error: str


@dataclass(frozen=True, slots=True)
class Window:
    """One window: what was played, what became of it in the same order, seconds, bytes, the node's CPU seconds."""

    plays: list[Play]
    results: list[Result]
    seconds: float
    bytes: int
    idle: float
    """Share of the time in which the fleet waited for the node."""
    busy: float
    """Share of the time in which the fleet computed. What is left it spent waiting for a core."""
    cpu: float

    @property
    def rate(self) -> float:
        """Bytes a second of all miners together."""
        return self.bytes / self.seconds

    @property
    def honest(self) -> list[Result]:
        """The miners that do as they should."""
        return [result for play, result in zip(self.plays, self.results, strict=True) if play.habit == "plain"]

    @property
    def times(self) -> list[float]:
        """Seconds of the honest miners."""
        return [result.seconds for result in self.honest]

    @property
    def slowest(self) -> float:
        """The slowest honest miner's time over the median one's."""
        return max(self.times) / quantile(self.times, 0.5)

    @property
    def fairness(self) -> float:
        """Jain's index of the honest miners' speeds."""
        return jain([result.bytes / result.seconds for result in self.honest])

    def check(self) -> None:
        """Raises RuntimeError when a miner met an error, lacks bytes, or has wrong ones."""
        for play, result in zip(self.plays, self.results, strict=True):
            if result.error:
                raise RuntimeError(f"a miner of group {play.group} met an error: {result.error}")
            if play.habit == "stall":
                continue
            if result.bytes != play.size or not result.seconds:
                raise RuntimeError(f"a miner of group {play.group} got {result.bytes} of {play.size} bytes")
            if play.habit == "drop" and result.resumed != 1:
                raise RuntimeError(f"a miner of group {play.group} never broke off")
            if play.compare_with is not None and result.compared != play.compare_with.stat().st_size:
                raise RuntimeError(f"of a slice of group {play.group} only {result.compared} bytes were compared")


def habits(count: int, share: float, seed: int) -> list[tuple[Habit, float]]:
    """For each of `count` miners its habit and how far into its slice it shows, 0.1 to 0.9; `share` of each bad one."""
    dice = random.Random(seed)
    bad = dice.sample(range(count), 2 * round(count * share))
    stalling, dropping = set(bad[0::2]), set(bad[1::2])
    return [
        ("stall" if n in stalling else "drop" if n in dropping else "plain", dice.uniform(0.1, 0.9))
        for n in range(count)
    ]


class Fleet:
    """A node with a store, and the miners that it knows."""

    def __init__(self, node: RunningNode, callers: list[Miner]) -> None:
        self.node = node
        self.callers = callers
        self.driver = compiled(DRIVER)
        self.sizes = [self._size(group) for group in range(GROUPS)]

    def _size(self, group: int) -> int:
        first = self.callers[0]
        headers = {"Authorization": f"Bearer {first.token}", "X-Hotkey": first.hotkey, "X-Expert-Group": str(group)}
        return int(self.node.request("HEAD", SLICE, headers).headers["Content-Length"])

    def file(self, group: int) -> Path:
        return self.node.store / "current" / f"group-{group}.safetensors"

    def plays(self, share: float, seed: int, *, compare: bool = False) -> list[Play]:
        """A window in which `share` of the miners stall and as many drop."""
        plays = []
        for number, (habit, depth) in enumerate(habits(len(self.callers), share, seed)):
            group = number % GROUPS
            checked = compare and (number < GROUPS or habit == "drop")
            plays.append(
                Play(
                    self.callers[number],
                    group,
                    self.sizes[group],
                    habit=habit,
                    at=int(self.sizes[group] * depth),
                    compare_with=self.file(group) if checked else None,
                )
            )
        return plays

    def greedy(self, range_bytes: int) -> list[Play]:
        """`GREEDY` miners, every other one with many connections, each for a range at a time."""
        return [
            Play(
                self.callers[number],
                number % GROUPS,
                self.sizes[number % GROUPS],
                connections=GREEDY_CONNECTIONS if number % 2 else 1,
                range_bytes=range_bytes if number % 2 else 0,
            )
            for number in range(GREEDY)
        ]

    def play(self, plays: list[Play], seconds: float = 0.0) -> Window:
        """Let the miners do it: each once, or again and again for some seconds."""
        before = cost(self.node).cpu
        done = subprocess.run(
            [str(self.driver), "127.0.0.1", str(self.node.port), SLICE, str(seconds), str(LIMIT_S)],
            input="".join(play.line() for play in plays),
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT_S + seconds + 30,
        )
        *each, total = map(json.loads, done.stdout.splitlines())
        cpu = cost(self.node).cpu - before
        return Window(plays, [Result(**result) for result in each], cpu=cpu, **total)


def measure(quick: bool) -> dict[str, Any]:
    """Play all windows: `rows`, `notes` (the extrapolation) and `series` (times of single miners, for the plot)."""
    slice_bytes, rounds, seconds = (32 << 20, 1, 0.5) if quick else (128 << 20, 7, 4.0)
    callers = miners(FLEET)
    clean: list[Window] = []
    bad: list[Window] = []
    greedy: dict[int, list[Window]] = {size: [] for size in GREEDY_RANGES}
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as folder:
        store = Path(folder) / "store"
        publish_slices(store, groups=GROUPS, slice_bytes=slice_bytes)
        # All miners have one address here, and what is not proven yet counts for the address.
        with serve(store, callers=callers, environment={"BZ_HTTP_MAX_CONNECTIONS_PER_CALLER": "1000"}) as node:
            fleet = Fleet(node, callers)
            fleet.play(fleet.plays(MISBEHAVING, 0, compare=True)).check()
            for turn in range(rounds):
                # By turns the one first or the other, so that a drift of the machine favours neither.
                for kind, share in ((clean, 0.0), (bad, MISBEHAVING))[:: -1 if turn % 2 else 1]:
                    kind.append(fleet.play(fleet.plays(share, turn)))
            for _ in range(1 if quick else 3):
                for range_bytes, windows in greedy.items():
                    windows.append(fleet.play(fleet.greedy(range_bytes), seconds))
            memory = cost(node).memory
        size = fleet.sizes[0]
    for window in (*clean, *bad):
        window.check()
    for window in chain.from_iterable(greedy.values()):
        if errors := [result.error for result in window.results if result.error]:
            raise RuntimeError(f"a greedy miner met an error: {errors[0]}")
    return {
        "rows": _rows(size, clean, bad, greedy, memory),
        "notes": extrapolate(
            rate=quantile([window.rate for window in clean], 0.5),
            cpu_per_gb=quantile([_cpu_per_gb(window) for window in clean], 0.5),
        ),
        "series": {
            "slice_mb": size / 1e6,
            "clean_s": [round(seconds, 5) for seconds in sorted(clean[-1].times)],
            "misbehaving_s": [round(seconds, 5) for seconds in sorted(bad[-1].times)],
        },
    }


def _cpu_per_gb(window: Window) -> float:
    return window.cpu / (window.bytes / 1e9)


def _moved(clean: Window, bad: Window) -> float:
    """How much longer the honest miners of a misbehaving window took than the very same miners in a clean one."""
    same = [result.seconds for play, result in zip(bad.plays, clean.results, strict=True) if play.habit == "plain"]
    return quantile(bad.times, 0.5) / quantile(same, 0.5)


def _rows(
    size: int, clean: list[Window], bad: list[Window], greedy: dict[int, list[Window]], memory: int
) -> list[dict[str, Any]]:
    rows = []
    label = f"{FLEET} miners, {size / 1e6:.0f} MB each"
    kinds = ((clean, label), (bad, f"{label}, 5% stall, 5% drop and resume"))
    for windows, name in kinds:
        rows += [
            row_of(f"{name}: all together", "GB/s", [window.rate / 1e9 for window in windows]),
            row_of(f"{name}: slowest / median time", "x", [window.slowest for window in windows], target="<= 1.3"),
            row_of(f"{name}: Jain's index", "", [window.fairness for window in windows], target=">= 0.97"),
            row_of(f"{name}: server CPU", "s/GB", [_cpu_per_gb(window) for window in windows]),
            row_of(f"{name}: the fleet waited", "share", [window.idle for window in windows]),
            row_of(f"{name}: the fleet computed", "share", [window.busy for window in windows]),
        ]
    moved = [_moved(first, second) for first, second in zip(clean, bad, strict=True)]
    rows.append(row_of("the others' median time, misbehaving / clean", "x", moved, target="<= 1.05"))
    for range_bytes, windows in greedy.items():
        name = f"{GREEDY} miners, 1 or {GREEDY_CONNECTIONS} connections, ranges of {range_bytes >> 20} MiB"
        shares = [[result.bytes for result in window.results] for window in windows]
        favoured = [sum(got[1::2]) / max(1, sum(got[0::2])) for got in shares]
        rows += [
            row_of(f"{name}: all together", "GB/s", [window.rate / 1e9 for window in windows]),
            row_of(f"{name}: Jain's index", "", [jain(got) for got in shares], target=">= 0.97"),
            row_of(f"{name}: bytes with {GREEDY_CONNECTIONS} / with 1", "x", favoured),
            row_of(f"{name}: the fleet waited", "share", [window.idle for window in windows]),
            row_of(f"{name}: the fleet computed", "share", [window.busy for window in windows]),
        ]
    rows.append(row_of("node's memory at most, all processes", "MiB", [memory / 2**20]))
    return rows


SLICE_GB, SHARED_GB, PHASE_S = 3.62, 4.2, 240.0
"""Qwen3-VL-30B-A3B: 8 of 128 experts a group, bf16; 20 blocks of 12 s."""
LINE_GBIT = 100.0
GOODPUT = 1448 / 1538
"""Payload of a full TCP segment over its bytes on the wire: 1,500 of MTU with 52 of headers (timestamps on), and 38
of Ethernet framing, preamble and gap."""


def extrapolate(*, rate: float, cpu_per_gb: float) -> str:
    """A distribute phase of Qwen3-VL-30B-A3B on paper, from a `rate` (bytes a second) and CPU seconds per GB."""
    slices, shared = FLEET * SLICE_GB, FLEET * SHARED_GB
    line = LINE_GBIT / 8 * GOODPUT
    both = slices + shared
    gbit = slices / PHASE_S * 8
    return "\n".join(
        [
            f"Slices: {FLEET} x {SLICE_GB} GB = {slices:,.0f} GB in {PHASE_S:.0f} s = {slices / PHASE_S:.2f} GB/s "
            f"= {gbit:.1f} Gbit/s.",
            f"With the shared tensors: {FLEET} x ({SLICE_GB} + {SHARED_GB}) GB = {both:,.0f} GB in {PHASE_S:.0f} s "
            f"= {both / PHASE_S:.2f} GB/s = {both / PHASE_S * 8:.1f} Gbit/s.",
            f"A line of {LINE_GBIT:.0f} Gbit/s carries {LINE_GBIT:.0f} / 8 x 1448 / 1538 = {line:.2f} GB/s of TCP "
            f"payload (MTU 1500): the slices take {slices:,.0f} / {line:.2f} = {slices / line:.0f} s, both take "
            f"{both / line:.0f} s of the {PHASE_S:.0f} s.",
            f"One worker here, sharing its cores with the miners, gave {rate / 1e9:.2f} GB/s: the slices would take "
            f"{slices * 1e9 / rate:.0f} s, {_times(slices * 1e9 / rate, PHASE_S)}.",
            f"CPU: {cpu_per_gb:.3f} s/GB x {slices:,.0f} GB / {PHASE_S:.0f} s = "
            f"{cpu_per_gb * slices / PHASE_S:.2f} cores for the slices, {cpu_per_gb * both / PHASE_S:.2f} for both, "
            f"{cpu_per_gb * line:.2f} to fill the line. On loopback this holds the receiver's half of TCP too; a "
            f"network card takes segmenting and checksums off the server, and adds interrupts.",
            f"Memory: {GROUPS} x {SLICE_GB} + {SHARED_GB} = {GROUPS * SLICE_GB + SHARED_GB:.0f} GB of page cache hold "
            f"all that is sent; on a smaller machine each byte is read from disk about once a window, as the miners of "
            f"a group keep pace: {GROUPS * SLICE_GB / PHASE_S:.2f} GB/s of reading.",
        ]
    )


def _times(seconds: float, bound: float) -> str:
    share = seconds / bound
    return f"{share:.0%} of the phase" if share <= 1 else f"{share:.1f} times the phase: not enough"


if __name__ == "__main__":
    command("fleet", __doc__, measure)
