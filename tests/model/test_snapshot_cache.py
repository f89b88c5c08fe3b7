"""What a worker serves from: snapshots that come and go, and files that are cut or changed under it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bzstream.model import Snapshot, SnapshotCache, StoreDamaged, open_snapshot, publish

from .build import SPLIT, Spec, check_store, fused, write_checkpoint

SPECS: dict[str, Spec] = fused()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", SPECS)
    return tmp_path / "in"


@pytest.fixture
def store(tmp_path: Path, source: Path) -> Path:
    publish(source, tmp_path / "store", block=1, version="a", groups=2)
    return tmp_path / "store"


def opened(store: Path) -> tuple[SnapshotCache, Snapshot]:
    cache = SnapshotCache(store)
    assert cache.refresh()
    assert cache.current is not None
    return cache, cache.current


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_published_yet(tmp_path: Path, source: Path) -> None:
    cache = SnapshotCache(tmp_path / "store")
    assert not cache.refresh()
    assert (cache.current, cache.versions(), cache.damaged, cache.get("a")) == (None, [], [], None)
    publish(source, tmp_path / "store", block=1, version="a", groups=2)
    assert cache.refresh()
    assert not cache.refresh()
    assert cache.current is not None
    cache.close()


def test_new_versions_come_and_old_ones_go(store: Path, source: Path) -> None:
    before = descriptors()
    cache, first = opened(store)
    assert (first.version, first.block, first.groups, first.layers) == ("a", 1, (0, 1), {0: 4, 1: 4})
    assert abs(first.published_at - time.time()) < 60
    assert first.partial(7) is None
    for number, version in enumerate(["b", "c", "d"]):
        publish(source, store, block=number, version=version, groups=2)
        assert cache.refresh()
        assert cache.current is not None
        assert cache.current.version == version
    assert [snapshot.version for snapshot in cache.versions()] == ["d", "c", "b"]
    assert cache.get("a") is None
    assert cache.get("b") is cache.versions()[-1]
    cache.close()
    assert descriptors() == before


def test_a_download_outlives_its_snapshot(store: Path, source: Path) -> None:
    cache, first = opened(store)
    unit = first.partial(0)
    assert unit is not None
    payload = unit.enveloped
    payload.retain()
    wanted = payload.read()
    for number in range(3):
        publish(source, store, block=number, version=f"next-{number}", groups=2)
    cache.refresh()
    cache.close()
    assert payload.read() == wanted
    assert unit.intact()
    payload.release()
    assert all(file.fd == -1 for file in payload.files)


def test_holding_a_snapshot(store: Path) -> None:
    cache, snapshot = opened(store)
    snapshot.retain()
    cache.close()
    assert snapshot.full.payload.read()
    snapshot.release()
    with pytest.raises(AssertionError):
        snapshot.retain()
    with pytest.raises(AssertionError):
        snapshot.release()


def cut(path: Path) -> None:
    os.truncate(path, os.stat(path).st_size - 1)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_file_that_changes_while_it_is_open_is_not_served(store: Path, damage: Callable[[Path], None]) -> None:
    cache, snapshot = opened(store)
    damage(store / "current/group-1.safetensors")
    assert cache.damaged == ["partial/1", "full"]
    good = snapshot.partial(0)
    assert good is not None
    assert good.intact()
    assert snapshot.shared.intact()
    assert not cache.refresh()
    cache.close()


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_file_that_changed_before_the_worker_started_is_not_served(
    store: Path, damage: Callable[[Path], None]
) -> None:
    damage(store / "current/group-1.safetensors")
    warnings: list[str] = []
    cache = SnapshotCache(store, warn=warnings.append)
    cache.refresh()
    assert cache.damaged == ["partial/1", "full"]
    cache.close()  # waits for the check of what was flipped
    cache = SnapshotCache(store, warn=warnings.append)
    cache.refresh()
    for verifier in cache.verifiers:
        verifier.wait()
    assert cache.damaged == ["partial/1", "full"]
    cache.close()


def test_a_cut_file_is_found_by_its_size_alone(store: Path) -> None:
    path = store / "current/group-1.safetensors"
    status = os.stat(path)
    cut(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache, _ = opened(store)
    assert cache.damaged == ["partial/1", "full"]
    cache.close()


def test_a_copied_store_is_served_when_it_was_read_again(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy", symlinks=True, copy_function=shutil.copyfile)
    warnings: list[str] = []
    cache = SnapshotCache(tmp_path / "copy", warn=warnings.append)
    cache.refresh()
    until(lambda: cache.damaged == [])
    assert len(warnings) == 1
    assert "3 files of version a" in warnings[0]
    cache.close()


def test_a_swapped_file_does_not_disturb_what_is_open(store: Path) -> None:
    """Deleting and writing a file anew leaves the open one as it was: downloads go on."""
    cache, snapshot = opened(store)
    wanted = snapshot.shared.payload.read()
    path = store / "current/shared.safetensors"
    path.unlink()
    path.write_bytes(b"something else")
    assert cache.damaged == []
    assert snapshot.shared.payload.read() == wanted
    cache.close()


def test_an_unreadable_new_snapshot_keeps_the_last_good_one(store: Path, source: Path) -> None:
    warnings: list[str] = []
    cache = SnapshotCache(store, warn=warnings.append)
    cache.refresh()
    publish(source, store, block=2, version="b", groups=2)
    flip(store / "current/snapshot.json")
    for _ in range(3):
        cache.refresh()
    assert cache.current is not None
    assert cache.current.version == "a"
    assert len(warnings) == 1
    assert "snapshot.json" in warnings[0]
    assert cache.problem is not None
    assert "version b cannot be opened" in cache.problem
    publish(source, store, block=3, version="c", groups=2)
    assert cache.refresh()
    assert not cache.problem
    assert cache.current.version == "c"
    cache.close()


def test_the_last_good_snapshot_outlives_its_folder(store: Path) -> None:
    cache, snapshot = opened(store)
    wanted = snapshot.full.payload.read()
    shutil.rmtree(store)
    cache.refresh()
    assert cache.current is snapshot
    assert snapshot.full.payload.read() == wanted
    cache.close()


def test_a_version_that_is_replaced_by_hand_is_opened_anew(store: Path, source: Path) -> None:
    cache, _ = opened(store)
    shutil.rmtree(store)
    publish(source, store, block=99, version="a", groups=4)
    assert cache.refresh()
    assert cache.current is not None
    assert (cache.current.block, cache.current.groups) == (99, (0, 1, 2, 3))
    assert len(cache.versions()) == 1
    cache.close()


def test_rolling_back_by_hand(store: Path, source: Path) -> None:
    publish(source, store, block=2, version="b", groups=2)
    cache, _ = opened(store)
    os.symlink("snapshots/a", store / "back")
    os.rename(store / "back", store / "current")
    assert cache.refresh()
    assert cache.current is not None
    assert cache.current.version == "a"
    cache.close()
    publish(source, store, block=3, version="c", groups=2)
    check_store(store, SPECS, write_checkpoint(source, SPECS), SPLIT)
    assert sorted(os.listdir(store / "snapshots")) == ["a", "b", "c"]


def test_running_out_of_descriptors_is_tried_again(store: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    cache = SnapshotCache(store, warn=warnings.append)
    cache.refresh()
    publish(source, store, block=2, version="b", groups=2)

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("bzstream.model.snapshot.UnitFile", refuse)
        for _ in range(3):
            assert not cache.refresh()
    assert cache.current is not None
    assert cache.current.version == "a"
    assert len(warnings) == 1
    assert cache.refresh()
    assert cache.current.version == "b"
    cache.close()


def test_opening_a_folder_that_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="cannot be read"):
        open_snapshot(tmp_path)
