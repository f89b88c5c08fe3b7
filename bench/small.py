"""Small requests: /health of the whole node beside FastAPI on uvicorn, with one worker each.

    python -m bench.small [--quick] [--json FILE]

Keep-alive connections ask again as soon as they are answered (small.c), 1 and 32 at once. Both answer JSON of the same
members; the node makes it afresh from what it knows of model, chain and ledger, FastAPI from a constant, with uvloop
and httptools, its fastest. They take turns; the median of the rounds' ratios counts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.command import command
from bench.native import compiled
from bench.node import publish_slices, serve
from bench.peers.servers import serving
from bench.rows import row_of
from bzstream.util.statistics import quantile

__all__ = ["measure"]

DRIVER = Path(__file__).with_name("small.c")
PEER = "FastAPI"
CONNECTIONS = (1, 32)


def ask(port: int, connections: int, seconds: float) -> dict[str, float]:
    """Ask /health for some seconds: answers a second, and latencies in ms. Raises RuntimeError for a wrong answer."""
    done = subprocess.run(
        [str(compiled(DRIVER)), "127.0.0.1", str(port), "/health", str(connections), str(seconds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 60,
    )
    if not done.stdout:
        raise RuntimeError(f"the driver failed: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    if found["error"]:
        raise RuntimeError(f"the driver saw: {found['error']}")
    return {"rate": found["answers"] / found["seconds"], "p50": found["p50"], "p99": found["p99"]}


def measure(quick: bool) -> dict[str, Any]:
    """Rows, and what is missing."""
    seconds, rounds = (0.5, 1) if quick else (3.0, 5)
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        publish_slices(folder / "store", groups=2, slice_bytes=1 << 20)
        node = stack.enter_context(serve(folder / "store"))
        ports = {"bzstream": node.port}
        try:
            ports[PEER] = stack.enter_context(serving(PEER, folder / "chain.json", folder)).port
        except (OSError, RuntimeError) as error:
            missing.append(f"{PEER}: {error}")
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        for turn in range(rounds):
            for connections in CONNECTIONS:
                for server in sorted(ports, reverse=bool(turn % 2)):
                    found.setdefault((server, connections), []).append(ask(ports[server], connections, seconds))
    rows = []
    for connections in CONNECTIONS:
        label = f"/health, {connections} keep-alive connection{'s' * (connections > 1)}"
        for server in ports:
            taken = found[server, connections]
            ratio = None
            if server != PEER and PEER in ports:
                theirs = found[PEER, connections]
                ratio = quantile([one["rate"] / two["rate"] for one, two in zip(taken, theirs, strict=True)], 0.5)
            peer, target = (PEER, ">= 1.5") if ratio is not None else ("", "")
            rates = [one["rate"] for one in taken]
            rows += [
                row_of(label, "1/s", rates, subject=server, peer=peer, ratio=ratio, target=target),
                *(row_of(f"{label}: {q}", "ms", [one[q] for one in taken], subject=server) for q in ("p50", "p99")),
            ]
    return {"rows": rows, "missing": missing}


def main() -> None:
    command("small", __doc__, measure)


if __name__ == "__main__":
    main()
