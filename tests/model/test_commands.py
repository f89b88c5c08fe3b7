"""`bzstream publish` and `bzstream inspect` as a person and a script see them."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bzstream.model import SnapshotCache

from .build import fused, write_checkpoint


def bzstream(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bzstream", *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BZ_")}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, timeout=60)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", fused(), shards=2)
    return tmp_path / "in"


def test_publish_and_inspect(tmp_path: Path, source: Path) -> None:
    store = tmp_path / "store"
    arguments = ("publish", source, "--store", store, "--block", 12345, "--version", "step_1000", "--groups", 2)
    done = bzstream(*arguments, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "would write" in done.stdout
    assert not store.exists()
    done = bzstream(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    cache = SnapshotCache(store)
    cache.refresh()
    assert cache.current is not None
    for unit in cache.current.units.values():
        assert re.search(rf"^{unit.label} .* {unit.size:,} .*{unit.content_hash}$", done.stdout, re.M)
    cache.close()
    done = bzstream(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"bzstream: .* already has a version step_1000; .*\n", done.stderr)

    done = bzstream("inspect", store, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("verified") == 4
    report = json.loads(bzstream("inspect", store, "--json").stdout)
    assert report["current"] == report["snapshots"][0]["model_version"] == "step_1000"
    assert [unit["unit"] for unit in report["snapshots"][0]["units"]] == ["shared", "partial", "partial", "full"]
    file = store / "current/group-1.safetensors"
    assert json.loads(bzstream("inspect", file, "--verify", "--json").stdout)["metadata"]["expert_group"] == "1"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = bzstream("inspect", store, "--verify")
    assert done.returncode == 1
    assert "DAMAGED" in done.stdout
    assert re.fullmatch(r"bzstream: .* has a problem: step_1000, full: .*\n", done.stderr)


def test_json_reports(tmp_path: Path, source: Path) -> None:
    experts = tmp_path / "map.json"
    experts.write_text('{"4": {"0": [3], "1": [0, 1]}}')
    done = bzstream(
        "publish", source, "--store", tmp_path / "store", "--block", 1, "--version", "a", "--experts", experts, "--json"
    )
    report = json.loads(done.stdout)
    assert [unit["unit"] for unit in report["units"]] == ["shared", "partial/4", "ungrouped", "full"]
    assert report["bytes_written"] == sum(unit["size"] for unit in report["units"] if unit["file"])
    assert report["dry_run"] is False


def test_settings_name_the_store_and_how_much_it_keeps(tmp_path: Path, source: Path) -> None:
    store = tmp_path / "store"
    for block in range(3):
        arguments = ("publish", source, "--block", block, "--version", f"v{block}", "--groups", 2)
        done = bzstream(*arguments, BZ_STORE_PATH=str(store), BZ_STORE_KEEP="2")
        assert done.returncode == 0, done.stderr
    assert "deleted: v0" in done.stdout
    assert sorted(os.listdir(store / "snapshots")) == ["v1", "v2"]


def test_a_key_signs_the_manifests(tmp_path: Path, source: Path) -> None:
    key = tmp_path / "key"
    key.write_text("11" * 32)
    store = tmp_path / "store"
    arguments = ("--store", store, "--block", 1, "--version", "a", "--groups", 2, "--key", key)
    done = bzstream("publish", source, *arguments)
    assert done.returncode == 0, done.stderr
    cache = SnapshotCache(store)
    cache.refresh()
    assert cache.current is not None
    from bzstream.chain.canonical import canonical_json
    from bzstream.chain.signatures import decode_signature, verify

    for unit in cache.current.units.values():
        manifest = json.loads(unit.manifest)
        signature = decode_signature(manifest.pop("signature"))
        assert verify(manifest["validator_hotkey"], canonical_json(manifest), signature)
    cache.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--store", "s", "--block", "1", "--version", "a"),
        ("--store", "s", "--block", "1", "--version", "a", "--groups", "2", "--experts", "x"),
        ("--store", "s", "--block", "-1", "--version", "a", "--groups", "2"),
        ("--store", "s", "--block", "1", "--version", "a", "--groups", "0"),
        ("--store", "s", "--version", "a", "--groups", "2"),
        ("--block", "1", "--version", "a", "--groups", "2"),
    ],
)
def test_wrong_usage_exits_with_2(source: Path, arguments: tuple[str, ...]) -> None:
    assert bzstream("publish", source, *arguments).returncode == 2


def test_what_cannot_be_published_exits_with_1_and_one_line(tmp_path: Path, source: Path) -> None:
    (source / "model-00001-of-00002.safetensors").unlink()
    done = bzstream(
        "publish", source, "--store", tmp_path / "s", "--block", 1, "--version", "a", "--groups", 2, "--json"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"bzstream: .*model-00001-of-00002\.safetensors cannot be read: .*\n", done.stderr)


def test_a_terminal_sees_a_bar(tmp_path: Path, source: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "bzstream", "publish", str(source), "--store", str(tmp_path / "store")]
    process = subprocess.Popen(
        [*command, "--block", "1", "--version", "a", "--groups", "2"],
        stderr=slave, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:
        pass  # EIO: the other side is closed
    os.close(master)
    assert process.wait(60) == 0
    assert b"publishing" in shown
