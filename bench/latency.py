"""What the many do to the one: `python -m bench.latency [--quick]`.

- small requests (`/health`) while downloads saturate one worker, page cache warm and cold (the file is dropped from it
  before each window), and the longest stall;
- memory of a worker with 500 downloads, of an idle connection and of a download;
- fairness: 64 miners, half with 1 and half with 16 connections, all saturating; and, to see that it is the server that
  is fair, the same without the miners' names;
- 10,000 connections that send nothing or a byte a second: what they do to downloads, and that they are gone in time.

nginx is asked the first question too. Beside each answer stands what the machine itself added: the longest oversleep
of a process that only naps, and the time that the hypervisor took (watch.py). The silent crowd is a process of its own
(silence.c); downloads alone and beside it take turns, and medians count.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.command import command
from bench.native import compiled as compiled_here
from bench.peers.servers import Target, compiled, peak_memory, serving
from bench.rows import ratio_of, row_of
from bench.serve import FILE_SIZE, QUICK_FILE_SIZE, RANGE, warm_file
from bench.watch import watching

CORE = "http core"
"""bzstream's HTTP core over a file, in `peers/tiny.py`."""
PEER = "nginx aio"
OURS = "bzstream"
SILENCE = Path(__file__).with_name("silence.c")
FEW = 100
"""Descriptors of a worker that serves next to nobody, at most."""


def discard(
    target: Target,
    folder: Path,
    connections: int,
    seconds: float,
    *headers: str,
    miners: str = "1",
    ranged: bool = True,
) -> subprocess.Popen[str]:
    """A discarding client under way."""
    return subprocess.Popen(
        [
            compiled("discard.c", folder), target.host, str(target.port), target.path, str(target.size),
            str(connections), str(seconds), "0", str(RANGE if ranged else 0), *headers,
        ],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "DISCARD_MINERS": miners},
    )  # fmt: skip


def result(client: subprocess.Popen[str]) -> dict[str, float]:
    """What it measured. Raises RuntimeError when an answer was wrong."""
    output, _ = client.communicate(timeout=120)
    found: dict[str, float] = json.loads(output)
    if found["error"]:
        raise RuntimeError(f"the client saw: {found['error']}")
    return found


