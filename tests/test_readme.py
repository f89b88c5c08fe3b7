"""The README promises what the code holds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from bzstream.evaluation.rejection_codes import FAILED, REJECTED

README = Path(__file__).parents[1] / "README.md"
MINER = README.parent / "docs" / "miner.md"


def test_every_reason_is_listed() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", MINER.read_text(encoding="utf-8"), re.MULTILINE)
    # `rejected` and `failed` head the two tables.
    assert [row for row in rows if row[1] != "meaning"] == [*REJECTED.items(), *FAILED.items()]


def test_the_ci_calls_the_command_that_the_readme_names() -> None:
    assert "\nscripts/test\n" in README.read_text(encoding="utf-8")
    assert "scripts/test" in (README.parent / ".ci" / "run").read_text(encoding="utf-8")


def test_the_scripts_say_how_they_are_used() -> None:
    script = README.parent / "scripts" / "environment"
    result = subprocess.run([script, "test,bench"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: scripts/environment")
