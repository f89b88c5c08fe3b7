"""What the start of a command costs: the help of all commands loads none of the libraries that a command works with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bzstream
from bzstream.cli import COMMANDS

NEVER = ("asyncio", "blake3", "bzstream.config", "h11", "msgspec", "numpy", "sqlalchemy", "ssl", "structlog")


def test_help_loads_nothing_that_a_command_works_with() -> None:
    program = (
        "import sys, atexit; from bzstream.cli import main; sys.argv = ['bzstream', '--help']\n"
        f"atexit.register(lambda: print([name for name in {NEVER!r} if name in sys.modules], file=sys.stderr))\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "serve" in result.stdout
    assert result.stderr == "[]\n"


def bzstream_says(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bzstream", *words],
        env={**os.environ, "COLUMNS": "100", **environment}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("words", [(), ("inspect",), ("submit",), ("weights", "--json")])
def test_version(words: tuple[str, ...]) -> None:
    assert bzstream_says(*words, "--version") == f"bzstream {bzstream.__version__}\n"


@pytest.mark.parametrize("words", [(), ("pull",)])
def test_the_short_word_for_help(words: tuple[str, ...]) -> None:
    assert bzstream_says(*words, "-h") == bzstream_says(*words, "--help")


def test_a_shell_completes_commands_and_options() -> None:
    script = bzstream_says("--show-completion", "bash")
    assert "_BZSTREAM_COMPLETE=complete_bash" in script

    def complete(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_BZSTREAM_COMPLETE": "complete_bash"}
        return bzstream_says(**words).split()

    assert complete("bzstream ") == list(COMMANDS)
    assert complete("bzstream pu") == ["publish", "pull"]
    assert complete("bzstream pull --max") == ["--max-speed"]


def test_a_command_gets_its_own_options_alone(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    assert bzstream_says("versions", str(tmp_path), "--json").strip() == "[]"
