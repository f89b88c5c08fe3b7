"""The client beside aria2c, curl, huggingface_hub and a bare recv_into loop: to disk, into tensors, over a long link.

    python -m bench.pull [--quick] [--json FILE] [--only disk,tensors,wan,memory]

All fetch the same slice from the same node, turn by turn, and the median of the turns counts. To disk the clock runs
until the file is durable: bzstream syncs by itself, the others are followed by `sync FILE`, and the disk is quiet
before each. bzstream is run as the command, so that its start is in the figure. Every result is compared with the
published hash once. The tensors' peer receives over as many connections into memory of the same kind, as fresh, and
checks nothing. (Before each of them as much memory is touched and let go, so that none pays by chance for what a
hypervisor has taken back.)

What this machine lets anybody reach is measured too. "disk alone" writes as many bytes from memory, past the page
cache; with a pull of next to nothing before it, that is the least that a pull can take. For tensors the limit is
arithmetic on CPU time, where node and client fill all cores: the bare loop and the node, of the same and the hash.
The link: network namespaces, 80 ms round trip, 0.1% loss each way, 1 Gbit/s, the server on cubic.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import resource
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.alone import HOTKEY, MIB
from bench.command import command
from bench.native import MissingPeer
from bench.node import publish_slices
from bench.peers.servers import cpu_seconds
from bench.rows import row_of
from bench.wan import wide_area
from bzstream.demo.running_node import clean_environment, running_node

__all__ = ["measure"]

TOKEN = secrets.token_hex(32)
LIMIT = "start, then disk alone"
PARTS = ("disk", "tensors", "wan", "memory")
ROUND_TRIP_MS, LOSS, BITS = 80.0, 0.001, 1e9
WAN_SIZE = 128 * MIB
"""A single stream takes two minutes for it."""


def measure(quick: bool = False, only: Sequence[str] = PARTS) -> dict[str, Any]:
    """Rows, notes and what was missing. `only`: the parts to measure."""
    size = 512 * MIB if quick else 2048 * MIB
    rounds = 2 if quick else 5
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as temporary:
        work = Path(temporary)
        publish_slices(work / "store", groups=1, slice_bytes=size)
        if set(only) & {"disk", "tensors", "memory"}:
            with node(work) as (url, pid):
                fetch = Fetch(url, work, pid)
                if "disk" in only:
                    rows += to_disk(fetch, rounds, missing)
                if "tensors" in only:
                    rows += to_tensors(fetch, rounds)
                if "memory" in only:
                    rows += peak_memory(fetch)
        if "wan" in only:
            shutil.rmtree(work / "store")
            publish_slices(work / "store", groups=1, slice_bytes=WAN_SIZE)
            try:
                rows += over_wan(work, 2 if quick else 5, missing, notes)
            except MissingPeer as error:
                missing.append(f"wide-area link: {error}")
    return {"rows": rows, "missing": missing, "notes": "; ".join(notes)}


@contextmanager
def node(work: Path, host: str = "127.0.0.1", before: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """`bzstream serve` on the bench's store, run after the words in `before`; its URL and process id."""
    with running_node(
        work, "--host", host, token=TOKEN, environment={"BZ_LOG_LEVEL": "error"},
        command=(*before, sys.executable, "-m", "bzstream"), wait=False,
    ) as running:  # fmt: skip
        url = f"http://{host}:{running.port}"
        probe = [*before, "curl", "-fs", "-o", "/dev/null", f"{url}/health"]
        running.wait_until(lambda: subprocess.run(probe, check=False).returncode == 0, "the node answers")
        yield url, running.process.pid


def environment(**more: str) -> dict[str, str]:
    # With bytecode, as every installed client has it: some shells forbid Python to write any.
    left_out = "PYTHONDONTWRITEBYTECODE"
    clean = {name: value for name, value in clean_environment().items() if name != left_out}
    return {**clean, "BZ_AUTH_TOKEN": TOKEN, **more}


def slice_of(work: Path) -> Path:
    """The published file that is fetched."""
    return work / "store" / "current" / "group-0.safetensors"


