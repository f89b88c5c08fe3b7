"""The folder through which the processes of a node share their Prometheus counters.

Called by the supervisor in its only thread. prometheus_client finds the folder by PROMETHEUS_MULTIPROC_DIR, which the
children inherit, and each process maps files of its own in it. The supervisor holds a lock on the folder as long as it
lives; a folder that nobody has locked was left by a node that was killed, and the next node removes it. (A process id
would not tell: two nodes in different PID name spaces may share the temporary folder.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from bzstream.node.errors import NodeError

__all__ = ["MetricsFolder"]

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "bzstream-counters-"


class MetricsFolder:
    """A folder of this node alone, from `ensure` to `remove`."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1

    def ensure(self) -> None:
        """Make the folder, also when somebody took it away meanwhile. Raises NodeError where none can be made."""
        if self._path is not None and self._path.is_dir():
            return
        try:
            if self._path is None:
                _remove_abandoned(Path(tempfile.gettempdir()))
                self._path = Path(tempfile.mkdtemp(prefix=PREFIX))
            else:
                self._path.mkdir(mode=0o700)
                os.close(self._fd)
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise NodeError(
                f"metrics need a folder for their counters, and there is none to write to ({error.strerror or error}); "
                "set TMPDIR, or leave metrics.port out"
            ) from None
        with contextlib.suppress(OSError):  # on a file system without locks nothing is ever removed
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.environ[VARIABLE] = str(self._path)

    def remove(self) -> None:
        """Remove it with what is in it; without a folder this does nothing."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._fd)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # another user's
            continue
        with contextlib.suppress(OSError):  # its node lives, or there are no locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)
