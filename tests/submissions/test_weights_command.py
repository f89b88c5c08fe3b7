"""`bzstream weights` on a real ledger."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.chain.state import ChainState
from bzstream.chain.weights import RoundWeights
from bzstream.cli import command_line
from bzstream.errors import BzstreamError
from bzstream.submissions.ledger import Ledger
from bzstream.submissions.types import GroupPay
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
        job = ledger.advance(job, "scored", score=9.0, model_version="step_1000")
        ledger.write_pay(GroupPay(ROUND, {job.record.submission_id: ("scored", score)}))
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


def test_burning_averages_and_the_status(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    settings = tmp_path / "bzstream.toml"
    settings.write_text(f'[chain]\nburn = "{HOTKEYS[9]}"\nburn_rate = 0.2\nweights_alpha = 0.5\n')
    given = ("--ledger", str(file), "--config", str(settings))
    ledger = Ledger.open(file)
    accepted(ledger.accept(candidate(HOTKEYS[0])))
    (job,) = ledger.claim("evaluator", lease_s=60)
    ledger.advance(ledger.advance(ledger.advance(job, "verifying"), "evaluating"), "scored", score=3.0)
    assert json.loads(run(*given, "--json"))["weights"] == pytest.approx({HOTKEYS[0]: 0.8, HOTKEYS[9]: 0.2})
    with pytest.raises(BzstreamError, match="no round's weights were worked out yet"):
        run(*given, "--status")
    ledger.write_round_weights(RoundWeights(ROUND - 420, {HOTKEYS[1]: 1.0}, "set", None, 1, 12181))
    assert json.loads(run(*given, "--json"))["weights"] == pytest.approx(
        {HOTKEYS[1]: 0.5, HOTKEYS[0]: 0.4, HOTKEYS[9]: 0.1}
    )
    ledger.write_round_weights(RoundWeights(ROUND, {HOTKEYS[2]: 1.0}, "refused", "no permit", 2, 12605))
    ledger.write_chain_state(ChainState(block=12606, observed_at=time.time()))
    ledger.close()
    assert json.loads(run(*given, "--json"))["weights"] == {HOTKEYS[2]: 1.0}, "what was sent, not what would be now"
    assert json.loads(run(*given, "--status", "--json")) == {
        "round": ROUND,
        "outcome": "refused",
        "reason": "no permit",
        "attempts": 2,
        "block": 12605,
        "next_due_block": 13020,
    }
    assert "outcome: refused" in run(*given, "--status")
    assert json.loads(run(*given, "--status", "--json", "--round", str(ROUND - 420)))["outcome"] == "set"
