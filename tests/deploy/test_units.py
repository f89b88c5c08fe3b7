"""systemd units and the compose file, held against their own validators."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MOST_EXPOSED = {"bzstream.service": 2.5, "bzstream-evaluator.service": 2.5}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_is_valid_and_hardened(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "bzstream"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    here = tmp_path / unit.name
    text = unit.read_text("utf-8")
    assert "/opt/bzstream/bin/bzstream" in text
    here.write_text(text.replace("/opt/bzstream/bin/bzstream", str(program)), encoding="utf-8")
    units = [here]
    if unit.with_suffix(".socket").exists():
        units.append(Path(shutil.copy(unit.with_suffix(".socket"), tmp_path)))
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", here],
        capture_output=True,
        text=True,
        timeout=60,
    )
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", rated.stdout)
    assert level is not None, rated.stdout + rated.stderr
    assert float(level[1]) <= MOST_EXPOSED[unit.name]


def test_the_compose_file_is_valid() -> None:
    environment = {**os.environ, "BZ_AUTH_TOKEN": "x" * 32, "POSTGRES_PASSWORD": "p", "GRAFANA_PASSWORD": "g"}
    done = subprocess.run(
        ["docker-compose", "-f", DEPLOY / "compose.yaml", "config"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    members: dict[str, set[str]] = {}
    for name, service in services.items():
        for profile in service["profiles"]:
            members.setdefault(profile, set()).add(name)
    assert members == {
        "single": {"node"},
        "roles": {"http", "chain", "evaluator", "database"},
        "monitoring": {"prometheus", "grafana"},
    }
    assert all(service["read_only"] for name, service in services.items() if service["image"].startswith("bzstream"))


def test_the_compose_file_needs_a_token() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BZ_AUTH_TOKEN"}
    done = subprocess.run(
        ["docker-compose", "-f", DEPLOY / "compose.yaml", "config"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode != 0
    assert "set BZ_AUTH_TOKEN" in done.stderr
