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

from bzstream.evaluation.codes import REJECTED, Failure, Refusal
from bzstream.evaluation.ptfile import ITEM_SIZES, Stored
from bzstream.evaluation.readers import Wanted, allowed_dtypes

__all__ = ["Reader"]

_MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of a child's answer: 100 bytes a tensor of the largest slice leave room to spare."""

_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from bzstream.evaluation.child import main; main(int(sys.argv[1]))"


class _Child:
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
        self._warm: Future[_Child] | None = None
        self._busy: set[_Child] = set()
        self._closed = False
        self.confinement = "unknown"
        """How the last file was read: "seccomp" or "limits"."""

    def read(self, fd: int, size: int, wanted: Sequence[Wanted], bound: int) -> list[Stored]:
        """Where each wanted tensor lies in the open file of `size` bytes; every check of `readers` has passed.

        `bound`: magnitudes of 2**bound or more are refused (`Published.value_bound`).

        Raises Refusal for the file's fault and Failure `reader_crashed` for ours.
        """
        child = self._take()
        try:
            deadline = time.monotonic() + self._timeout
            job: dict[str, object] = {"size": size, "memory": self._memory, "cpu": int(self._timeout) + 1}
            job |= {"wanted": wanted, "bound": bound}
            try:
                socket.send_fds(child.socket, [len(body := json.dumps(job).encode()).to_bytes(8, "little")], [fd])
                child.socket.settimeout(self._timeout)
                child.socket.sendall(body)
                answer = self._answer(child, deadline)
            except OSError:
                answer = b""
            return self._judge(answer, child, size, wanted)
        finally:
            with self._lock:
                self._busy.discard(child)
                if self._closed:
                    child.close()
                else:
                    self._starter.submit(child.close)  # the kernel takes its time over a process: not on our path

    def warm_up(self) -> None:
        """A file will come soon: start its process now, so that it is ready when the file is. Does not wait."""
        with self._lock:
            if self._warm is None and not self._closed:
                self._warm = self._starter.submit(_Child)

    def close(self) -> None:
        """End every process; reads under way raise Failure."""
        with self._lock:
            self._closed = True
            busy, warm = list(self._busy), self._warm
            self._warm = None
        for child in busy:
            child.process.kill()  # whoever reads with it closes it
        if warm is not None:
            warm.result().close()
        self._starter.shutdown()

    def _take(self) -> _Child:
        with self._lock:
            if self._closed:
                raise Failure("reader_crashed", "the reader is closed")
            future, self._warm = self._warm or self._starter.submit(_Child), None
        child = future.result()
        with self._lock:
            self._busy.add(child)
        return child

    def _answer(self, child: _Child, deadline: float) -> bytes:
        received = bytearray()
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.socket], [], [], left)[0]:
                raise Refusal("too_costly", f"reading the file took longer than {self._timeout:g} s")
            piece = child.socket.recv(1 << 16)
            received += piece
            if not piece or len(received) > _MAX_ANSWER:
                return bytes(received)

    def _judge(self, answer: bytes, child: _Child, size: int, wanted: Sequence[Wanted]) -> list[Stored]:
        """Turn an answer into ranges that hold whatever the child became."""
        try:
            document = json.loads(answer)
            if "code" in document:
                code, detail = str(document["code"]), str(document["detail"])[:400]
                if code in REJECTED:
                    raise Refusal(code, detail)
                raise Failure("reader_crashed", detail)
            self.confinement = "seccomp" if document["seccomp"] else "limits"
            found = document["found"]
            if len(found) != len(wanted):
                raise ValueError
            stored: list[Stored] = []
            for w, (dtype, offset) in zip(wanted, found, strict=True):
                nbytes = w.nbytes // ITEM_SIZES[w.dtype] * ITEM_SIZES[dtype]
                if dtype not in allowed_dtypes(w.dtype) or type(offset) is not int or not 0 <= offset <= size - nbytes:
                    raise ValueError
                stored.append(Stored(w.name, dtype, w.shape, offset, nbytes))
            return stored
        except (ValueError, KeyError, TypeError):
            pass
        status = child.close()
        if status == -signal.SIGXCPU:
            raise Refusal("too_costly", "reading the file took more processor time than any honest file")
        raise Failure("reader_crashed", f"the reading process ended with status {status}")
