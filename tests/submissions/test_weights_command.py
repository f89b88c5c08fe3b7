"""`bzstream weights` on a real ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.cli import command_line
from bzstream.errors import BzstreamError
from bzstream.submissions.ledger import Ledger
from tests.submissions.values import HOTKEYS, ROUND, accepted, candidate


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command_line(), ["weights", *arguments])
    if isinstance(result.exception, BzstreamError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_weights_of_the_latest_round_are_printed(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    ledger = Ledger.open(file)
    for hotkey in HOTKEYS[:3]:
        accepted(ledger.accept(candidate(hotkey)))
    for job, score in zip(ledger.claim("evaluator", lease_s=60, limit=2), (3.0, 1.0), strict=True):
        job = ledger.advance(ledger.advance(job, "verifying"), "evaluating")
        ledger.advance(job, "scored", score=score, model_version="step_1000")
    ledger.close()
    shown = json.loads(run("--ledger", str(file), "--json"))
    assert shown == {
        "round": ROUND,
        "model_version": "step_1000",
        "weights": {HOTKEYS[0]: 0.75, HOTKEYS[1]: 0.25},
    }
    text = run("--ledger", str(file), "--round", str(ROUND))
    assert "3 submissions, 1 unfinished, 2 with weight" in text
    assert f"{HOTKEYS[0]}  0.750000" in text
    with pytest.raises(BzstreamError, match="no round 1;"):
        run("--ledger", str(file), "--round", "1")
    with pytest.raises(BzstreamError, match="no ledger"):
        run("--ledger", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
