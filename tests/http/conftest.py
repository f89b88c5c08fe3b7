"""Fixtures of the HTTP tests: one file, and a server with small time-outs wherever time matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bzstream.config import HttpSettings
from bzstream.payload import UnitFile
from tests.http.support import Running, TinyApplication

FILE_SIZE = 8 * 1024 * 1024 + 12_345


@pytest.fixture(scope="session")
def unit_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unit") / "unit.safetensors"
    path.write_bytes(random.Random(7).randbytes(FILE_SIZE))
    return path


@pytest.fixture
def serve(unit_path: Path) -> Iterator[Callable[..., Running]]:
    """`serve(max_body=10, ...)`: a running server with these settings, ended after the test.

    `parts`: further arguments of `Running`, such as what makes the sender.
    """
    with ExitStack() as stack:

        def start(path: Path = unit_path, *, parts: dict[str, Any] | None = None, **settings: Any) -> Running:
            file = UnitFile(path)
            stack.callback(file.release)
            return stack.enter_context(Running(TinyApplication(file), HttpSettings(**settings), **(parts or {})))

        yield start


@pytest.fixture(scope="module")
def running(unit_path: Path) -> Iterator[Running]:
    """A server with the default settings for the tests of one module."""
    file = UnitFile(unit_path)
    with Running(TinyApplication(file), HttpSettings(max_connections_per_caller=1000)) as server:
        yield server
    file.release()