def probe(target: Target, folder: Path, seconds: float) -> dict[str, float]:
    """Latencies of /health in milliseconds."""
    done = subprocess.run(
        [compiled("probe.c", folder), target.host, str(target.port), "/health", str(seconds), "5"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def evict(file: Path) -> None:
    """Drop a file's clean pages from the page cache."""
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def longest_stall(folder: Path, since: int) -> float:
    """Milliseconds: the longest stall that the worker has told beyond byte `since` of its log."""
    lines = (folder / "http-core.log").read_text()[since:].splitlines()
    return max((float(line.split()[1]) * 1000 for line in lines if line.startswith("stall")), default=0.0)


def resident(pid: int) -> int:
    """Bytes resident now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def under_load(name: str, file: Path, folder: Path, count: int, cold: bool, seconds: float) -> dict[str, float]:
    """/health beside saturating downloads, for one window; a fresh server each time, so that stalls are its own."""
    with serving(name, file, folder) as target:
        if cold:
            evict(file)
        else:
            file.read_bytes()
        with watching(seconds) as machine:
            load = discard(target, folder, count, seconds)
            time.sleep(seconds * 0.2)
            found = probe(target, folder, seconds * 0.7)
            moved = result(load)
        stall = {"stall_ms": longest_stall(folder, 0)} if name == CORE else {}
        return {**found, **machine, **stall, "gb_s": moved["bytes"] / moved["seconds"] / 1e9}


def loads(
    file: Path, folder: Path, counts: list[int], seconds: float, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """`under_load` of us and of nginx by turns: rows, and what is missing."""
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for cold in (False, True):
        for count in counts:
            windows: dict[str, list[dict[str, float]]] = {CORE: [], PEER: []}
            for turn in range(rounds):
                for server in list(windows)[:: -1 if turn % 2 else 1]:
                    try:
                        windows[server].append(under_load(server, file, folder, count, cold, seconds))
                    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                        missing.append(f"{server}: {error}")
            label = f"beside {count} downloads, {'cold' if cold else 'warm'}"
            rows += load_rows(label, windows[CORE], windows[PEER] if cold else [])
            rows += load_rows(label, windows[PEER], [], subject=PEER)
    return rows, missing


def load_rows(
    label: str, windows: Sequence[Mapping[str, float]], peer: Sequence[Mapping[str, float]], subject: str = OURS
) -> list[dict[str, Any]]:
    """The rows of what `under_load` found, a window a round. `peer`: the same rounds of nginx, to be compared with."""
    if not windows:
        return []
    of = {part: [window[part] for window in windows] for part in windows[0]}
    ours = subject == OURS
    ratio = ratio_of(of["gb_s"], [window["gb_s"] for window in peer]) if peer else None
    compared: dict[str, Any] = {"peer": PEER, "ratio": ratio, "target": ">= 0.9"} if peer else {}
    rows = [
        row_of(f"/health p50 {label}", "ms", of["p50"], subject=subject),
        row_of(f"/health p99 {label}", "ms", of["p99"], subject=subject, target="<= 20" if ours else ""),
        row_of(f"downloads {label}", "GB/s", of["gb_s"], subject=subject, **compared),
    ]
    if "stall_ms" in of:
        rows.append(row_of(f"longest stall of the loop {label}", "ms", of["stall_ms"], target="<= 20"))
    if "nap_ms" in of:
        rows.append(row_of(f"machine: longest oversleep {label}", "ms", of["nap_ms"], subject=subject))
        rows.append(row_of(f"machine: stolen {label}", "share", of["steal"], subject=subject))
    return rows


def memory(file: Path, folder: Path) -> list[dict[str, Any]]:
    """Resident bytes of a worker, and what a connection adds to it."""
    with serving(CORE, file, folder) as target, ExitStack() as stack:
        probe(target, folder, 0.2)
        before = resident(target.pid)
        for _ in range(2000):
            client = stack.enter_context(socket.create_connection((target.host, target.port)))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        idle = (resident(target.pid) - before) / 2000
    with serving(CORE, file, folder) as target, ExitStack() as stack:
        probe(target, folder, 0.2)
        before = resident(target.pid)
        for _ in range(500):
            client = stack.enter_context(socket.create_connection((target.host, target.port)))
            client.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        now = resident(target.pid)
        return [
            row_of("memory of an idle connection", "KiB", [idle / 1024], target="<= 24"),
            row_of("memory of a download", "KiB", [(now - before) / 500 / 1024], target="<= 48"),
            row_of("memory of a worker with 500 downloads", "MiB", [peak_memory(target.pid) / 2**20], target="< 80"),
        ]


def fairness(file: Path, folder: Path, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Jain's index over 64 miners, every second one with 16 connections: told apart by name, and as one caller."""
    named: list[dict[str, float]] = []
    nameless: list[dict[str, float]] = []
    for _ in range(rounds):
        for windows, headers in ((named, ["X-Miner: miner-@"]), (nameless, [])):
            with serving(CORE, file, folder) as target:
                load = discard(target, folder, 32 + 32 * 16, seconds, *headers, miners="1,16")
                windows.append(result(load))
    name = "64 miners, half with 1 connection, half with 16: Jain's index"
    return [
        row_of(name, "", [one["jain"] for one in named], target=">= 0.97"),
        row_of(f"{name} when they are one caller", "", [one["jain"] for one in nameless]),
    ]


def silence(target: Target, size: int) -> subprocess.Popen[str]:
    """`size` connections that ask for nothing, all open; they go when its standard input is closed."""
    process = subprocess.Popen(
        [str(compiled_here(SILENCE)), target.host, str(target.port), str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "open\n":
        process.wait()
        raise RuntimeError(f"{size} silent connections could not be opened")
    return process


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def crowd(file: Path, folder: Path, seconds: float, size: int, rounds: int, patience: float) -> list[dict[str, Any]]:
    """`size` connections that send nothing or a byte a second, beside eight downloads; and those downloads alone.

    The last crowd stays until the server's time-outs have ended it, for `patience` seconds at most; the others leave.
    """
    shares, latencies, machines = [], [], []
    with serving(CORE, file, folder) as target:
        for turn in range(rounds):
            # The probe and the napper take part both times, so that the crowd is all that differs.
            with watching(seconds):
                load = discard(target, folder, 8, seconds, ranged=False)
                probe(target, folder, seconds)
                alone = result(load)
            silent = silence(target, size)
            begun = time.monotonic()
            try:
                with watching(seconds) as machine:
                    load = discard(target, folder, 8, seconds, ranged=False)
                    latencies.append(probe(target, folder, seconds))
                    beside = result(load)
                shares.append(beside["bytes"] / beside["seconds"] / (alone["bytes"] / alone["seconds"]))
                machines.append(machine)
                until = begun + (patience if turn == rounds - 1 else 0.0)
                while (left := descriptors(target.pid)) > FEW and time.monotonic() < until:
                    time.sleep(0.2)
                gone = time.monotonic() - begun
            finally:
                silent.communicate(timeout=60)
            while descriptors(target.pid) > FEW and time.monotonic() < begun + 90:
                time.sleep(0.1)
    naps = [one["nap_ms"] for one in machines]
    rows = crowd_rows(size, shares, [one["p99"] for one in latencies], naps)
    if patience:
        label = f"{size:,} silent connections"
        rows.append(row_of(f"{label}: the last was closed after", "s", [gone]))
        rows.append(row_of(f"{label}: descriptors left then", "", [left], target="<= 100"))
    return rows


def crowd_rows(size: int, shares: list[float], p99s: list[float], naps: list[float]) -> list[dict[str, Any]]:
    """What `size` silent connections did to the others, a value a round."""
    label = f"beside {size:,} silent connections"
    return [
        row_of(f"downloads {label}, of those alone", "x", shares, target=">= 0.95"),
        row_of(f"/health p99 {label}", "ms", p99s, target="<= 20"),
        row_of(f"machine: longest oversleep {label}", "ms", [max(naps)]),
    ]


def measure(quick: bool = False) -> dict[str, Any]:
    """Rows, and what is missing."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    seconds = 1.0 if quick else 5.0
    counts = [64] if quick else [64, 256, 1000]
    crowd_size = 1000 if quick else min(10_000, hard - 1000)
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as name:
        folder = Path(name)
        file = warm_file(folder, QUICK_FILE_SIZE if quick else FILE_SIZE)
        rows, missing = loads(file, folder, counts, 1.0 if quick else 3.0, 1 if quick else 3)
        rows += memory(file, folder)
        rows += fairness(file, folder, seconds, 1 if quick else 3)
        rows += crowd(file, folder, seconds, crowd_size, *((1, 0.0) if quick else (3, 60.0)))
    return {"rows": rows, "missing": missing}


def main() -> None:
    command("latency", __doc__, measure)


if __name__ == "__main__":
    main()
