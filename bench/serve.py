"""Server throughput beside the peers: `python -m bench.serve [--quick]`.

One worker each serves the same warm file to a client that throws the bytes away (`peers/discard.c`). All peers are
driven in the same run, in alternating rounds; medians are shown. Every answer's status and byte count are checked by
the client, and a single wrong one fails the row. Up to eight connections ask for whole files; more ask for ranges of
64 MiB, so that answers also end while it is measured.

`bzstream` is the whole node, `bzstream serve` with its supervisor, chain role, tokens, logs and metrics, and its CPU is
that of all its processes; `http core` is its HTTP room alone. The file is the slice that the node serves.
`--url` adds a server that is already running: `--url http://127.0.0.1:8000/model/partial --header
'Authorization: Bearer …' --pid PID`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from bench.node import Miner, miners, publish_slices, serve
from bench.peers.servers import PEERS, Target, compiled, cpu_seconds, peak_memory, serving

FILE_SIZE, QUICK_FILE_SIZE = 2 << 30, 256 << 20
RANGE = 64 << 20
HEALTH_PATH = "/health"
NODE = "bzstream"
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
class Row:
    """One server at one number of connections, over all rounds."""

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

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def cost(self) -> float:
        return statistics.median(self.costs) if self.costs else 0.0


def measure(row: Row, target: Target, seconds: float, folder: Path) -> None:
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
) -> list[Row]:
    """Measure; a row per server, number of connections and kind of client. What is not installed has an error."""
    names = names if names is not None else [NODE, *PEERS]
    counts = counts or ([8] if quick else [1, 8, 64, 256, 1000])
    clients = clients or (["discard"] if quick else ["discard", "copy"])  # for small requests there is bench.small
    seconds = seconds or (0.4 if quick else 1.2)
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serve-")))
        file = warm_file(folder, QUICK_FILE_SIZE if quick else FILE_SIZE)
        targets = dict(external or {})
        for name in names:
            try:
                started = whole_node(file) if name == NODE else serving(name, file, folder)
                targets[name] = stack.enter_context(started)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                rows.append(Row(name, 0, "", error=str(error)))
        for client in clients:
            for count in [8] if client == "health" else counts:
                batch = [Row(name, count, client) for name in targets if (client, name) != ("health", "C sendfile")]
                for number in range(rounds or (1 if quick else ROUNDS[client])):
                    # Forward and backward by turns, so that a slow drift of the machine favours nobody.
                    for row in batch if number % 2 == 0 else reversed(batch):
                        if not row.error and (rounds or row.server not in FAR or number < FAR_ROUNDS):
                            measure(row, targets[row.server], seconds * (2 if count >= MANY else 1), folder)
                rows += batch
    return rows


def show(rows: list[Row]) -> None:
    """The table, and where bzstream stands to the others."""
    print(f"{'server':16} {'client':8} {'conns':>5} {'rate':>9} {'spread':>15} {'CPU s/GB':>9} {'jain':>6} {'MiB':>6}")
    for row in rows:
        if row.error:
            print(f"{row.server:16} {row.client:8} {row.connections:5} {row.error[:90]}")
            continue
        spread = f"{min(row.rates):.2f}-{max(row.rates):.2f}" if row.client != "health" else ""
        jain = f"{min(row.jain):.3f}" if row.jain else ""
        print(
            f"{row.server:16} {row.client:8} {row.connections:5} {row.rate:9.2f} {spread:>15} {row.cost:9.4f} "
            f"{jain:>6} {row.peak_mib:6.0f}"
        )
    for client, count in dict.fromkeys((row.client, row.connections) for row in rows if row.rates):
        these = {row.server: row for row in rows if (row.client, row.connections) == (client, count) and row.rates}
        ours = these.pop(NODE, None)
        if ours is not None and these:
            ratios = ", ".join(f"{ours.rate / row.rate:.2f}x {name}" for name, row in these.items())
            print(f"bzstream, {client}, {count} connections: {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Server throughput beside the peers.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--servers", help=f"comma-separated; default: {', '.join([NODE, *PEERS])}")
    parser.add_argument("--connections", help="comma-separated numbers")
    parser.add_argument("--clients", help="comma-separated: discard, copy, health")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--url", help="a running server to measure as `node`")
    parser.add_argument("--header", action="append", default=[], help="a request header for --url")
    parser.add_argument("--pid", type=int, help="the process behind --url, for its CPU time")
    options = parser.parse_args()
    external = {}
    if options.url:
        url = urlsplit(options.url)
        head = Request(options.url, method="HEAD", headers=dict(h.split(": ", 1) for h in options.header))
        with urlopen(head, timeout=10) as answer:
            size = int(answer.headers["Content-Length"])
        path = url.path + (f"?{url.query}" if url.query else "")
        host, port = url.hostname or "127.0.0.1", url.port or 80
        external["node"] = Target(host, port, path, size, options.pid or os.getpid(), tuple(options.header))
    rows = run(
        options.quick,
        names=options.servers.split(",") if options.servers else None,
        counts=[int(text) for text in options.connections.split(",")] if options.connections else None,
        clients=options.clients.split(",") if options.clients else None,
        rounds=options.rounds,
        seconds=options.seconds,
        external=external,
    )
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([{**asdict(row), "rate": row.rate, "cost": row.cost} for row in rows]))


if __name__ == "__main__":
    main()
