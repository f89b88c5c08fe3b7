"""How long a newcomer waits for its first byte: `python -m bench.first_byte [--quick] [--json FILE]`

Again and again a new miner connects and asks for its slice, and the clock runs from before it connects until the first
byte of the body is there (first_byte.c): with nothing else to do, and beside 64 downloads that saturate the worker,
each of a miner of its own, so that the newcomer is one caller among 65. The whole node and nginx take turns, one worker
each. Above a few milliseconds it is turns and cores that are waited for, and the same client waits for them with nginx.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.command import command
from bench.native import compiled
from bench.node import miners, serve
from bench.peers.servers import Target, serving
from bench.peers.servers import compiled as compiled_peer
from bench.rows import row_of
from bench.serve import FILE_SIZE, QUICK_FILE_SIZE, RANGE, SLICE, UNLIMITED, fields_of, warm_file

__all__ = ["measure"]

DRIVER = Path(__file__).with_name("first_byte.c")
DOWNLOADS = 64
INTERVAL_MS = 50
NODE, PEER = "bzstream", "nginx aio"
RAMP_S = 0.3
"""After which the downloads are under way."""


def newcomers(target: Target, seconds: float) -> dict[str, float]:
    """Milliseconds until the first byte: p50, p99 and longest. Raises RuntimeError for a wrong answer."""
    done = subprocess.run(
        [
            str(compiled(DRIVER)), target.host, str(target.port), target.path, str(target.size), str(seconds),
            str(INTERVAL_MS), *target.headers,
        ],
        capture_output=True, text=True, check=False, timeout=seconds + 60,
    )  # fmt: skip
    if not done.stdout:
        raise RuntimeError(f"the client failed: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    if found["error"]:
        raise RuntimeError(f"the newcomer saw: {found['error']}")
    return found


def downloads(target: Target, fields: Path | None, seconds: float, folder: Path) -> subprocess.Popen[str]:
    """`DOWNLOADS` miners that fetch range after range, each with the header fields of its line in `fields`."""
    return subprocess.Popen(
        [
            compiled_peer("discard.c", folder), target.host, str(target.port), target.path, str(target.size),
            str(DOWNLOADS), str(seconds), "0", str(min(RANGE, target.size)),
        ],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **({"DISCARD_FIELDS": str(fields)} if fields else {})},
    )  # fmt: skip


def beside(target: Target, fields: Path | None, seconds: float, folder: Path) -> tuple[dict[str, float], float]:
    """The newcomers' wait beside saturating downloads, and those downloads' GB/s."""
    load = downloads(target, fields, seconds + 2 * RAMP_S, folder)
    time.sleep(RAMP_S)
    found = newcomers(target, seconds)
    moved: dict[str, Any] = json.loads(load.communicate(timeout=120)[0])
    if moved["error"]:
        raise RuntimeError(f"a download saw: {moved['error']}")
    return found, moved["bytes"] / moved["seconds"] / 1e9


def measure(quick: bool) -> dict[str, Any]:
    """Rows, and what is missing."""
    seconds, rounds = (0.5, 1) if quick else (3.0, 3)
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        file = warm_file(folder, QUICK_FILE_SIZE if quick else FILE_SIZE)
        newcomer, *others = miners(1 + DOWNLOADS)
        fields = folder / "fields"
        fields.touch(mode=0o600)
        fields.write_text("".join("\t".join(fields_of(one)) + "\n" for one in others), encoding="utf-8")
        node = stack.enter_context(serve(file.parent.parent, callers=[newcomer, *others], environment=UNLIMITED))
        size = file.stat().st_size
        targets = {NODE: Target("127.0.0.1", node.port, SLICE, size, node.process.pid, fields_of(newcomer))}
        try:
            targets[PEER] = stack.enter_context(serving(PEER, file, folder))
        except (OSError, RuntimeError) as error:
            missing.append(f"{PEER}: {error}")
        idle: dict[str, list[dict[str, float]]] = {server: [] for server in targets}
        loaded: dict[str, list[dict[str, float]]] = {server: [] for server in targets}
        speeds: dict[str, list[float]] = {server: [] for server in targets}
        for turn in range(rounds):
            for server in sorted(targets, reverse=bool(turn % 2)):
                target = targets[server]
                idle[server].append(newcomers(target, seconds))
                # To nginx all callers are one.
                found, speed = beside(target, fields if server == NODE else None, seconds, folder)
                loaded[server].append(found)
                speeds[server].append(speed)
    rows = []
    for where, taken in (("idle", idle), (f"beside {DOWNLOADS} downloads", loaded)):
        for server, windows in taken.items():
            rows += [
                row_of(f"first byte, {where}: {part}", "ms", [window[part] for window in windows], subject=server)
                for part in ("p50", "p99")
            ]
    rows += [row_of("those downloads", "GB/s", speeds[server], subject=server) for server in targets]
    return {"rows": rows, "missing": missing}


def main() -> None:
    command("first_byte", __doc__, measure)


if __name__ == "__main__":
    main()
