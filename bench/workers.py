"""One worker and two: what a second process adds, and what it costs. `python -m bench.workers [--quick] [--json FILE]`

The whole node with `--workers 1` and `--workers 2`, and nginx (sendfile) with as many worker processes, serve the same
warm slice to a client that discards it, over 8 and over 64 connections, all in turns. The client is one thread and runs
on the same cores: `the client was busy` says which share of the time it computed. Where it is near 1, or where all
processes together had more to do than there are cores, a second worker cannot show what it could do elsewhere.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.command import command
from bench.peers.servers import NGINX_MODES, Target, compiled, ended_children_cpu, nginx, serving
from bench.rows import row_of
from bench.serve import FILE_SIZE, QUICK_FILE_SIZE, Measurement, measure_round, warm_file, whole_node
from bzstream.util.statistics import quantile

__all__ = ["measure_all"]

WORKERS, CONNECTIONS = (1, 2), (8, 64)
NODE, PEER = "bzstream", "nginx sendfile"


def measure_all(quick: bool) -> dict[str, Any]:
    """Rows, and what is missing."""
    seconds, rounds, counts = (0.3, 1, CONNECTIONS[:1]) if quick else (2.0, 3, CONNECTIONS)
    missing: list[str] = []
    found: dict[tuple[str, int, int], Measurement] = {}
    busy: dict[tuple[str, int, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        compiled("discard.c", folder)  # now, so that the compiler's time is not taken for the client's
        file = warm_file(folder, QUICK_FILE_SIZE if quick else FILE_SIZE)
        targets: dict[tuple[str, int], Target] = {}
        for workers in WORKERS:
            targets[NODE, workers] = stack.enter_context(whole_node(file, "--workers", str(workers)))
            try:
                command = nginx(NGINX_MODES[PEER], workers=workers)
                targets[PEER, workers] = stack.enter_context(serving(PEER, file, folder, command))
            except (OSError, RuntimeError) as error:
                missing.append(f"{PEER}: {error}")
        for turn in range(rounds):
            for server, workers in sorted(targets, reverse=bool(turn % 2)):
                for connections in counts:
                    key = (server, workers, connections)
                    row = found.setdefault(key, Measurement(server, connections, "discard"))
                    before, began = ended_children_cpu(), time.monotonic()
                    measure_round(row, targets[server, workers], seconds, folder)
                    if row.error:
                        raise RuntimeError(f"{server}, {workers} workers: {row.error}")
                    busy.setdefault(key, []).append((ended_children_cpu() - before) / (time.monotonic() - began))
    return {"rows": _rows(found, busy), "missing": missing, "notes": f"{os.cpu_count()} cores for all processes."}


def _rows(
    found: dict[tuple[str, int, int], Measurement], busy: dict[tuple[str, int, int], list[float]]
) -> list[dict[str, Any]]:
    rows = []
    for (server, workers, connections), taken in sorted(found.items(), key=lambda item: (item[0][2], item[0])):
        subject = f"{server}, {workers} worker{'s' * (workers > 1)}"
        name = f"{connections} connections, discarding client"
        ratio, peer = None, ""
        if workers > 1:
            one = found[server, 1, connections]
            pairs = zip(taken.rates, one.rates, strict=True)
            ratio, peer = quantile([ours / theirs for ours, theirs in pairs], 0.5), "1 worker"
        rows += [
            row_of(name, "GB/s", taken.rates, subject=subject, peer=peer, ratio=ratio),
            row_of(f"{name}: server CPU", "s/GB", taken.costs, subject=subject),
            row_of(f"{name}: the client was busy", "share", busy[server, workers, connections], subject=subject),
        ]
    return rows


def main() -> None:
    command("workers", __doc__, measure_all)


if __name__ == "__main__":
    main()
