"""Where a worker's time goes while it sends: `python -m bench.profile [--connections 8,256] [--seconds 3]`.

perf samples the worker of a whole node under the discarding client; every sample is put down to the system call that it
was taken in, or to Python. The C sendfile loop is sampled beside it: what its row and ours have in common is the
kernel's price of moving bytes, the rest is ours. Needs perf (Debian: linux-perf) and the right to use it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psutil

from bench.peers.servers import Target, compiled, serving
from bench.serve import FILE_SIZE, RANGE, warm_file, whole_node

KINDS = {
    "sendfile64": "sendfile: pages to the socket",
    "futex": "futex: threads wait for each other",
    "epoll_wait": "epoll: what is ready",
    "epoll_pwait": "epoll: what is ready",
    "epoll_ctl": "epoll: what is ready",
    "cachestat": "cachestat: is it cached",
    "sendto": "send: heads",
    "recvfrom": "recv: requests",
}
SEND, OTHER, USER = "sendfile: pages to the socket", "kernel: all else", "Python"


def kind_of(symbols: list[str]) -> str:
    """What a sample belongs to. `symbols`: its stack, innermost first; kernel symbols of calls are `__x64_sys_NAME`."""
    for symbol in symbols:
        for prefix in ("__x64_sys_", "__arm64_sys_", "__se_sys_"):
            if symbol.startswith(prefix):
                return KINDS.get(symbol.removeprefix(prefix), OTHER)
    return (
        OTHER if any(symbol.startswith(("entry_SYSCALL", "do_syscall", "asm_", "el0_")) for symbol in symbols) else USER
    )


def worker_of(pid: int) -> int:
    """The process that sends: the HTTP worker of a node, or the one server itself."""
    for child in psutil.Process(pid).children(recursive=True):
        if child.cmdline()[-2:] == ["bzstream.node", "http"]:
            return int(child.pid)
    return pid


def sampled(target: Target, connections: int, seconds: float, folder: Path) -> dict[str, float]:
    """Samples by kind, as CPU seconds per GB sent, and the GB/s. Raises RuntimeError when perf or the client fails."""
    length = RANGE if connections > 8 else 0
    client = subprocess.Popen(
        [
            compiled("discard.c", folder), target.host, str(target.port), target.path, str(target.size),
            str(connections), str(seconds), "0", str(length), *target.headers,
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    data = folder / "perf.data"
    record = subprocess.run(
        ["perf", "record", "-q", "-g", "-F", "997", "-o", data, "-p", str(worker_of(target.pid)), "--", "sleep",
         str(seconds * 0.7)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    output, _ = client.communicate(timeout=seconds * 3 + 60)
    if record.returncode:
        raise RuntimeError(f"perf failed: {record.stderr.strip()[:200]}")
    result = json.loads(output)
    if result["error"]:
        raise RuntimeError(f"the client saw: {result['error']}")
    script = subprocess.run(
        ["perf", "script", "-i", data, "-F", "comm,ip,sym"], capture_output=True, text=True, check=True
    )
    found: Counter[str] = Counter()
    for sample in script.stdout.split("\n\n"):
        frames = [line.split(None, 1)[1] for line in sample.splitlines()[1:] if " " in line.strip()]
        if frames:
            found[kind_of(frames)] += 1
    rate = result["bytes"] / result["seconds"] / 1e9
    gigabytes = rate * seconds * 0.7
    return {"GB/s": rate, **{kind: count / 997 / gigabytes for kind, count in found.items()}}


def run(connections: list[int], seconds: float) -> dict[int, dict[str, dict[str, float]]]:
    """By number of connections and server, what `sampled` found."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-profile-")))
        file = warm_file(folder, FILE_SIZE)
        targets = {
            "bzstream": stack.enter_context(whole_node(file)),
            "C sendfile": stack.enter_context(serving("C sendfile", file, folder)),
        }
        return {
            count: {name: sampled(target, count, seconds, folder) for name, target in targets.items()}
            for count in connections
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a worker's time goes while it sends.")
    parser.add_argument("--connections", default="8,256", help="comma-separated numbers")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if shutil.which("perf") is None:
        parser.exit(1, "perf is not installed here (Debian: apt install linux-perf)\n")
    found = run([int(text) for text in options.connections.split(",")], options.seconds)
    for count, servers in found.items():
        for name, figures in servers.items():
            rate = figures.pop("GB/s")
            print(f"{name}, {count} connections: {rate:.2f} GB/s, CPU ms per GB by what it was spent on")
            for kind, cost in sorted(figures.items(), key=lambda item: -item[1]):
                print(f"  {cost * 1000:7.2f}  {kind}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
