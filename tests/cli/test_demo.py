"""The demo, whole: it is the first thing that a newcomer runs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.nodes import eventually

DEMO = [sys.executable, "-m", "bzstream", "demo"]


def test_demo(tmp_path: Path) -> None:
    result = subprocess.run(
        [*DEMO, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for promised in (
        "SHA-256", "as published", "bit for bit", "401 unauthorized", "404 unknown_group", "403 validators_only",
        "423 not_in_submit_phase", "409 duplicate_submission", "400 invalid_signature",
        "rejected: duplicate_weights", "rejected: non_finite", "rejected: unsafe_pickle", "Everything held.",
    ):  # fmt: skip
        assert promised in result.stdout


def test_demo_serve_prints_commands_that_work(tmp_path: Path) -> None:
    without_torch = (
        "import sys; sys.modules['torch'] = None; from bzstream.cli import main; sys.argv = ['bzstream', 'demo', "
        f"'--serve', '--folder', {str(tmp_path)!r}]; main()"
    )
    output = tmp_path / "output"
    with output.open("w") as stream:
        demo = subprocess.Popen([sys.executable, "-c", without_torch], stdout=stream, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: "--out my-group" in output.read_text() or demo.poll() is not None, "the commands", 90)
        text = output.read_text()
        assert "torch not installed" in re.sub(r"\s+", " ", text)
        commands = [line.strip() for line in text.splitlines() if line.startswith(("  curl", "  BZ_AUTH_TOKEN"))]
        assert len(commands) == 5
        for command in commands:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, (shlex.split(command)[0], done.stderr)
            assert "unauthorized" not in done.stdout
        assert os.listdir(tmp_path / "my-group")
    finally:
        demo.send_signal(signal.SIGTERM)  # a background job of a plain shell ignores SIGINT, and so do its children
        assert demo.wait(timeout=60) == 0
