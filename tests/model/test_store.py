"""Versions that are used again, removed and signed later; activation times; stores that were copied or cut about."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from bzstream.model import ModelError, Snapshot, SnapshotCache, StoreDamaged, publish
from bzstream.model.inspection import inspect_store, verify_store
from bzstream.model.store import Store

from .build import SPLIT, Signer, check_store, fused, write_checkpoint

SPECS = fused()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", SPECS)
    return tmp_path / "in"


@pytest.fixture
def store(tmp_path: Path, source: Path) -> Path:
    for block, version in enumerate("ab"):
        publish(source, tmp_path / "store", block=block, version=version, groups=2)
    return tmp_path / "store"


def opened(store: Path) -> tuple[SnapshotCache, Snapshot]:
    cache = SnapshotCache(store)
    assert cache.refresh()
    assert cache.current is not None
    return cache, cache.current


def use(store: Path, version: str) -> None:
    with Store(store).locked():
        Store(store).use(version)


def test_an_older_version_is_used_again(store: Path, source: Path) -> None:
    cache, second = opened(store)
    use(store, "a")
    assert cache.refresh()
    assert cache.current is not None
    assert cache.current.version == "a"
    assert cache.current.sequence == second.sequence + 1
    assert cache.current.activated_at > second.activated_at
    assert [snapshot.version for snapshot in cache.versions()] == ["a", "b"]
    use(store, "a")  # nothing to do
    assert not cache.refresh()
    publish(source, store, block=3, version="c", groups=2)
    cache.refresh()
    assert cache.current.version == "c"
    assert cache.current.sequence == second.sequence + 2
    cache.close()
    assert verify_store(store).findings == ()
    assert sorted(os.listdir(store)) == [".lock", "current", "snapshots"]


def test_what_cannot_be_used_is_refused(store: Path) -> None:
    with pytest.raises(ModelError, match="no version c"):
        use(store, "c")
    (store / "snapshots/a/snapshot.json").write_bytes(b"{}")
    with pytest.raises(StoreDamaged):
        use(store, "a")
    assert Store(store).current() == "b"


def test_activation_times_rise_even_when_the_clock_is_set_back(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published by a clock two hours ahead, then by the right one, then rolled back, all in one second."""
    store, now = tmp_path / "store", 1_700_000_000
    times = []
    for hours, step in enumerate(["a", "b", "use a", "c"]):
        monkeypatch.setattr("time.time", lambda hours=hours: now + (7200.0 if hours == 0 else 0.5))
        if step == "use a":
            use(store, "a")
        else:
            publish(source, store, block=hours, version=step, groups=2)
        cache, snapshot = opened(store)
        times.append(snapshot.activated_at)
        cache.close()
    assert times == [now + 7200, now + 7201, now + 7202, now + 7203]


def test_the_latest_activation_is_kept_when_versions_are_retired(store: Path, source: Path) -> None:
    use(store, "a")
    publish(source, store, block=3, version="c", groups=2, keep=2)
    assert sorted(Store(store).versions()) == ["a", "c"]  # a was in use after b


def test_a_version_is_removed(store: Path) -> None:
    place = Store(store)
    with pytest.raises(ModelError, match="b is served"), place.locked():
        place.remove("b")
    place.pin(["a"])
    with pytest.raises(ModelError, match="not settled"), place.locked():
        place.remove("a")
    place.pin([])
    with place.locked():
        place.remove("a")
    assert place.versions() == ["b"]
    with pytest.raises(ModelError, match="no version a"), place.locked():
        place.remove("a")
    assert inspect_store(store).leftovers == ()


def test_a_version_is_signed_later(store: Path) -> None:
    cache, before = opened(store)
    assert not before.signed
    signer = Signer()
    place = Store(store)
    with place.locked():
        place.sign("b", signer)
    assert cache.refresh()
    assert cache.current is not None
    assert cache.current.signed
    assert (cache.current.sequence, cache.current.activated_at) == (before.sequence, before.activated_at)
    manifest = json.loads(cache.current.full.manifest)
    assert manifest.pop("signature") == "signature of full"
    assert manifest in signer.signed
    assert manifest["validator_hotkey"] == signer.ss58_address
    cache.close()
    assert verify_store(store).findings == ()


@pytest.mark.parametrize("how", ["copied with its links followed", "dangling", "gone"])
def test_a_store_whose_current_is_broken_says_so_and_is_published_over(
    tmp_path: Path, store: Path, source: Path, how: str
) -> None:
    if how == "copied with its links followed":  # cp -rL
        shutil.copytree(store, tmp_path / "copy", symlinks=False)
        store, sentence = tmp_path / "copy", "no symbolic link"
    elif how == "dangling":
        shutil.rmtree(store / "snapshots/b")
        sentence = "names b, which is not there"
    else:
        (store / "current").unlink()
        sentence = "`current` is missing"
    warnings: list[str] = []
    cache = SnapshotCache(store, warn=lambda text: warnings.append(text))
    for _ in range(3):
        cache.refresh()
    assert cache.current is None
    assert cache.problem is not None
    assert sentence in cache.problem
    assert [text for text in warnings if sentence in text] == [cache.problem]
    assert any(sentence in finding.problem for finding in inspect_store(store).findings)
    publish(source, store, block=9, version="c", groups=2)
    assert cache.refresh()
    assert not cache.problem
    cache.close()
    check_store(store, SPECS, write_checkpoint(source, SPECS), SPLIT)
    assert sorted(os.listdir(store)) == [".lock", "current", "snapshots"]
    assert inspect_store(store).leftovers == ()


