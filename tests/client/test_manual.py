"""The manual's own commands for a miner, run as they stand in docs/miner.md, and the README's Python."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bzstream.model import publish
from tests.client.node import HOTKEY
from tests.nodes import BLOCK, GROUPS, VERSION, Node, eventually, run_manual, running_node

MANUAL = Path(__file__).parents[2] / "docs" / "miner.md"
README = MANUAL.parents[1] / "README.md"
UNIT = "/model/partial?format=safetensors"


def commands(word: str) -> str:
    """The one block of shell commands that holds the word."""
    (found,) = [block for block in re.findall(r"```sh\n(.*?)```", MANUAL.read_text(), re.S) if word in block]
    return str(found)


def bash(script: str, folder: Path, node: Node) -> subprocess.CompletedProcess[str]:
    script = script.replace("https://validator.example:8000", node.url)
    return run_manual(script, folder, {"BZ_AUTH_TOKEN": node.token})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Node]:
    place = tmp_path_factory.mktemp("manual")
    publish(checkpoint, place / "store", block=BLOCK, version=VERSION, groups=GROUPS)
    with running_node(place) as node:
        yield node


def test_the_pull_of_the_manual(served: Node, tmp_path: Path) -> None:
    done = bash(commands("bzstream pull"), tmp_path, served)
    assert done.returncode == 0, done.stderr
    whole = served.get(UNIT, {**served.headers(0), "X-Hotkey": HOTKEY}).body
    assert (tmp_path / "model" / "group-0.safetensors").read_bytes() == whole
    assert (tmp_path / "model" / "shared.safetensors").is_file()


def test_the_info_of_the_manual(served: Node, tmp_path: Path) -> None:
    done = bash(commands("bzstream info"), tmp_path, served)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("healthy", f"block {BLOCK}", "train", f"{VERSION} (current)", "group 3", "shared"):
        assert words in done.stdout
    command = [sys.executable, "-m", "bzstream", "info", "--json"]
    environment = {**os.environ, "BZ_AUTH_TOKEN": served.token, "BZSTREAM_URL": served.url}
    said = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout)
    (version,) = said["versions"]
    (unit,) = [unit for unit in version["units"] if unit["expert_group"] == 0]
    whole = served.get(UNIT, {**served.headers(0), "X-Hotkey": HOTKEY}).body
    assert (unit["size"], unit["content_hash"]) == (len(whole), f"sha256:{hashlib.sha256(whole).hexdigest()}")
    wrong = subprocess.run(
        command, env={**environment, "BZ_AUTH_TOKEN": "x" * 32}, capture_output=True, text=True, timeout=60
    )
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert "BZ_AUTH_TOKEN" in wrong.stderr


def test_the_python_of_the_readme(served: Node, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(import bzstream\n.*?)```", README.read_text("utf-8"), re.S)
    for placeholder, real in (("http://127.0.0.1:8000", served.url), ('"..."', repr(served.token)), ("5F...", HOTKEY)):
        assert placeholder in example
        example = example.replace(placeholder, real)
    program = example + "print(report.version, sum(array.nbytes for array in tensors.values()))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[0] == VERSION
    assert 0 < int(said[1]) < (tmp_path / "model" / "group-0.safetensors").stat().st_size


@pytest.mark.skipif(shutil.which("curl") is None, reason="the recipe is for curl")
def test_an_interrupted_curl_never_joins_two_versions(served: Node, tmp_path: Path, checkpoint: Path) -> None:
    recipe = commands("curl -fsSI")
    every_time = recipe[recipe.index("file=") :]
    who = {**served.headers(0), "X-Hotkey": HOTKEY}
    old = served.get(UNIT, who).body
    first = bash(recipe + '\necho "version=$version; hash=$hash"', tmp_path, served)
    assert first.returncode == 0, first.stderr
    file = tmp_path / f"group-0-{VERSION}.safetensors"
    assert file.read_bytes() == old
    os.truncate(file, len(old) // 2)  # as an interruption leaves it

    newer = tmp_path / "newer"
    shutil.copytree(checkpoint, newer)
    for shard in newer.glob("*.safetensors"):
        np.memmap(shard, np.uint8, "r+")[1_000_000::4096] ^= 1
    publish(newer, served.folder / "store", block=BLOCK + 1, version="step_newer", groups=GROUPS)
    eventually(lambda: served.get(UNIT, who).headers["x-model-version"] == "step_newer", "the new version")
    new = served.get(UNIT, who).body
    assert new[: len(new) // 2] != old[: len(old) // 2]

    setup = recipe[: recipe.index("head=")] + first.stdout.splitlines()[-1] + "\n"
    again = bash(setup + every_time, tmp_path, served)
    assert again.returncode == 0, again.stderr
    assert file.read_bytes() == old
    os.truncate(file, len(old) // 2)
    anew = bash(recipe, tmp_path, served)
    assert anew.returncode == 0, anew.stderr
    assert (tmp_path / "group-0-step_newer.safetensors").read_bytes() == new

    # Even without the version in the address, as in a cache that ignores queries, the condition holds.
    refused = bash(setup + every_time.replace("&version=$version", ""), tmp_path, served)
    assert refused.returncode != 0
    assert file.read_bytes() == old[: len(old) // 2]
    # And what is wrong all the same is seen.
    file.write_bytes(old[: len(old) // 2] + new[len(new) // 2 :])
    check = f"hash={hashlib.sha256(old).hexdigest()}; file={file.name}\n" + recipe[recipe.index("sha256sum") :]
    assert bash(check, tmp_path, served).returncode != 0
