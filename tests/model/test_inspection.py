"""Inspecting: every flipped byte of a store is found, and files are told apart."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from bzstream.model import ModelError, SnapshotCache, publish
from bzstream.model.inspection import inspect_file, inspect_store, verify_store
from tests.seeds import seeds

from .build import fused, write_checkpoint


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    write_checkpoint(place / "in", fused(experts=6), config={"any": "thing"})
    publish(
        place / "in", place / "store", block=1, version="a", experts={0: {0: (1, 0), 1: (2,)}, 7: {0: (3,), 1: (4,)}}
    )
    publish(
        place / "in", place / "store", block=2, version="b", experts={0: {0: (1, 0), 1: (2,)}, 7: {0: (4,), 1: (4,)}}
    )
    return place / "store"


def test_a_good_store_has_nothing_to_find(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_store(store, lambda *at: seen.append(at))
    assert (report.findings, report.leftovers, report.current) == ((), (), "b")
    assert [record.version for record in report.snapshots] == ["b", "a"]
    assert seen[-1][0] == seen[-1][1]


def test_every_flipped_byte_is_found(store: Path) -> None:
    """Any bit of any file, a few hundred at random and every byte of a record."""
    pick = random.Random(3)
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != ".lock"]
    places = [(path, pick.randrange(path.stat().st_size)) for path in files for _ in range(seeds(2, 12))]
    record = store / "snapshots/a/snapshot.json"
    places += [(record, at) for at in range(record.stat().st_size) if at < seeds(20, 200) or at % seeds(91, 23) == 0]
    for path, at in places:
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << pick.randrange(8)
        was = path.read_bytes()
        path.write_bytes(content)  # the same inode, as damage on a disk leaves it
        findings = verify_store(store).findings
        assert findings, (path, at)
        path.write_bytes(was)
    assert verify_store(store).findings == ()


def test_damage_says_where(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store", symlinks=True)
    path = tmp_path / "store/snapshots/b/group-7.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    findings = {finding.unit: finding.problem for finding in verify_store(tmp_path / "store").findings}
    assert findings.keys() == {"partial/7", "full"}
    assert findings["partial/7"] == (
        f"1 of 1 chunks differ from what was published, the first at bytes 0 to {len(content) - 1}"
    )


def test_missing_and_cut_files_are_found_without_reading(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store", symlinks=True)
    (tmp_path / "store/snapshots/b/ungrouped.safetensors").unlink()
    os.truncate(tmp_path / "store/snapshots/a/shared.safetensors", 10)
    (tmp_path / "store/snapshots/.new-x").mkdir()
    for report in (inspect_store(tmp_path / "store"), verify_store(tmp_path / "store")):
        problems = {(finding.version, finding.unit): finding.problem for finding in report.findings}
        assert "No such file" in problems["b", "ungrouped"]
        assert "10 bytes instead of" in problems["a", "shared"]
        assert report.leftovers == (".new-x",)


def test_a_store_without_a_current_version(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store", symlinks=True)
    (tmp_path / "store/current").unlink()
    assert [finding.unit for finding in inspect_store(tmp_path / "store").findings] == ["current"]
    (tmp_path / "store/current").symlink_to("snapshots/gone")
    assert "gone, which is not there" in inspect_store(tmp_path / "store").findings[0].problem
    with pytest.raises(ModelError, match="no store"):
        inspect_store(tmp_path)


def test_a_bare_file_and_a_saved_body(store: Path, tmp_path: Path) -> None:
    cache = SnapshotCache(store)
    cache.refresh()
    assert cache.current is not None
    unit = cache.current.partial(7)
    assert unit is not None
    bare, body = tmp_path / "bare", tmp_path / "body"
    bare.write_bytes(unit.payload.read())
    body.write_bytes(unit.enveloped.read())
    cache.close()
    assert inspect_file(bare).sha256 is None
    report = inspect_file(bare, verify=True)
    assert (report.envelope, report.payload_offset, report.size) == (None, 0, unit.size)
    assert (f"sha256:{report.sha256}", report.damaged) == (unit.content_hash, False)
    report = inspect_file(body, verify=True)
    assert report.envelope == json.loads(unit.envelope[8:])
    assert (report.payload_offset, report.size, report.damaged) == (4096, unit.size, False)
    content = bytearray(body.read_bytes())
    content[-1] ^= 1
    body.write_bytes(content)
    report = inspect_file(body, verify=True)
    assert report.damaged
    assert report.sha256 == hashlib.sha256(content[4096:]).hexdigest()
    os.truncate(body, len(content) - 1)
    with pytest.raises(ModelError, match="no complete safetensors file"):
        inspect_file(body)
    with pytest.raises(ModelError, match="cannot be read"):
        inspect_file(tmp_path / "nothing")
