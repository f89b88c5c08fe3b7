"""Fixtures of the API tests: a node in the submit phase, beside the session's node in the train phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bzstream.model import publish
from tests.api.desk import Desk
from tests.model import build
from tests.nodes import BLOCK, GROUPS, VERSION, Node, running_node

SMALL = (("step_0999", 11_925), (VERSION, BLOCK))
"""The versions of `small_store` and their blocks."""


@pytest.fixture(scope="session")
def desk(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A node in the submit phase, on the session's store and a ledger of its own; any hotkey may submit."""
    place = beside(node, tmp_path_factory.mktemp("desk"))
    with running_node(place, "--ledger", str(place / "ledger.sqlite")) as running:
        opened = Desk(running)
        opened.go_to(Desk.NOW)
        yield opened


@pytest.fixture
def place(node: Node, tmp_path: Path) -> Path:
    """A folder for a node of the test's own, on the session's store."""
    return beside(node, tmp_path)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a model of a few kilobytes: most of a test's time is then its requests'."""
    folder = tmp_path_factory.mktemp("small")
    for number, (version, block) in enumerate(SMALL):
        specs = build.fused(experts=8)
        build.write_checkpoint(folder / version, specs, build.contents(specs, number))
        publish(folder / version, folder / "store", block=block, version=version, groups=GROUPS)
    return folder / "store"


def beside(node: Node, folder: Path) -> Path:
    (folder / "store").symlink_to(node.store)
    return folder
