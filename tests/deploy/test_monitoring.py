"""Dashboard and alerts show figures that the node exposes, and their own tools find nothing wrong with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.defpath}") or "promtool"
METRIC = re.compile(r"\bbzstream_[a-z0-9_]+")
SUFFIXES = {"counter": ("_total", "_created"), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count", "_created")}


@pytest.fixture(scope="module")
def exposed() -> dict[str, str]:
    """Every series that the node exposes -> the help of its metric. Read in a process of its own, as it is global."""
    program = (
        "import json, bzstream.api.metrics, prometheus_client as p;"
        "print(json.dumps([[m.name, m.type, m.documentation] for m in p.REGISTRY.collect()]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    metrics = [metric for metric in json.loads(done.stdout) if metric[0].startswith("bzstream_")]
    return {name + suffix: text for name, kind, text in metrics for suffix in SUFFIXES[kind]}


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of the dashboard and of the alerts."""
    dashboard: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/bzstream.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']!r}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield f"variable {variable['name']!r}", variable["query"]
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']!r}", rule["expr"]


def test_every_figure_that_is_shown_is_exposed(exposed: dict[str, str]) -> None:
    named = [(where, name) for where, expression in expressions() for name in METRIC.findall(expression)]
    assert len(named) > 15
    missing = [f"{where} names {name}" for where, name in named if name not in exposed]
    assert not missing


def test_every_figure_is_documented(exposed: dict[str, str]) -> None:
    manual = (ROOT / "docs/metrics.md").read_text("utf-8")
    documented = set(METRIC.findall(manual))
    bases = {re.sub(r"_(total|created|bucket|sum|count)$", "", name) for name in exposed}
    assert {re.sub(r"_total$", "", name) for name in documented} == bases


def test_every_alert_says_what_to_do() -> None:
    rules = [
        rule
        for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"]
        for rule in group["rules"]
    ]
    assert all({"summary", "action"} <= rule["annotations"].keys() for rule in rules)


@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
)
def test_promtool_finds_nothing_wrong(command: list[str]) -> None:
    done = subprocess.run([PROMTOOL, *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_dashboard_panels_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/bzstream.json").read_text("utf-8"))
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
