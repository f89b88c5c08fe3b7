"""A real `bzstream pull` process behind a throttled, counting proxy, to be killed again and again at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.client.proxy import Proxy


class Victim:
    """Pulls what `units` (arguments of the command) name from the node at `port`, with `token`, into `folder`."""

    def __init__(self, port: int, units: Sequence[str], folder: Path, token: str, *, rate: float) -> None:
        self.proxy = Proxy(("127.0.0.1", port), rate)
        self._unread = 0
        """Bytes that crossed the network to a process that was killed before it received them."""
        self._folder = folder
        self._command = [
            sys.executable, "-m", "bzstream", "pull", self.proxy.url, *units, "--out", str(folder),
            "--connections", "4",
        ]  # fmt: skip
        # Compiled once, as an installed package is, also where nothing may be written beside the sources.
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled")}
        self._environment = {**os.environ, **compiled, "BZ_AUTH_TOKEN": token}

    def kill(self, times: int, size: int, chance: random.Random) -> None:
        """Run it and `kill -9` it so many times, spread over its first `size` bytes or so; no final name appears."""
        for number in range(times):
            process = subprocess.Popen(
                self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            # A random moment inside this kill's part of the bytes; the last leaves some for `finish`.
            goal = int(size * (number + chance.random()) / times)
            begun, deadline = self.proxy.down, time.monotonic() + 60
            while self.proxy.down < max(goal, begun + 1) and process.poll() is None:
                assert time.monotonic() < deadline, "the pull makes no progress"
                time.sleep(0.002)
            assert process.poll() is None, (number, process.communicate()[1])
            # What a starved process had no time to receive is the machine's doing, and not counted.
            self.proxy.flowing.clear()
            process.send_signal(signal.SIGSTOP)
            self._unread += self.proxy.unread()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            self.proxy.flowing.set()
            assert not list(self._folder.glob("*.safetensors"))

    def finish(self) -> int:
        """Let it end, unthrottled; the bytes that its processes received in all. Nothing but final names is left."""
        self.proxy.rate = 1e9
        subprocess.run(self._command, env=self._environment, check=True, capture_output=True, timeout=60)
        self.proxy.close()
        assert all(path.suffix == ".safetensors" for path in self._folder.iterdir())
        return self.proxy.down - self._unread

    def fail(self) -> str:
        """Let it run into what must end it, unthrottled; its words. No final name appears."""
        self.proxy.rate = 1e9
        done = subprocess.run(
            self._command, env=self._environment, check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1, (done.returncode, done.stderr)
        assert not list(self._folder.glob("*.safetensors"))
        return done.stderr
