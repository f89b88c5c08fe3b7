"""`import bzstream`, as a user's script has it: typed, light, and nothing that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bzstream
import bzstream.client
from bzstream.errors import BzstreamError

SCRIPT = """
import bzstream


def fetch(url: str) -> list[str]:
    report: bzstream.PullReport = bzstream.pull(url, out="model", groups=[0], shared=True, hotkey="5F")
    return [f"{unit.path}: {unit.content_hash}" for unit in report.units]


def hand_in(url: str) -> bool:
    accepted = bzstream.submit(url, key="key", group=0, checkpoint_url="https://miner.example/c")
    return [state.status for state in bzstream.follow(url, accepted.submission_id)][-1] == "scored"


async def fetch_beside_others(url: str) -> int:
    tensors = await bzstream.fetch_tensors_async(url, group=0, hotkey="5F")
    return len(tensors) + len((await bzstream.pull_async(url, out="model", groups=[0], hotkey="5F")).units)


try:
    print(bzstream.__version__)
    fetch("nowhere")
except (bzstream.Unauthorized, bzstream.WrongHash, bzstream.FolderBusy, bzstream.Unreachable) as error:
    print(error)
except bzstream.BadUrl as error:
    assert isinstance(error, bzstream.ClientError) and isinstance(error, bzstream.BzstreamError)
    print("no URL")
"""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(bzstream.__file__).parents[1])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_a_users_script_runs_and_its_mistakes_are_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    check = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "script.py")
    script.write_text(SCRIPT)
    done = run(sys.executable, "-W", "error", "script.py", folder=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["no URL"]), done.stderr
    assert run(*check, folder=tmp_path).stdout == "Success: no issues found in 1 source file\n"
    script.write_text(SCRIPT + 'bzstream.sumbit("x")\nbzstream.pull(17, out="x")\nbzstream.WrongHsah\n')
    said = run(*check, folder=tmp_path).stdout
    last = len(SCRIPT.splitlines())
    assert [line.split(":")[1] for line in said.splitlines() if ": error:" in line] == [
        str(last + 1), str(last + 2), str(last + 3),
    ], said  # fmt: skip
    done = run(sys.executable, "script.py", folder=tmp_path)
    assert "module 'bzstream' has no attribute 'sumbit'. Did you mean: 'submit'?" in done.stderr


def test_every_public_name_is_there() -> None:
    assert len(set(bzstream.__all__)) == len(bzstream.__all__)
    assert set(bzstream.__all__) == {*bzstream.client.__all__, "BzstreamError", "__version__"}
    assert set(bzstream.__all__) <= set(dir(bzstream))
    for name in bzstream.__all__:
        assert getattr(bzstream, name) is not None
    with pytest.raises(AttributeError, match="'bzstream' has no attribute 'nothing'"):
        _ = bzstream.nothing  # type: ignore[attr-defined]


def test_every_error_of_the_client_is_public() -> None:
    def subclasses(of: type[BzstreamError]) -> set[type[BzstreamError]]:
        found = {of}
        for one in of.__subclasses__():
            found |= subclasses(one)
        return found

    errors = {error for error in subclasses(bzstream.ClientError) if error.__module__.startswith("bzstream.")}
    assert {error.__name__ for error in errors} <= set(bzstream.__all__)
    assert all(issubclass(error, BzstreamError) for error in errors)


def test_the_client_is_loaded_when_it_is_first_used(tmp_path: Path) -> None:
    program = """
import sys
import bzstream
from bzstream import tensorfile, util
bzstream.__version__
print("bzstream.client" in sys.modules)
from bzstream import pull
print("bzstream.client" in sys.modules)
"""
    done = run(sys.executable, "-c", program, folder=tmp_path)
    assert done.stdout == "False\nTrue\n", done.stderr
