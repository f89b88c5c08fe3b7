"""schemathesis plays the served OpenAPI document against the node: what it calls valid is taken, what it calls invalid
is refused, and every answer is one that the document describes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api import schema_hooks
from tests.api.desk import Desk, troubles
from tests.nodes import TOKEN
from tests.seeds import seeds


def test_schemathesis_finds_nothing(desk: Desk, tmp_path: Path) -> None:
    """All its checks in all its phases, with valid and invalid data; about 250 requests, in a long run 650."""
    command = shutil.which("schemathesis", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("schemathesis is not installed")
    options = ["--max-examples", str(seeds(4, 15)), "--generation-deterministic", "--no-color"]
    limits = ["--request-timeout", "20", "--checks", "all", "--warnings", "off"]
    done = subprocess.run(
        [command, "run", f"{desk.node.url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", *options, *limits],
        env={**os.environ, "SCHEMATHESIS_HOOKS": schema_hooks.__name__, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 36" in done.stdout
    assert troubles(desk.node) == []
