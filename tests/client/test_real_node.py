"""The real command against the real node, over links that kill, cut and damage: both sides of the contract are ours.

The other tests of the client run against a server of their own that can lie; here the lies are told by the link.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bzstream.model import publish
from tests.client.proxy import PIECE
from tests.client.victim import Victim
from tests.nodes import BLOCK, GROUPS, VERSION, Node, running_node
from tests.seeds import seeds

KILLS = seeds(3, 8)
RATE = 12_000_000


@pytest.fixture(scope="module")
def real_node(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Node]:
    place = tmp_path_factory.mktemp("real-node")
    publish(checkpoint, place / "store", block=BLOCK, version=VERSION, groups=GROUPS)
    with running_node(place) as running:
        yield running


@pytest.fixture
def victim(real_node: Node, tmp_path: Path) -> Victim:
    """Pulls the whole model, 98 MB, as a validator."""
    return Victim(real_node.port, ["--full"], tmp_path / "out", real_node.validator_token, rate=RATE)


@pytest.fixture
def model(real_node: Node) -> bytes:
    return real_node.get("/model/full", real_node.as_validator()).body


def flip(data: bytes) -> bytes:
    """Damage what is certainly data: heads and manifests are shorter than a full piece."""
    return data[:-1] + bytes([data[-1] ^ 1]) if len(data) == PIECE else data


def cut(data: bytes) -> bytes:
    """End a connection every 2 MB or so."""
    return b"" if random.random() < 0.004 else data


def test_kills_cost_less_than_one_byte_in_twenty(victim: Victim, model: bytes, tmp_path: Path) -> None:
    victim.kill(KILLS, int(0.8 * len(model)), random.Random(3))
    crossed = victim.finish()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model
    assert crossed < len(model) * 1.05, f"{crossed / len(model) - 1:.1%} crossed twice"


def test_damage_on_the_way_never_yields_a_file(victim: Victim, model: bytes, tmp_path: Path) -> None:
    victim.proxy.change = flip
    assert "with a wrong hash 3 times" in victim.fail()
    victim.proxy.change = None
    victim.finish()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model


def test_a_link_that_keeps_cutting_connections_is_survived(victim: Victim, model: bytes, tmp_path: Path) -> None:
    victim.proxy.change = cut
    crossed = victim.finish()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model
    assert crossed < len(model) * 1.1