def test_a_copied_store_can_also_be_used_again(tmp_path: Path, store: Path) -> None:
    shutil.copytree(store, tmp_path / "copy", symlinks=False)
    use(tmp_path / "copy", "a")
    assert Store(tmp_path / "copy").current() == "a"
    use(tmp_path / "copy", "b")
    assert inspect_store(tmp_path / "copy").findings == ()


ODD_CONFIG = b'{"a": Infinity, "b": NaN, "c": "\\ud800", "num_experts": 4}\n'


def test_small_files_are_kept_byte_for_byte(tmp_path: Path, source: Path) -> None:
    (source / "config.json").write_bytes(ODD_CONFIG)
    (source / "tokenizer.model").write_bytes(b"\x00\xff")
    (source / "merges.txt").write_text("a b")
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "model.py").write_text("import os")  # what may be executed is not kept
    (source / ".hidden.json").write_text("{}")
    (source / "folder.json").mkdir()
    store = tmp_path / "store"
    report = publish(source, store, block=1, version="a", groups=2)
    kept = {path.name: path.read_bytes() for path in (store / "current/files").iterdir()}
    assert sorted(kept) == ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.model"]
    assert all((source / name).read_bytes() == content for name, content in kept.items())
    assert report.files == tuple(sorted(kept))
    cache, snapshot = opened(store)
    assert snapshot.config is not None
    assert (snapshot.config["a"], snapshot.config["c"]) == (float("inf"), "\ud800")
    assert {file.name: file.size for file in snapshot.files} == {name: len(content) for name, content in kept.items()}
    cache.close()
    assert stat.S_IMODE((store / "current/files").stat().st_mode) == 0o755


def test_small_files_that_are_too_large_are_left_out_and_named(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bzstream.model.small_files.MAX_FILES", 100)
    (source / "tokenizer.json").write_text(" " * 99)
    (source / "merges.txt").write_text("a b")
    report = publish(source, tmp_path / "store", block=1, version="a", groups=2)
    assert (report.files, report.files_left_out) == (("config.json", "merges.txt"), ("tokenizer.json",))


def test_a_config_that_was_changed_on_disk_is_not_believed(store: Path) -> None:
    (store / "current/files/config.json").write_text('{"other": 1}')
    warnings: list[str] = []
    cache = SnapshotCache(store, warn=warnings.append)
    cache.refresh()
    assert cache.current is None
    assert "config.json was changed" in warnings[0]
    cache.close()


def test_what_ties_tensors_is_kept_in_the_full_unit_alone(tmp_path: Path, source: Path) -> None:
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    head["__metadata__"] = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight", "expert_group": "7"}
    raw = json.dumps(head).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    publish(source, tmp_path / "store", block=1, version="a", groups=2)
    cache, snapshot = opened(tmp_path / "store")

    def metadata(label: str) -> object:
        raw = snapshot.units[label].payload.read()
        return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]

    assert metadata("full") == {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    assert metadata("shared") == {"format": "pt"}
    cache.close()


def test_one_file_and_an_index_that_names_it_are_published(tmp_path: Path, source: Path) -> None:
    """As `save_pretrained` of some releases leaves it."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(SPECS, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    publish(source, tmp_path / "store", block=1, version="a", groups=2)
    check_store(tmp_path / "store", SPECS, write_checkpoint(tmp_path / "same", SPECS), SPLIT)


def test_stores_of_older_releases_are_read(tmp_path: Path, source: Path) -> None:
    """The unit of ungrouped experts was called "rest", config.json stood in the record, and there were no files."""
    from msgspec import structs

    from bzstream.model.record import decode_record, encode_record

    store = tmp_path / "store"
    publish(source, store, block=1, version="a", experts={0: {0: (1,), 1: (1,)}})
    folder = store / "snapshots/a"
    record = decode_record((folder / "snapshot.json").read_bytes())
    units = tuple(
        structs.replace(unit, kind="rest", file="rest.safetensors") if unit.kind == "ungrouped" else unit
        for unit in record.units
    )
    (folder / "ungrouped.safetensors").rename(folder / "rest.safetensors")
    shutil.rmtree(folder / "files")
    old = structs.replace(record, units=units, files=(), config={"num_experts": 4})
    (folder / "snapshot.json").write_bytes(encode_record(old))
    assert verify_store(store).findings == ()
    cache, snapshot = opened(store)
    assert snapshot.config == {"num_experts": 4}
    assert set(snapshot.units) == {"shared", "partial/0", "ungrouped", "full"}
    assert cache.damaged == []
    cache.close()


def test_each_unit_file_is_opened_once(store: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cache, _ = opened(store)
    versions = cache.versions()
    assert len(os.listdir("/proc/self/fd")) == before + len(versions) * 3  # shared and two groups
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
