"""Files that are still there after a power cut: written beside their name, synced, renamed, and the folder synced.

A file system may lack one of these calls (directory fsync on some network and FUSE file systems). What is missing is
left out: the file is then as durable as that file system can make it. Any thread; raises OSError.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from bzstream.util.files import write_fully

__all__ = ["replace_file", "sync_folder", "temporary_name", "write_file"]

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR, errno.EACCES)
"""What a file system without directory fsync answers, to `open` or to `fsync` (a folder may be writable and
unreadable). A disk that fails answers EIO, which is raised."""


def temporary_name(path: Path) -> Path:
    """Where `write_file` writes before the file gets its name: hidden, in the same folder, always the same.

    A crash leaves one such file at the most, and the next write of the same file replaces it.
    """
    return path.with_name(f".{path.name}.new")


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Create or replace a file: at every moment, a crash included, `path` is the old content or the new one, whole.

    `mode` holds whatever the umask is. Two writers of one path need a lock of their own.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        write_fully(fd, content)
        os.fsync(fd)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    replace_file(temporary, path)


def replace_file(source: Path, target: Path) -> None:
    """Give `source`, whose bytes are durable already, the name `target` in the same folder, durably."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
