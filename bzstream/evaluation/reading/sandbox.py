"""The process that reads a miner's file: it can read that one file, answer once, and nothing else.

The readers are written to be safe; this is for the day when they are not. Each file gets a fresh process that holds
no secret (its environment is empty) and gives up, before it looks at the first byte, everything it will not need:

- `RLIMIT_AS` and `RLIMIT_CPU` bound its memory and time, `RLIMIT_FSIZE` 0 and `RLIMIT_NOFILE` its files,
  `RLIMIT_CORE` 0 its last words; `PR_SET_PDEATHSIG` ends it with its parent; `no_new_privs` holds for ever;
- a seccomp filter of some thirty system calls leaves it `read`, `pread`, `write` and memory. It cannot open a file,
  make a socket, start a program or a process: those calls return EPERM.

The answer crosses a socket pair as one JSON line, and the parent believes only what it can check: dtypes out of the
allowed ones, byte ranges inside the file. A process costs 0.1 s to start, so `warm_up` starts the next one ahead,
while its file is still being fetched.

seccomp is Linux on x86-64 and arm64; elsewhere, or where the kernel refuses, the limits alone hold, and
`Reader.confinement` says which.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from bzstream.evaluation.reading.specs import TensorLocation, TensorSpec, allowed_dtypes, item_size
from bzstream.evaluation.rejection_codes import REJECTED, Failure, Refusal
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = ["Reader"]

_MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of a worker's answer: 100 bytes a tensor of the largest slice leave room to spare."""

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]\n"
    "from bzstream.evaluation.reading.sandbox_worker import main; main(int(sys.argv[1]))"
)


class _Worker:
    """One process, used for one file."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -I: no environment, no user site, no current folder; the parent's own path is passed word for word.
            path = [entry for entry in sys.path if entry]
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, str(theirs.fileno()), *path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self.socket = ours

    def close(self) -> int:
        """Kill and reap; the exit status (negative: the signal that ended it)."""
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


class Reader:
    """Reads hostile files, one process a file. Blocking: call it from a thread. Several threads may share one.

    `memory` is what a reading process may use above an idle one, in bytes; `timeout` the seconds a file may take.
    """

    def __init__(self, *, memory: int, timeout: float) -> None:
        self._memory = memory
        self._timeout = timeout
        self._lock = threading.Lock()
        # The kernel sends PR_SET_PDEATHSIG when the *thread* that started a process ends: one thread starts them all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._warm: Future[_Worker] | None = None
        self._busy: set[_Worker] = set()
        self._closed = False
        self.confinement = "unknown"
        """How the last file was read: "seccomp" or "limits"."""

    def read(self, fd: int, size: int, specs: Sequence[TensorSpec], bound: int) -> list[TensorLocation]:
        """Where each specs tensor lies in the open file of `size` bytes; every check of `readers` has passed.

        `bound`: magnitudes of 2**bound or more are refused (`BaselineModel.value_bound`).

        Raises Refusal for the file's fault and Failure `reader_crashed` for ours.
        """
        worker = self._take()
        try:
            deadline = time.monotonic() + self._timeout
            job: dict[str, object] = {"size": size, "memory": self._memory, "cpu": int(self._timeout) + 1}
            job |= {"specs": specs, "bound": bound}
            try:
                socket.send_fds(worker.socket, [len(body := json.dumps(job).encode()).to_bytes(8, "little")], [fd])
                worker.socket.settimeout(self._timeout)
                worker.socket.sendall(body)
                answer = self._answer(worker, deadline)
            except OSError:
                answer = b""
            return self._parse_answer(answer, worker, size, specs)
        finally:
            with self._lock:
                self._busy.discard(worker)
                if self._closed:
                    worker.close()
                else:
                    self._starter.submit(worker.close)  # the kernel takes its time over a process: not on our path

    def warm_up(self) -> None:
        """A file will come soon: start its process now, so that it is ready when the file is. Does not wait."""
        with self._lock:
            if self._warm is None and not self._closed:
                self._warm = self._starter.submit(_Worker)

    def close(self) -> None:
        """End every process; reads under way raise Failure."""
        with self._lock:
            self._closed = True
            busy, warm = list(self._busy), self._warm
            self._warm = None
        for worker in busy:
            worker.process.kill()  # the thread that reads with it closes it
        if warm is not None:
            warm.result().close()
        self._starter.shutdown()

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise Failure("reader_crashed", "the reader is closed")
            future, self._warm = self._warm or self._starter.submit(_Worker), None
        worker = future.result()
        with self._lock:
            self._busy.add(worker)
        return worker

    def _answer(self, worker: _Worker, deadline: float) -> bytes:
        received = bytearray()
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([worker.socket], [], [], left)[0]:
                raise Refusal("too_costly", f"reading the file took longer than {self._timeout:g} s")
            piece = worker.socket.recv(1 << 16)
            received += piece
            if not piece or len(received) > _MAX_ANSWER:
                return bytes(received)

    def _parse_answer(
        self, answer: bytes, worker: _Worker, size: int, specs: Sequence[TensorSpec]
    ) -> list[TensorLocation]:
        """Turn an answer into ranges that hold whatever the worker became."""
        try:
            document = parse_json_object(answer, max_depth=4)
            if "code" in document:
                code, detail = str(document["code"]), str(document["detail"])[:400]
                if code in REJECTED:
                    raise Refusal(code, detail)
                raise Failure("reader_crashed", detail)
            self.confinement = "seccomp" if document["seccomp"] else "limits"
            found = document["found"]
            locations: list[TensorLocation] = []
            for spec, (dtype, offset) in zip(specs, found, strict=True):
                if dtype not in allowed_dtypes(spec.dtype) or type(offset) is not int:
                    raise ValueError
                nbytes = spec.nbytes // item_size(spec.dtype) * item_size(dtype)
                if not 0 <= offset <= size - nbytes:
                    raise ValueError
                locations.append(TensorLocation(spec.name, dtype, spec.shape, offset, nbytes))
            return locations
        except (JsonError, ValueError, KeyError, TypeError):
            pass
        status = worker.close()
        if status == -signal.SIGXCPU:
            raise Refusal("too_costly", "reading the file took more processor time than any honest file")
        raise Failure("reader_crashed", f"the reading process ended with status {status}")
