"""`bzstream versions`, `use`, `remove` and `sign`, as an operator runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.chain.keys import load_key
from bzstream.cli import command_line
from bzstream.errors import BzstreamError
from bzstream.model import SnapshotCache, publish

from .build import fused, write_checkpoint


def run(*arguments: object) -> str:
    """What a command prints. Raises what the command raises."""
    result = CliRunner().invoke(command_line((str(arguments[0]),)), [str(word) for word in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", fused())
    for block, version in enumerate("ab"):
        publish(tmp_path / "in", tmp_path / "store", block=block, version=version, groups=2)
    return tmp_path / "store"


def test_roll_back_and_make_room(store: Path) -> None:
    assert [line.split()[0] for line in run("versions", store).splitlines()] == ["b", "a"]
    assert run("use", store, "a") == "a is current\n"
    lines = run("versions", store).splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert lines[0].endswith("not signed  (current)")
    with pytest.raises(BzstreamError, match="a is served"):
        run("remove", store, "a")
    assert run("remove", store, "b") == "b was deleted\n"
    assert [each["version"] for each in json.loads(run("versions", store, "--json"))] == ["a"]


def test_sign_later(tmp_path: Path, store: Path) -> None:
    (tmp_path / "key").write_text("11" * 32)
    (tmp_path / "key").chmod(0o600)
    key = load_key(str(tmp_path / "key"))
    assert run("sign", store, "b", "--key", tmp_path / "key") == f"b is signed by {key.ss58_address}\n"
    assert f"signed by {key.ss58_address}" in run("versions", store)
    cache = SnapshotCache(store)
    cache.refresh()
    assert cache.current is not None
    manifest = json.loads(cache.current.shared.manifest)
    cache.close()
    signature = manifest.pop("signature")
    assert signature == key.sign_fields(manifest)


@pytest.mark.parametrize("command", [("versions",), ("use", "a"), ("remove", "a")])
def test_what_is_no_store_is_told_and_not_made_one(tmp_path: Path, command: tuple[str, ...]) -> None:
    with pytest.raises(BzstreamError, match="is no store"):
        run(command[0], tmp_path / "none", *command[1:])
    assert not (tmp_path / "none").exists()
