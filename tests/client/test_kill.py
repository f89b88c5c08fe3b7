"""`kill -9` at random moments: the file is right in the end, and hardly a byte crossed the network twice.

Half of a victim's life is the start of its process, which needs a processor, and half the wait for a slow link. So
several victims at once take turns with both.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.client.conftest import noise
from tests.client.node import HOTKEY, TOKEN, Key, Node, Unit
from tests.client.victim import Victim
from tests.seeds import seeds

VICTIMS = 2
KILLS = seeds(6, 50)
SIZE = seeds(60_000_000, 200_000_000)
RATE = seeds(3_500_000, 2_000_000)
"""A kill costs at most what is claimed and not written: 0.1 s of the link, or 64 KiB a connection."""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_kills_cost_less_than_one_byte_in_twenty(tmp_path: Path) -> None:
    payloads = [noise(SIZE // VICTIMS, group) for group in range(VICTIMS)]

    def torment(group: int) -> int:
        """Bytes that crossed the network."""
        out = tmp_path / str(group)
        victim = Victim(node.port, ["--group", str(group), "--hotkey", HOTKEY], out, TOKEN, rate=RATE)
        victim.kill(KILLS // VICTIMS, int(0.8 * SIZE / VICTIMS), random.Random(group))
        crossed = victim.finish()
        assert (out / f"group-{group}.safetensors").read_bytes() == payloads[group]
        return crossed

    units: dict[Key, Unit] = {("partial", group): Unit(payload) for group, payload in enumerate(payloads)}
    with Node(units, chunk_size=8 << 20) as node, ThreadPoolExecutor(VICTIMS) as victims:
        again = sum(victims.map(torment, range(VICTIMS))) - SIZE
    assert again < SIZE * 0.05, f"{again / SIZE:.1%} crossed twice"
    print(f"{again / SIZE:.2%} crossed twice in {KILLS} kills")
