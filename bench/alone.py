"""One client, or one part of the machine, alone in a process: `python -m bench.alone WHAT URL FOLDER SIZE`.

`bench.pull` runs it for what is no command of its own: `tensors` and `pull` through the Python API, the `bare` loop
beside them, and the limits: the `disk` and the `hash` with nothing else. URL: a node with the slice of group 0, of SIZE
bytes; FOLDER: where files go. Prints a JSON line: `seconds` and `cpu` without start-up, and `peak`, bytes resident.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import blake3

import bzstream
from bzstream.client import Tuning

__all__ = ["HOTKEY", "MIB"]

HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
MIB = 1024 * 1024


def tensors(url: str, folder: Path, size: int) -> None:
    bzstream.fetch_tensors(url, 0, hotkey=HOTKEY)


def disk(url: str, folder: Path, size: int) -> None:
    """As many bytes as the slice has, from memory to the disk past the page cache: what no client here can exceed."""
    block, writers = MIB, 8
    folder.mkdir()
    fd = os.open(folder / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, size)

    def write(number: int) -> None:
        area = mmap.mmap(-1, block)
        area.write(os.urandom(block))
        for position in range(number * block, size, writers * block):
            os.pwrite(fd, area, position)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.ftruncate(fd, size)
    os.fsync(fd)
    os.close(fd)


def hash_alone(url: str, folder: Path, size: int) -> None:
    """The slice's size through BLAKE3, from memory that stays in the cache, with all cores at it."""
    piece = os.urandom(MIB)
    cores = os.cpu_count() or 1

    def work() -> None:
        hasher = blake3.blake3()
        for _ in range(size // MIB // cores):
            hasher.update(piece)

    threads = [threading.Thread(target=work) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pull(url: str, folder: Path, size: int) -> None:
    bzstream.pull(url, out=folder, groups=[0], hotkey=HOTKEY)
    shutil.rmtree(folder)


def bare(url: str, folder: Path, size: int) -> None:
    """Fill fresh memory of the same kind over as many connections; nothing is checked but the number of bytes."""
    host, port = url.removeprefix("http://").split(":")
    request = (
        f"GET /model/partial?format=safetensors HTTP/1.1\r\nHost: {host}\r\nX-Hotkey: {HOTKEY}\r\nX-Expert-Group: 0\r\n"
        f"Authorization: Bearer {os.environ['BZ_AUTH_TOKEN']}\r\nRange: bytes="
    )
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(area)
    lanes = Tuning().near_workers
    filled = [0] * lanes

    def lane(number: int) -> None:
        begin, end = size * number // lanes, size * (number + 1) // lanes
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(f"{request}{begin}-{end - 1}\r\n\r\n".encode())
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            while begin < end:
                count = sock.recv_into(memory[begin:end])
                filled[number] += count
                begin += count

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if sum(filled) != size:
        raise RuntimeError("the bare loop did not get everything")


SUBJECTS: dict[str, Callable[[str, Path, int], None]] = {
    "tensors": tensors,
    "pull": pull,
    "bare": bare,
    "disk": disk,
    "hash": hash_alone,
}


def touch(size: int) -> None:
    """Use so much fresh memory, and let it go."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            area[at] = 1


def main(what: str, url: str, folder: str, size: str) -> None:
    importlib.import_module("numpy")  # which the tensors need; imports are not what is measured
    touch(int(size))
    # The peak from here on.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    SUBJECTS[what](url, Path(folder), int(size))
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    # Not ru_maxrss: a child inherits that of the process that started it.
    peak = int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
