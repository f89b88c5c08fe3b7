"""What the tests of several packages share: the profile of hypothesis, a small checkpoint, a node that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from bzstream.demo.checkpoint import write_checkpoint
from bzstream.model import publish
from tests.nodes import BLOCK, GROUPS, VERSION, Node, running_node
from tests.seeds import seeds

# A busy machine makes an example slow, not wrong: no deadline, and no complaint about slow inputs.
settings.register_profile(
    "bzstream", deadline=None, max_examples=seeds(25, 100), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bzstream")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL-MoE checkpoint of noise, 98 MB in four shards."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Node]:
    """One node for every test that only reads."""
    place = tmp_path_factory.mktemp("node")
    publish(checkpoint, place / "store", block=BLOCK, version=VERSION, groups=GROUPS)
    with running_node(place) as running:
        yield running
