"""The architecture: which package may import which, no circles between files, and tests that use public names alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bzstream

ROOT = Path(bzstream.__file__).parent
TESTS = Path(__file__).parent

ORDER = (
    "cli", "demo", "node", "api", "dashboard", "evaluation", "client", "swarm", "submissions", "chain", "model",
    "http", "httpclient", "coding", "logs", "config", "tensorfile", "payload", "util", "errors",
)  # fmt: skip
"""The packages (and top-level modules) from top to bottom. An import may only go down; not all of them exist yet."""

FOUNDATION = {"payload", "tensorfile", "config", "errors", "util"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "util": {"errors"},
    "payload": {"util"},
    "tensorfile": {"errors", "util"},
    "config": {"errors", "util"},
    "logs": {"config", "util"},
    "coding": {"errors", "tensorfile", "util"},
    "httpclient": {"config", "errors", "util"},
    "http": FOUNDATION,
    "model": FOUNDATION | {"coding"},
    "chain": {"config", "errors", "util"},
    "submissions": {"chain", "config", "errors", "util"},
    "swarm": FOUNDATION | {"chain", "httpclient", "model"},
    # A follower writes what it fetched into a store: `sync` brings a snapshot into force as publishing does.
    "client": FOUNDATION | {"chain", "coding", "httpclient", "model"},
    "evaluation": FOUNDATION | {"chain", "httpclient", "model", "submissions"},
    "dashboard": FOUNDATION | {"chain", "http", "submissions"},
    "api": FOUNDATION | {"chain", "dashboard", "http", "model", "submissions"},
    "node": FOUNDATION | {"api", "chain", "evaluation", "http", "logs", "model", "submissions", "swarm"},
    "demo": FOUNDATION | {"chain", "client"},
    "cli": set(ORDER) - {"cli"},
}
"""Package -> packages it may import. A new package adds its line here, and its place to ORDER."""


def module_files() -> dict[str, Path]:
    """Dotted name of each module of bzstream -> its file."""
    files = ROOT.rglob("*.py")
    return {
        ".".join(("bzstream", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): f for f in files
    }


def imports_of(file: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of bzstream that a file imports, anywhere in it, also under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: relative import; write the whole name"  # noqa: PT018
            for alias in node.names:
                # `from package import module` needs the module, not what the package's __init__ imports.
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return found & set(known)


def package_of(module: str) -> str | None:
    """`bzstream.http.io.server` -> `http`; None for bzstream itself, whose public API any package may stand behind."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_imports_go_down() -> None:
    for package, allowed in MAY_IMPORT.items():
        upwards = {name for name in allowed if ORDER.index(name) <= ORDER.index(package)}
        assert not upwards, f"MAY_IMPORT lets {package} import {sorted(upwards)}, which stand above it in ORDER"
    known = module_files()
    for module, file in known.items():
        own = package_of(module)
        if own is None or own == "__main__":
            continue
        assert own in MAY_IMPORT, f"the package {own} has no line in MAY_IMPORT"
        wrong = {package_of(name) for name in imports_of(file, known)} - MAY_IMPORT[own] - {own, None}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}; {own} may import {MAY_IMPORT[own]}"


def test_no_files_import_each_other_in_a_circle() -> None:
    known = module_files()
    graph = {module: imports_of(file, known) - {module} for module, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other in a circle: {' <- '.join(error.args[1])}")


HEAVY = ("torch", "transformers", "bittensor", "datasets", "fastapi", "libtorrent", "obstore")


@pytest.mark.parametrize(
    "modules",
    ["bzstream", "bzstream.client", "bzstream.node", "bzstream.api", "bzstream.cli"],
)
def test_light_roles_load_nothing_heavy(modules: str) -> None:
    program = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


PUBLIC_UNDERSCORES = {"_exit", "_replace", "_asdict", "_fields", "_make", "_getframe"}
"""Names that Python documents as public. Any other name with an underscore is its module's own: renaming it must break
no test."""
PRIVATE = re.compile(r"(?:^|\.)(_[a-zA-Z0-9]\w*)")
BY_NAME = {"setattr", "delattr", "getattr", "hasattr", "patch", "object", "setitem", "attrgetter"}
"""Functions that take the name of an attribute as a string: builtins, pytest's monkeypatch, unittest's mock."""


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of somebody else that a test file uses."""
    own = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
        if isinstance(target.ctx, ast.Store)
    } | {
        node.name
        for outer in ast.walk(tree)
        if isinstance(outer, ast.ClassDef)
        for node in outer.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [] if node.attr in own else [f".{node.attr}"]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in BY_NAME:
                names = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            for private in PRIVATE.findall(name):
                if private not in PUBLIC_UNDERSCORES:
                    yield getattr(node, "lineno", 0), private


def test_tests_use_public_names_alone() -> None:
    offenders: dict[str, list[tuple[int, str]]] = {}
    for file in sorted(TESTS.rglob("*.py")):
        if found := sorted(private_names(ast.parse(file.read_text(encoding="utf-8")))):
            offenders[str(file.relative_to(TESTS))] = found
    assert not offenders, f"private names of other modules: {offenders}"


@pytest.mark.parametrize(
    "text",
    [
        "server._sender.close()",
        "from bzstream.http.server import _Ring",
        "import bzstream.http._server",
        "monkeypatch.setattr(module, '_limit', 3)",
        "monkeypatch.setattr('bzstream.http.server._limit', 3)",
        "patch.object(module, '_limit')",
        "class Fake:\n    def run(self):\n        return self._inherited",
    ],
)
def test_a_private_name_is_found(text: str) -> None:
    assert list(private_names(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "class Fake:\n    def __init__(self):\n        self._sent = []\n    def get(self):\n        return self._sent",
        "class Fake:\n    def _step(self): ...\n    def run(self):\n        self._step()",
        "os._exit(1)",
        "point._replace(x=1)",
        "value.__class__",
        "_private_function_of_the_test()",
    ],
)
def test_an_own_name_is_no_offence(text: str) -> None:
    assert not list(private_names(ast.parse(text)))
