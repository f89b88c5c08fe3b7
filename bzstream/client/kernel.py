"""Three Linux calls that Python does not offer as they are, each with a harmless fallback.

`os.posix_fallocate` emulates what a file system lacks by writing to every block, which for 62 GB takes minutes, so the
bare system call is made. `sync_file_range` starts writing out dirty pages without waiting for them, so that the final
fsync finds little left to do: on the machine this was tuned on it halved the time to a durable file.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

__all__ = ["allocate", "boot_id", "start_writing"]

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def allocate(fd: int, size: int) -> None:
    """Make the file `size` bytes long, with its blocks reserved where the file system can do that.

    Raises OSError (ENOSPC above all) when there is no room.
    """
    os.ftruncate(fd, size)
    if _fallocate is None or size == 0:
        return
    while _fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def start_writing(fd: int, start: int, length: int) -> None:
    """Begin to write the dirty pages of a range to the disk; waits only when the device's queue is full."""
    if _sync_file_range is not None:
        # A failure shows again in fsync, which is checked.
        _sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def boot_id() -> bytes:
    """16 bytes that change with every boot; zeros where the kernel does not tell."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return bytes.fromhex(text.strip().replace("-", ""))[:16].ljust(16, b"\0")
    except (OSError, ValueError):
        return bytes(16)
