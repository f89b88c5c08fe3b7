"""Nodes, payloads and a quick way to pull."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bzstream.client import PullReport, Tuning, pull
from tests.client.node import HOTKEY, TOKEN, Node, Unit

QUICK = Tuning(
    stall_s=0.7, patience_s=4.0, first_patience_s=0.5, connect_timeout_s=2.0, stuck_s=0.3, sync_s=0.2, min_steal=16384
)
"""The same client with less patience than a person has."""


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def payload() -> bytes:
    return noise(3_000_000)


@pytest.fixture
def node(payload: bytes) -> Iterator[Node]:
    with Node({("partial", 0): Unit(payload)}) as running:
        yield running


Puller = Callable[..., PullReport]


@pytest.fixture
def pull_quickly(node: Node, tmp_path: Path) -> Puller:
    """`pull` of group 0 from the node into tmp_path/out, with less patience; every argument can be replaced."""

    def run(**changes: Any) -> PullReport:
        arguments: dict[str, Any] = {
            "url": node.url, "out": tmp_path / "out", "groups": [0], "hotkey": HOTKEY, "token": TOKEN, "tuning": QUICK,
        }  # fmt: skip
        return pull(**{**arguments, **changes})

    return run
