"""A process that publishes and kills itself: `python -m tests.model.killed`, driven by test_crash.

It reads one JSON request a line: {"source", "store", "version", "kill": n, "after": seconds}. For each it forks; the
child publishes and sends itself SIGKILL just before its n-th system call that changes a file, or in the middle of it if
it is a write; or, where `after` is not null, is killed from outside after so long, wherever it is.
The answer is one line: the number of such calls that were made, or "killed".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bzstream.model import publishing

CALLS = (
    "open", "pwrite", "write", "fsync", "fchmod", "chmod", "link", "symlink", "rename", "replace", "mkdir", "rmdir",
    "unlink",
)  # fmt: skip
"""Through these publishing changes the disk. (`open` also when it only reads: harmless points more.)"""


class Counter:
    """Counts calls, and kills at one of them."""

    def __init__(self, kill: int) -> None:
        self.count = 0
        self._kill = kill
        self._lock = threading.Lock()

    def wrap(self, name: str) -> None:
        call: Callable[..., Any] = getattr(os, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count == self._kill:
                    if name == "pwrite":
                        fd, data, offset = arguments
                        call(fd, data[: len(data) // 2], offset)
                    elif name == "write":
                        fd, data = arguments
                        call(fd, data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        setattr(os, name, counted)


def child(request: dict[str, Any], answer: int) -> None:
    counter = Counter(request["kill"])
    tell = os.write
    for name in CALLS:
        counter.wrap(name)
    publishing.publish(Path(request["source"]), Path(request["store"]), block=2, version=request["version"], groups=8)
    tell(answer, str(counter.count).encode())


def main() -> None:
    for line in sys.stdin:
        inside, outside = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(inside)
            child(json.loads(line), outside)
            os._exit(0)
        os.close(outside)
        after = json.loads(line)["after"]
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        said = os.read(inside, 100).decode()
        os.close(inside)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print("killed" if status == -signal.SIGKILL else said if status == 0 else f"failed {status}", flush=True)


if __name__ == "__main__":
    main()
