"""docs/api.md says what the node does: its routes, its error codes, its limits, and what its examples print."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from bzstream.api.openapi import document
from bzstream.chain.keys import Key
from bzstream.config import Settings
from bzstream.model import publish
from tests.model import build
from tests.nodes import GROUPS, run_manual, running_node

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
END = "=== end of example ==="
MINER, VALIDATOR = b"\x01" * 32, b"\x02" * 32
"""Seeds of the keys in the examples; VALIDATOR is the one that `running_node` puts on the chain."""

HELPERS = {"unavailable": 503, "_unauthorized": 401, "InvalidUrl": 400}
"""Functions that are given a code, and the status that it goes out with."""
RELAYS = {"api/state.py", "api/identity.py", "api/submissions.py", "submissions/intake.py"}
"""Files in which an error is made of a code that is not written there but handed on, one place each."""


def codes_in_source() -> tuple[set[tuple[int, str]], list[str]]:
    """(status, code) of each error that a node can send, and the files of those whose code stands elsewhere."""
    found: set[tuple[int, str]] = set()
    relayed: list[str] = []
    package = ROOT / "bzstream"
    for file in sorted(path for part in ("api", "http", "submissions") for path in (package / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            name, values = node.func.id, [a.value if isinstance(a, ast.Constant) else None for a in node.args]
            if name in ("HttpError", "SubmissionRefused"):
                status, code = values[:2]
            elif name in HELPERS:
                status, code = HELPERS[name], values[0]
            else:
                continue
            if isinstance(status, int) and isinstance(code, str):
                found.add((status, code))
            else:
                relayed.append(str(file.relative_to(package)))
    return found, relayed


def test_every_error_is_in_the_table_and_nothing_else() -> None:
    found, relayed = codes_in_source()
    assert sorted(relayed) == sorted(RELAYS)
    rows = [(int(status), code) for status, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, re.MULTILINE)]
    assert len(rows) == len(set(rows))
    assert set(rows) == found


def test_every_route_has_its_heading_and_every_heading_its_route() -> None:
    described = [
        (method, path)
        for method, paths in re.findall(r"^### (GET|POST) (/.*)$", PAGE, re.MULTILINE)
        for path in paths.split(", ")
    ]
    routed = {(m.upper(), path) for path, item in document("1")["paths"].items() for m in item if m != "head"}
    assert len(described) == len(set(described))
    assert set(described) == routed


def test_every_field_of_a_body_and_every_parameter_is_named() -> None:
    described = document("1")
    fields = {name for schema in described["components"]["schemas"].values() for name in schema.get("properties", {})}
    operations = [operation for item in described["paths"].values() for operation in item.values()]
    parameters = {parameter["name"] for operation in operations for parameter in operation.get("parameters", ())}
    quoted = " ".join(re.findall(r"`([^`\n]+)`", PAGE)) + " ".join(re.findall(r"\{\w+\}", PAGE))
    assert {name for name in fields | parameters if not re.search(rf"\b{re.escape(name)}\b", quoted)} == set()


def test_the_limits_are_the_settings_defaults() -> None:
    defaults = msgspec.to_builtins(Settings())
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| (\d+) \|", PAGE, re.MULTILINE)
    assert len(rows) == 11
    assert {f"{s}.{name}": float(value) for s, name, value in rows} == {
        f"{s}.{name}": float(defaults[s][name]) for s, name, _ in rows
    }


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each example for the shell prints, run one after the other in one shell against one node."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    place = tmp_path_factory.mktemp("api-page")
    validator = Key.from_seed(VALIDATOR)
    for number, (version, block) in enumerate((("step_0999", 11_925), ("step_1000", 12_345))):
        specs = build.fused(experts=8)
        build.write_checkpoint(place / version, specs, build.contents(specs, number))
        publish(place / version, place / "store", block=block, version=version, groups=GROUPS, signer=validator)
    for name, seed in (("miner.key", MINER), ("validator.key", VALIDATOR)):
        (place / name).touch(mode=0o600)
        (place / name).write_text(seed.hex(), encoding="ascii")
    for language, text in BLOCKS:
        if language == "python":
            (place / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    script = "".join(f"{text}\necho '{END}'\n" for language, text in BLOCKS if language == "sh")
    own = {"BZ_NODE_HOTKEY": validator.ss58_address, "BZ_NODE_WALLET": str(place / "validator.key")}
    with running_node(place, block=12_530, environment=own) as node:
        values = {
            "URL": node.url,
            "BZ_AUTH_TOKEN": node.token,
            "HOTKEY": Key.from_seed(MINER).ss58_address,
            "KEY_FILE": "miner.key",
            "VALIDATOR": validator.ss58_address,
            "RECEIVER": validator.ss58_address,
            "VALIDATOR_KEY_FILE": "validator.key",
            "VALIDATOR_TOKEN": node.validator_token,
        }
        result = run_manual(script, place, values)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split(f"{END}\n")[:-1]


def comparable(texts: list[str]) -> list[list[str]]:
    """The texts without what differs from run to run. Equal hashes stay equal: each has a number for all texts."""
    hashes: dict[str, str] = {}
    found = []
    for text in texts:
        text = re.sub(r"\b[0-9a-f]{64}\b", lambda m: hashes.setdefault(m[0], f"<hash {len(hashes)}>"), text)
        text = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "<uuid>", text)
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "<time>", text)
        text = re.sub(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "<date>", text)
        text = re.sub(r"[A-Za-z0-9_-]{86}(==)?", "<signature>", text)
        found.append([line.rstrip() for line in text.strip().splitlines()])
    return found


def test_the_examples_print_what_the_page_says(printed: list[str]) -> None:
    languages = [language for language, _ in BLOCKS]
    assert languages.count("sh") >= 15
    assert all(languages[at + 1] == "text" for at, language in enumerate(languages) if language == "sh")
    assert comparable(printed) == comparable([text for language, text in BLOCKS if language == "text"])
