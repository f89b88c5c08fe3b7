"""What several rooms' tests share: a small published checkpoint and a node that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bzstream.cli._checkpoint import write_checkpoint
from bzstream.model import publish
from tests.nodes import BLOCK, GROUPS, VERSION, Node, running_node


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
