"""Server throughput beside the peers: `python -m bench.serve [--quick]`.

One worker each serves the same warm file to a client that throws the bytes away (`peers/discard.c`). All peers are
driven in the same run, in alternating rounds; medians are shown. Every answer's status and byte count are checked by
the client, and a single wrong one fails the row. Up to eight connections ask for whole files; more ask for ranges of
64 MiB, so that answers also end while it is measured.

`bzstream` is the whole node, `bzstream serve` with its supervisor, chain role, tokens, logs and metrics, and its CPU is
that of all its processes; `http core` is its `http` package alone. The file is the slice that the node serves.
`--url` adds a server that is already running: `--url http://127.0.0.1:8000/model/partial --header
'Authorization: Bearer …' --pid PID`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from bench.command import command
from bench.node import Miner, miners, publish_slices, serve
from bench.peers.servers import PEERS, Target, compiled, cpu_seconds, peak_memory, serving
from bench.rows import ratio_of, row_of
from bzstream.util.statistics import quantile

FILE_SIZE, QUICK_FILE_SIZE = 2 << 30, 256 << 20
RANGE = 64 << 20
HEALTH_PATH = "/health"
NODE, LIMIT = "bzstream", "C sendfile"
ROUNDS = {"discard": 5, "copy": 3, "health": 3}
"""Kind of client -> rounds: what is judged is measured most often, and all of it takes eleven minutes."""
FAR, FAR_ROUNDS = ("nginx buffers", "granian", "aiohttp", "FastAPI"), 3
"""Peers that are so much slower that more rounds would tell no more."""
MANY = 256
"""So many connections need twice the time: until all of them are served, the start is what is measured."""
SLICE = "/model/partial?format=safetensors"
UNLIMITED = {"BZ_HTTP_MAX_CONNECTIONS_PER_CALLER": "100000", "BZ_HTTP_MAX_CONNECTIONS": "100000"}
"""One caller may have all connections: a bench has fewer callers than connections."""


@dataclass
class Measurement:
    """One server at one number of connections with one kind of client, over all rounds."""

    server: str
    connections: int
    client: str
    """`discard`, `copy` or `health`."""
    rates: list[float] = field(default_factory=list)
    """GB/s a round; for `health` requests a second."""
    costs: list[float] = field(default_factory=list)
    """Server CPU seconds per GB a round; for `health` per thousand requests."""
    jain: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    error: str = ""


def measure_round(row: Measurement, target: Target, seconds: float, folder: Path) -> None:
    """One round: add its figures, or its error, to the row."""
    if row.client == "health":
        with urlopen(f"http://{target.host}:{target.port}{HEALTH_PATH}", timeout=10) as answer:
            path, size, length = HEALTH_PATH, len(answer.read()), 0
    else:
        path, size, length = target.path, target.size, RANGE if row.connections > 8 else 0
    before = cpu_seconds(target.pid)
    done = subprocess.run(
        [
            compiled("discard.c", folder), target.host, str(target.port), path, str(size), str(row.connections),
            str(seconds), str(int(row.client == "copy")), str(length), *target.headers,
        ],
        capture_output=True, text=True, check=False, timeout=seconds * 3 + 60,
    )  # fmt: skip
    spent = cpu_seconds(target.pid) - before
    row.peak_mib = max(row.peak_mib, peak_memory(target.pid) / 2**20)
    if not done.stdout:
        row.error = done.stderr.strip() or "the client failed"
        return
    result = json.loads(done.stdout)
    if result["error"]:
        row.error = result["error"]
        return
    # The client's warm-up, a tenth, is in the CPU time but not in the count: put both on the same footing.
    share = result["seconds"] / (result["seconds"] + seconds * 0.1)
    if row.client == "health":
        row.rates.append(result["bytes"] / size / result["seconds"])
        row.costs.append(spent * share / (result["bytes"] / size) * 1000)
    else:
        row.rates.append(result["bytes"] / result["seconds"] / 1e9)
        row.costs.append(spent * share / (result["bytes"] / 1e9))
        row.jain.append(result["jain"])


def warm_file(folder: Path, size: int) -> Path:
    """A published slice of random bytes, about `size` of them, that is in the page cache and on the disk."""
    publish_slices(folder / "store", groups=1, slice_bytes=size)
    path = folder / "store" / "current" / "group-0.safetensors"
    path.read_bytes()
    return path


@contextmanager
def whole_node(file: Path, *arguments: str, tls: tuple[Path, Path] | None = None) -> Iterator[Target]:
    """`bzstream serve` over the store that `warm_file` published; `arguments` and `tls` as `bench.node.serve` has."""
    (miner,) = miners(1)
    with serve(file.parent.parent, *arguments, callers=[miner], environment=UNLIMITED, tls=tls) as node:
        yield Target("127.0.0.1", node.port, SLICE, file.stat().st_size, node.process.pid, fields_of(miner))


def fields_of(miner: Miner) -> tuple[str, ...]:
    """The header fields with which a miner asks for the slice of group 0."""
    return f"Authorization: Bearer {miner.token}", f"X-Hotkey: {miner.hotkey}", "X-Expert-Group: 0"


def run(
    quick: bool = False,
    *,
    names: list[str] | None = None,
    counts: list[int] | None = None,
    clients: list[str] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    external: dict[str, Target] | None = None,
) -> list[Measurement]:
    """Measure; a row per server, number of connections and kind of client. What is not installed has an error."""
    names = names if names is not None else [NODE, *PEERS]
    counts = counts or ([8] if quick else [1, 8, 64, 256, 1000])
    clients = clients or (["discard"] if quick else ["discard", "copy"])  # for small requests there is bench.small
    seconds = seconds or (0.4 if quick else 1.2)
    rows: list[Measurement] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serve-")))
        file = warm_file(folder, QUICK_FILE_SIZE if quick else FILE_SIZE)
        targets = dict(external or {})
        for name in names:
            try:
                started = whole_node(file) if name == NODE else serving(name, file, folder)
                targets[name] = stack.enter_context(started)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                rows.append(Measurement(name, 0, "", error=str(error)))
        for client in clients:
            for count in [8] if client == "health" else counts:
                batch = [
                    Measurement(name, count, client) for name in targets if (client, name) != ("health", "C sendfile")
                ]
                for number in range(rounds or (1 if quick else ROUNDS[client])):
                    # Forward and backward by turns, so that a slow drift of the machine favours nobody.
                    for row in batch if number % 2 == 0 else reversed(batch):
                        if not row.error and (rounds or row.server not in FAR or number < FAR_ROUNDS):
                            measure_round(row, targets[row.server], seconds * (2 if count >= MANY else 1), folder)
                rows += batch
    return rows


def report(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Rows: every figure, and how bzstream compares with its peers; what is missing."""
    rows: list[dict[str, Any]] = []
    found = {(one.client, one.connections, one.server): one for one in measurements if one.rates}
    for (client, connections, server), one in found.items():
        health = client == "health"
        name = "/health, keep-alive" if health else f"{connections} connections, {client}ing client"
        facts: dict[str, Any] = {"connections": connections, "client": client, "peak_mib": one.peak_mib}
        if one.jain:
            facts["jain"] = min(one.jain)
        rows += [
            row_of(name, "1/s" if health else "GB/s", one.rates, subject=server, **facts),
            row_of(f"{name}: server CPU", "s/1000" if health else "s/GB", one.costs, subject=server, **facts),
        ]
    missing = [f"{one.server}: {one.error}" for one in measurements if one.error]
    return {"rows": rows + _comparisons(found), "missing": missing}


