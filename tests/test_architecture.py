"""The house: who may import whom, and what the light roles never load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bzstream

ROOT = Path(bzstream.__file__).parent
LEAVES = {"payload", "tensorfile", "config", "errors", "util"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "util": {"errors"},
    "payload": {"util"},
    "tensorfile": {"errors", "util"},
    "config": {"errors", "util"},
    "logs": {"config", "util"},
    "http": LEAVES,
    "model": LEAVES,
    "chain": {"config", "errors", "util"},
    "submissions": {"chain", "config", "errors", "util"},
    "client": LEAVES | {"chain"},
    "evaluation": LEAVES | {"model", "submissions", "chain", "client"},
    "api": LEAVES | {"http", "model", "chain", "submissions"},
    "node": LEAVES | {"api", "http", "model", "chain", "submissions", "evaluation", "logs"},
}
"""Room -> rooms it may import. `cli` and the package's own front door may import any."""


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "bzstream" and len(parts) > 1 else None


def imported_rooms(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {room for name in names if (room := room_of(name))}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    for file in files:
        wrong = imported_rooms(file) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}; {room} may import {MAY_IMPORT[room]}"


def test_every_room_is_named_in_the_rule() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if (path.is_dir() or path.suffix == ".py") and path.stem[0] != "_"}
    assert rooms - {"cli", "py"} == set(MAY_IMPORT)


HEAVY = ("torch", "transformers", "bittensor", "datasets", "fastapi")


@pytest.mark.parametrize(
    "modules",
    ["bzstream", "bzstream.client", "bzstream.node", "bzstream.api", "bzstream.cli"],
)
def test_light_roles_load_nothing_heavy(modules: str) -> None:
    program = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
