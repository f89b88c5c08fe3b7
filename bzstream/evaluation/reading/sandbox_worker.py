"""The inside of the reading process (`sandbox.py` explains it): confine yourself, read one file, answer, end."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

import numpy as np

from bzstream.evaluation.reading.layout import check_layout
from bzstream.evaluation.reading.specs import TensorSpec
from bzstream.evaluation.reading.values import check_values
from bzstream.evaluation.rejection_codes import Refusal
from bzstream.util.files import write_fully

__all__ = ["Read", "main", "read_file"]

Read = Callable[[int, int, list[TensorSpec], int], dict[str, object]]

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000

# audit architecture (linux/audit.h), then the numbers of: read write close fstat lseek mmap mprotect munmap brk
# rt_sigaction rt_sigprocmask rt_sigreturn pread64 sched_yield mremap madvise getpid gettid exit exit_group futex
# sigaltstack restart_syscall clock_gettime gettimeofday getrandom rseq
_SYSCALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 24, 25, 28, 39, 186, 60, 231, 202, 131, 219,
                            228, 96, 318, 334)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 67, 124, 216, 233, 172, 178, 93,
                             94, 98, 132, 128, 113, 169, 278, 293)),
}  # fmt: skip


def main(channel: int, read: Read | None = None) -> None:
    """Wait on the socket `channel` for one job and its file, answer with one JSON document, and end.

    `read` stands in for `read_file`, so that tests can run anything inside the confinement.
    """
    with socket.socket(fileno=channel) as parent:
        _prepare()
        length, descriptors, _, _ = socket.recv_fds(parent, 8, 1)
        if len(length) != 8 or not descriptors:
            return  # the parent has no file for this process
        body = _receive(parent, int.from_bytes(length, "little"))
        job = json.loads(body)
        specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in job["specs"]]
        seccomp = _confine(memory=job["memory"], cpu=job["cpu"])
        answer = (read or read_file)(descriptors[0], job["size"], specs, job["bound"])
        write_fully(channel, json.dumps(answer | {"seccomp": seccomp}).encode())
        os._exit(0)  # no finalizer needs a system call that is no longer there


def read_file(fd: int, size: int, specs: list[TensorSpec], bound: int) -> dict[str, object]:
    """The answer for one file: `found`, the dtype and offset of each tensor; or `code` and `detail`."""

    def pread(length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    try:
        locations = check_layout(pread, size, specs)
        for w, s in zip(specs, locations, strict=True):
            check_values(pread, s, w.dtype, bound)
    except Refusal as refusal:
        return {"code": refusal.code, "detail": refusal.detail}
    except MemoryError:
        return {"code": "too_costly", "detail": "reading the file took more memory than any honest file"}
    except Exception as error:
        return {"code": "internal_error", "detail": f"the reader failed: {type(error).__name__}"}
    return {"found": [[s.dtype, s.offset] for s in locations]}


def _receive(parent: socket.socket, length: int) -> bytes:
    body = bytearray()
    while len(body) < length:
        piece = parent.recv(min(1 << 16, length - len(body)))
        if not piece:
            sys.exit(0)
        body += piece
    return bytes(body)


def _prepare() -> None:
    """What can be given up before there is a job; and the imports and allocations that need the file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    np.bitwise_and(np.zeros(1, "<u2"), np.uint16(1)).max()
    json.dumps(json.loads("[1]"))


def _confine(*, memory: int, cpu: int) -> bool:
    """Limits for this job, then the system-call filter; whether the kernel took the filter."""
    with open("/proc/self/statm", "rb") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, in_use + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    known = _SYSCALLS.get(platform.machine())
    if known is None:
        return False
    program = _filter(*known)
    held = ctypes.create_string_buffer(program, len(program))
    description = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, description, 0, 0)) == 0


def _filter(architecture: int, allowed: tuple[int, ...]) -> bytes:
    """Classic BPF over `struct seccomp_data` (number at 0, architecture at 4): allowed calls pass, others get EPERM."""
    load, equal, answer = 0x20, 0x15, 0x06

    def step(code: int, then: int, otherwise: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, value)

    program = [step(load, 0, 0, 4), step(equal, 1, 0, architecture), step(answer, 0, 0, _KILL), step(load, 0, 0, 0)]
    for position, number in enumerate(allowed):
        program.append(step(equal, len(allowed) - position, 0, number))
    return b"".join([*program, step(answer, 0, 0, _EPERM), step(answer, 0, 0, _ALLOW)])
