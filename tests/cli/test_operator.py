"""The operator manual's commands for a store, run as they stand in docs/operator.md."""

from __future__ import annotations

import re
from pathlib import Path

from bzstream.chain.keys import load_key
from bzstream.model import publish
from bzstream.model.versions import list_versions
from tests.model.build import fused, write_checkpoint
from tests.nodes import run_manual

MANUAL = Path(__file__).parents[2] / "docs" / "operator.md"


def test_the_manuals_publication_roll_back_removal_and_signing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", fused())
    for block, version in ((12343, "step_800"), (12344, "step_900")):
        publish(tmp_path / "checkpoint", tmp_path / "store", block=block, version=version, groups=2)
    (tmp_path / "key").write_text("11" * 32)
    (tmp_path / "key").chmod(0o600)
    blocks = re.findall(r"```sh\n([^`]*)```", MANUAL.read_text("utf-8"))
    first, second = (next(block for block in blocks if word in block) for word in ("bzstream publish", "bzstream use"))
    script = (first + second).replace("/var/lib/bzstream", str(tmp_path / "store"))
    script = script.replace("wallet/hotkey", str(tmp_path / "key")).replace("--groups 16", "--groups 2")  # a toy
    done = run_manual(script, tmp_path, {})
    assert done.returncode == 0, done.stderr
    left = {each["version"]: each for each in list_versions(tmp_path / "store")}
    assert set(left) == {"step_900", "step_1000"}
    assert left["step_900"]["current"]
    assert left["step_1000"]["hotkey"] == load_key(str(tmp_path / "key")).ss58_address
