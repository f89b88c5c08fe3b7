"""`kill -9` at random moments: the file is right in the end, and hardly a byte crossed the network twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.client.conftest import noise
from tests.client.node import HOTKEY, TOKEN, Node, Unit
from tests.client.proxy import Proxy

KILLS = 50
SIZE = 200_000_000
RATE = 6_000_000


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fifty_kills_cost_less_than_one_byte_in_twenty(tmp_path: Path) -> None:
    payload = noise(SIZE)
    final = tmp_path / "out" / "group-0.safetensors"
    chance = random.Random(5)
    with Node({("partial", 0): Unit(payload)}, chunk_size=8 << 20) as node:
        proxy = Proxy(("127.0.0.1", node.port), RATE)
        command = [
            sys.executable, "-m", "bzstream", "pull", proxy.url, "--group", "0", "--out", str(tmp_path / "out"),
            "--hotkey", HOTKEY, "--connections", "8",
        ]  # fmt: skip
        environment = {**os.environ, "BZ_AUTH_TOKEN": TOKEN}
        kills = 0
        while kills < KILLS:
            before = proxy.down
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            # A random amount of work, then a random moment inside it.
            goal = before + chance.randrange(1, int(1.6 * SIZE / KILLS))
            deadline = time.monotonic() + 30
            while proxy.down < goal and process.poll() is None:
                assert time.monotonic() < deadline, "the pull makes no progress"
                time.sleep(0.002)
            assert process.poll() is None, (kills, process.communicate()[1])
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            assert not final.exists()
        proxy.rate = 1e9
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
        proxy.close()
    assert final.read_bytes() == payload
    assert os.listdir(tmp_path / "out") == ["group-0.safetensors"]
    assert proxy.down < SIZE * 1.05, f"{(proxy.down - SIZE) / SIZE:.1%} crossed twice"
    print(f"{(proxy.down - SIZE) / SIZE:.2%} crossed twice in {KILLS} kills")
