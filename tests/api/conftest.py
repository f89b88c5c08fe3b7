"""Fixtures of the API tests: a node in the submit phase, beside the session's node in the train phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.desk import Desk
from tests.nodes import Node, running_node


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


def beside(node: Node, folder: Path) -> Path:
    (folder / "store").symlink_to(node.store)
    return folder
