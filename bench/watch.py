"""What the machine itself adds while something is measured on it: how late a sleeper wakes, and what was stolen.

A stall of a server's loop has two possible causes: the server did something for so long, or it had no core. A process
that does nothing but nap (nap.c) can only have the second. If its longest oversleep comes near the loop's longest
stall, lacking a core explains the stall. The converse does not follow: who computes is let wait longer than who sleeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.native import compiled

__all__ = ["stolen", "watching"]

NAPPER = Path(__file__).with_name("nap.c")
_STEAL = 8
"""Field of the first line of /proc/stat (proc_stat(5)): time that other guests of the hypervisor had."""


def stolen(stat: str) -> float:
    """Core-seconds stolen since the machine started, in the text of /proc/stat."""
    return int(stat.splitlines()[0].split()[_STEAL]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watching(seconds: float) -> Iterator[dict[str, float]]:
    """Watch the machine while the block runs, `seconds` long or longer. The yielded dictionary is filled at its end:

    `nap_ms` and `nap_p99_ms`, how much too long naps of 10 ms were at most and at the 99th percentile; `steal`, the
    share of all cores' time that the hypervisor gave to others.
    """
    figures: dict[str, float] = {}
    stat = Path("/proc/stat")
    before, began = stolen(stat.read_text(encoding="ascii")), time.monotonic()
    napper = subprocess.Popen([str(compiled(NAPPER)), str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        yield figures
        said, _ = napper.communicate(timeout=seconds + 60)
    finally:
        napper.kill()
        napper.wait()
    figures.update({name: value for name, value in json.loads(said).items() if name != "naps"})
    gone = (time.monotonic() - began) * (os.cpu_count() or 1)
    figures["steal"] = (stolen(stat.read_text(encoding="ascii")) - before) / gone