class Fetch:
    """The commands that fetch the slice of group 0, run after the words in `before`."""

    def __init__(self, url: str, work: Path, node_pid: int, before: Sequence[str] = ()) -> None:
        self.url = url
        self.node_pid = node_pid
        self.work = work
        self.before = list(before)
        self.payload = slice_of(work)
        self.size = self.payload.stat().st_size
        self._hash = ""
        self._checked: set[str] = set()

    def _headers(self, flag: str) -> list[str]:
        values = (f"Authorization: Bearer {TOKEN}", f"X-Hotkey: {HOTKEY}", "X-Expert-Group: 0")
        return [word for value in values for word in (flag, value)]

    def _slice(self) -> str:
        return f"{self.url}/model/partial?format=safetensors"

    def bzstream(self, verify: str) -> Figures:
        out = self.work / "out"
        return self._timed(
            f"bzstream {verify}",
            out / "group-0.safetensors",
            [sys.executable, "-m", "bzstream", "pull", self.url, "--group", "0", "--hotkey", HOTKEY, "--out", str(out),
             "--verify", verify],
        )  # fmt: skip

    def next_to_nothing(self) -> Figures:
        """bzstream with the shared tensors, 2 KiB here: what a pull takes beside its bytes."""
        out = self.work / "out"
        command = [
            sys.executable,
            "-m",
            "bzstream",
            "pull",
            self.url,
            "--shared",
            "--hotkey",
            HOTKEY,
            "--out",
            str(out),
        ]
        return self._timed("", out / "shared.safetensors", command)

    def aria2c(self) -> Figures:
        file = self.work / "out" / "aria2c.bin"
        return self._timed(
            "aria2c", file,
            ["aria2c", "-q", "-x16", "-s16", "-k1M", "--auto-file-renaming=false", "-d", str(file.parent),
             "-o", file.name, *self._headers("--header"), self._slice()],
            sync=True,
        )  # fmt: skip

    def curl(self) -> Figures:
        file = self.work / "out" / "curl.bin"
        return self._timed(
            "curl", file, ["curl", "-fsS", "-o", str(file), *self._headers("-H"), self._slice()], sync=True
        )

    def hugging_face(self) -> Figures:
        file = self.work / "out" / "hf.bin"
        fields = self._headers("")[1::2]
        command = [sys.executable, "-m", "bench.peers.hf_get", self._slice(), str(file), str(self.size), *fields]
        return self._timed("huggingface_hub", file, command, sync=True)

    def _timed(self, name: str, file: Path, command: list[str], *, sync: bool = False) -> Figures:
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir()
        os.sync()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run(self.before + command, env=environment(), capture_output=True, text=True, check=False)
        if sync:
            subprocess.run(["sync", str(file)], check=True)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            raise RuntimeError(f"{name} failed: {(done.stderr or done.stdout)[-300:]}")
        if name:
            self._check(name, file)
        shutil.rmtree(file.parent)
        return Figures(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def _check(self, name: str, file: Path) -> None:
        """The size each time, the hash the first time."""
        if file.stat().st_size != self.size:
            raise RuntimeError(f"{name} wrote {file.stat().st_size} bytes of {self.size}")
        if name not in self._checked:
            self._checked.add(name)
            self._hash = self._hash or sha256(self.payload)
            if sha256(file) != self._hash:
                raise RuntimeError(f"{name} wrote other bytes than were published")


class Figures:
    """One run: wall and CPU seconds of the client."""

    def __init__(self, seconds: float, cpu: float) -> None:
        self.seconds = seconds
        self.cpu = cpu


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def turns(rounds: int, subjects: dict[str, Callable[[], Figures]]) -> dict[str, list[Figures]]:
    """Every subject once a round, in the same order; one round before does not count."""
    for subject in subjects.values():
        subject()
    found: dict[str, list[Figures]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            found[name].append(subject())
    return found


def peers(missing: list[str], fetch: Fetch) -> dict[str, Callable[[], Figures]]:
    found: dict[str, Callable[[], Figures]] = {}
    for name, call in (("aria2c", fetch.aria2c), ("curl", fetch.curl)):
        if shutil.which(name):
            found[name] = call
        elif f"{name} is not here" not in missing:
            missing.append(f"{name} is not here")
    return found


def compare(
    label: str, size: int, found: dict[str, list[Figures]], targets: dict[tuple[str, str], str]
) -> list[dict[str, Any]]:
    """Speed rows of all, with a row for each (subject, peer) that has a target, and CPU rows."""
    median = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        speeds = [size / run.seconds / 1e9 for run in runs]
        against = [(peer, target) for (subject, peer), target in targets.items() if subject == name and peer in found]
        for peer, target in against or [("", "")]:
            ratio = median[peer] / median[name] if peer else None
            rows.append(row_of(label, "GB/s", speeds, subject=name, peer=peer, ratio=ratio, target=target))
    for name, runs in found.items():
        rows.append(row_of(f"{label}: CPU", "s/GB", [run.cpu / size * 1e9 for run in runs], subject=name))
    return rows


def to_disk(fetch: Fetch, rounds: int, missing: list[str]) -> list[dict[str, Any]]:
    def disk_alone() -> Figures:
        os.sync()
        found, _ = inner(fetch, "disk")
        shutil.rmtree(fetch.work / "inner")
        return found

    subjects: dict[str, Callable[[], Figures]] = {
        "bzstream blake3": lambda: fetch.bzstream("blake3"),
        "bzstream sha256": lambda: fetch.bzstream("sha256"),
        **peers(missing, fetch),
        "disk alone": disk_alone,
    }
    if importlib.util.find_spec("huggingface_hub") is not None:
        subjects["huggingface_hub"] = fetch.hugging_face
    else:
        missing.append("huggingface_hub is not here")
    targets = {
        (f"bzstream {v}", p): t for v, t in (("blake3", ">= 2.5"), ("sha256", ">= 1")) for p in ("aria2c", "curl")
    }
    targets["bzstream blake3", LIMIT] = ""
    targets[LIMIT, "curl"] = ""
    found = turns(rounds, {**subjects, "": fetch.next_to_nothing})
    starts = found.pop("")
    found[LIMIT] = [
        Figures(start.seconds + disk.seconds, start.cpu + disk.cpu)
        for start, disk in zip(starts, found["disk alone"], strict=True)
    ]
    rows = compare("pull to disk", fetch.size, found, targets)
    return [*rows, row_of("pull of 2 KiB", "s", [run.seconds for run in starts], subject="bzstream")]


def over_wan(work: Path, rounds: int, missing: list[str], notes: list[str]) -> list[dict[str, Any]]:
    with (
        wide_area(round_trip_ms=ROUND_TRIP_MS, loss=LOSS, bits_per_second=BITS) as link,
        node(work, link.address, link.server) as (url, pid),
    ):
        notes.append(f"wide-area link: {link.how}")
        fetch = Fetch(url, work, pid, link.client)
        subjects = {"bzstream sha256": lambda: fetch.bzstream("sha256"), **peers(missing, fetch)}
        once = {name: subjects.pop(name) for name in ("curl",) if name in subjects}
        found = turns(rounds, subjects) | {name: [call()] for name, call in once.items()}
        targets = {("bzstream sha256", "aria2c"): ">= 0.9", ("bzstream sha256", "curl"): ">= 2"}
        return compare("pull over a wide-area link", fetch.size, found, targets)


def to_tensors(fetch: Fetch, rounds: int) -> list[dict[str, Any]]:
    node_cpu: list[float] = []

    def bare() -> Figures:
        before = cpu_seconds(fetch.node_pid)
        found, _ = inner(fetch, "bare")
        node_cpu.append(cpu_seconds(fetch.node_pid) - before)
        return found

    def tensors() -> Figures:
        return inner(fetch, "tensors")[0]

    def hash_alone() -> Figures:
        return inner(fetch, "hash")[0]

    names = ours, peer, hashing = "bzstream blake3", "bare recv_into", "hash alone"
    found = turns(rounds, dict(zip(names, (tensors, bare, hash_alone), strict=True)))
    hashes = found.pop(hashing)
    rows = compare("fetch_tensors", fetch.size, found, {(ours, peer): ">= 0.8"})
    both = [run.cpu + more for run, more in zip(found[peer], node_cpu[1:], strict=True)]
    limits = [least / (least + run.cpu) for least, run in zip(both, hashes, strict=True)]
    for name, values in ((hashing, [run.cpu for run in hashes]), ("the node for the bare loop", node_cpu[1:])):
        rows.append(row_of("fetch_tensors: CPU", "s/GB", [one / fetch.size * 1e9 for one in values], subject=name))
    return [*rows, row_of("fetch_tensors: limit where CPU time is all", "x", limits, subject=f"of {peer}")]


def peak_memory(fetch: Fetch) -> list[dict[str, Any]]:
    """Peak resident memory of a process that does nothing else."""
    rows = []
    for what, name, over in (
        ("pull", "peak memory of a pull", 0),
        ("tensors", "peak memory of fetch_tensors beyond its payload", fetch.size),
    ):
        _, peak = inner(fetch, what)
        rows.append(row_of(name, "MiB", [(peak - over) / MIB], target="< 200"))
    return rows


def inner(fetch: Fetch, what: str) -> tuple[Figures, int]:
    """Run one of `bench.alone`: its figures without start-up, its peak memory in bytes.

    numpy's BLAS has no threads of its own there: they spin for a while after the import.
    """
    command = [sys.executable, "-m", "bench.alone", what, fetch.url, str(fetch.work / "inner"), str(fetch.size)]
    settings = environment(OPENBLAS_NUM_THREADS="1")
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed: {done.stderr[-500:]}")
    found = json.loads(done.stdout)
    return Figures(found["seconds"], found["cpu"]), found["peak"]


def main() -> None:
    # A bench that is ended from outside still takes its namespaces and files away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command(
        "pull",
        __doc__,
        measure,
        lambda parser: parser.add_argument(
            "--only", type=lambda text: text.split(","), default=PARTS, help=f"some of {','.join(PARTS)}"
        ),
    )


if __name__ == "__main__":
    main()
