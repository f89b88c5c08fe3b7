"""`bzstream settings`, and the page that is made with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bzstream.config import Settings, load

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def settings(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bzstream", "settings", *flags], capture_output=True, text=True, timeout=120, check=False
    )


def printed(*flags: str) -> str:
    done = settings(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == printed("--markdown"), "run: bzstream settings --markdown > docs/settings.md"


def test_every_setting_is_listed_with_a_reason_and_a_variable_that_sets_it() -> None:
    listed = json.loads(printed("--json"))
    values = json.loads(msgspec.json.encode(Settings()))
    known = {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}
    assert {each["name"]: each["default"] for each in listed} == known
    assert [each["name"] for each in listed if len(each["reason"]) < 20 or not each["type"]] == []
    environment = {
        each["environment"]: each["default"] if isinstance(each["default"], str) else json.dumps(each["default"])
        for each in listed
        if each["default"] is not None
    }
    assert load(environment=environment) == Settings()
    paths = {each["environment"]: "x" for each in listed if each["default"] is None and each["type"] == "text"}
    assert len(paths) > 10
    set_to_x = msgspec.to_builtins(load(environment=paths))
    for each in listed:
        if each["environment"] in paths:
            section, name = each["name"].split(".")
            assert set_to_x[section][name] == "x", each


def test_the_list_for_a_terminal_has_what_the_page_has() -> None:
    lines = printed().splitlines()
    assert "[http] the listener and the limits that keep a hostile client from costing anybody anything." in lines
    assert "  http.head_timeout_s = 10.0    (seconds, number above 0; BZ_HTTP_HEAD_TIMEOUT_S)" in lines
    assert "  ledger.url = not set    (text; BZ_LEDGER)" in lines


@pytest.mark.parametrize("flags", [("--markdown", "--json"), ("--toml",)])
def test_a_wrong_use_is_told(flags: tuple[str, ...]) -> None:
    done = settings(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert flags[-1] in done.stderr