def _comparisons(found: Mapping[tuple[str, int, str], Measurement]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def compare(what: str, connections: int, peer: str, target: str, *, at: int = 0, subject: str = NODE) -> None:
        ours, theirs = found.get(("discard", connections, subject)), found.get(("discard", at or connections, peer))
        if ours is None or theirs is None:
            return
        speed = what == "speed"
        mine, others = (ours.rates, theirs.rates) if speed else (ours.costs, theirs.costs)
        rows.append(
            row_of(
                f"{what} at {connections:,} connections",
                "GB/s" if speed else "s/GB",
                mine,
                subject=subject,
                peer=f"its own at {at}" if at else peer,
                ratio=ratio_of(mine, others),
                target=target,
            )
        )

    nginx = [server for client, count, server in found if (client, count) == ("discard", 8) and "nginx" in server]
    best = max(nginx, key=lambda server: quantile(found["discard", 8, server].rates, 0.5), default="nginx")
    compare("speed", 8, LIMIT, ">= 0.95")
    compare("speed", 8, best, ">= 1.2")
    # What the limit has over nginx, so that one sees how much of that can be reached.
    compare("speed", 8, best, "", subject=LIMIT)
    compare("speed", 8, "FastAPI", ">= 5")
    compare("speed", 256, NODE, ">= 0.9", at=8)
    compare("speed", 1000, NODE, ">= 0.8", at=8)
    compare("server CPU", 8, LIMIT, "<= 1.1")
    compare("server CPU", 8, "FastAPI", "<= 0.5")
    return rows


def measure(
    quick: bool, servers: str, connections: str, clients: str, rounds: int | None, seconds: float | None,
    url: str, header: list[str], pid: int,
) -> dict[str, Any]:  # fmt: skip
    """Rows, and what is missing; the parameters are the options of the command."""
    external = {}
    if url:
        parts = urlsplit(url)
        head = Request(url, method="HEAD", headers=dict(h.split(": ", 1) for h in header))
        with urlopen(head, timeout=10) as answer:
            size = int(answer.headers["Content-Length"])
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        external["node"] = Target(host, port, path, size, pid or os.getpid(), tuple(header))
    return report(
        run(
            quick,
            names=servers.split(",") if servers else None,
            counts=[int(text) for text in connections.split(",")] if connections else None,
            clients=clients.split(",") if clients else None,
            rounds=rounds,
            seconds=seconds,
            external=external,
        )
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servers", default="", help=f"comma-separated; default: {', '.join([NODE, *PEERS])}")
    parser.add_argument("--connections", default="", help="comma-separated numbers")
    parser.add_argument("--clients", default="", help="comma-separated: discard, copy, health")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--url", default="", help="a running server to measure as `node`")
    parser.add_argument("--header", action="append", default=[], help="a request header for --url")
    parser.add_argument("--pid", type=int, default=0, help="the process behind --url, for its CPU time")


def main() -> None:
    command("serve", __doc__, measure, _options)


if __name__ == "__main__":
    main()
