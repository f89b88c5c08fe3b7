"""What is not published: senseless arguments, bad checkpoints, moving sources, full disks; and that nothing changes."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bzstream.model import ModelError, publish
from bzstream.model import checkpoint as checkpoint_module
from bzstream.model.errors import (
    BadCheckpoint,
    BadExpertMap,
    SourceChanged,
    StoreBusy,
    StoreFailed,
    VersionExists,
)

from .build import SPLIT, Signer, check_store, contents, fused, tree, write_checkpoint, write_file


@pytest.mark.parametrize("version", ["", ".hidden", "a/b", "../x", "a" * 65, "-a", "a b", "ä", "a\n"])
def test_a_version_must_be_a_plain_name(tmp_path: Path, version: str) -> None:
    write_checkpoint(tmp_path / "in", fused())
    with pytest.raises(ModelError, match="no model version"):
        publish(tmp_path / "in", tmp_path / "store", block=1, version=version, groups=2)
    assert not (tmp_path / "store").exists()


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    with pytest.raises(ModelError, match="no block number"):
        publish(tmp_path / "in", store, block=-1, version="a", groups=2)
    with pytest.raises(ModelError, match="at least one version"):
        publish(tmp_path / "in", store, block=1, version="a", groups=2, keep=0)
    with pytest.raises(BadExpertMap, match="either"):
        publish(tmp_path / "in", store, block=1, version="a")
    with pytest.raises(BadExpertMap, match="either"):
        publish(tmp_path / "in", store, block=1, version="a", groups=2, experts=SPLIT)
    with pytest.raises(BadExpertMap, match="too few"):
        publish(tmp_path / "in", store, block=1, version="a", groups=5)
    assert not store.exists()


def test_a_version_that_exists_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    before = tree(store)
    with pytest.raises(VersionExists, match="already has a version a"):
        publish(tmp_path / "in", store, block=2, version="a", groups=4)
    assert tree(store) == before


def test_a_second_publisher_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    before = tree(store)
    with (store / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy, match="another publish"):
            publish(tmp_path / "in", store, block=2, version="b", groups=2)
    assert tree(store) == before
    publish(tmp_path / "in", store, block=2, version="b", groups=2)


Meddle = Callable[[Path], None]


def cut(path: Path) -> None:
    os.truncate(path, os.stat(path).st_size // 2)


def touch_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("meddle", [cut, touch_byte, replace, Path.unlink])
def test_a_source_that_changes_underneath_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meddle: Meddle
) -> None:
    write_checkpoint(tmp_path / "in", fused(), shards=2)
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    before = tree(store)
    read = checkpoint_module.FileSource.read_into
    left = [3]

    def read_and_meddle(self: checkpoint_module.FileSource, offset: int, into: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            meddle(tmp_path / "in/model-00002-of-00002.safetensors")
        read(self, offset, into)

    monkeypatch.setattr(checkpoint_module.FileSource, "read_into", read_and_meddle)
    with pytest.raises(SourceChanged, match="model-00002-of-00002"):
        publish(tmp_path / "in", store, block=2, version="b", groups=2)
    assert tree(store) == before


def test_an_interrupted_publish_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    before = tree(store)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "in", store, block=2, version="b", groups=2, progress=interrupt)
    assert tree(store) == before


def test_a_signer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Signer):
        def sign_fields(self, fields: Mapping[str, object]) -> str:
            raise ModelError("no key")

    write_checkpoint(tmp_path / "in", fused())
    with pytest.raises(ModelError, match="no key"):
        publish(tmp_path / "in", tmp_path / "store", block=2, version="b", groups=2, signer=Broken())
    assert tree(tmp_path / "store") == {".lock": b""}


LIMITED = """
import resource, sys
from pathlib import Path
from bzstream.cli import main
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.mark.parametrize("limit", [100, 5000, 20_000])
def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path: Path, limit: int) -> None:
    """A file size limit fails as a full disk does: at a write, with an errno (EFBIG) and half a file behind."""
    write_checkpoint(tmp_path / "in", fused(hidden=64, inner=64))
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    before = tree(store)
    write_checkpoint(tmp_path / "in", fused(hidden=64, inner=64), contents(fused(hidden=64, inner=64), seed=1))
    command = [sys.executable, "-c", LIMITED, str(limit), "publish", str(tmp_path / "in"), "--store", str(store)]
    done = subprocess.run([*command, "--block", "2", "--version", "b", "--groups", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "not enough room" in done.stderr
    assert tree(store) == before


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "symlink", "rename", "replace", "mkdir"])
def test_what_the_system_refuses_is_one_sentence_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    specs = fused()
    data = write_checkpoint(tmp_path / "in", specs)
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    name = "lm_head.weight"
    write_checkpoint(tmp_path / "in", specs, {**data, name: bytes(len(data[name]))})
    before = tree(store)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{call}", refuse)
        with pytest.raises(StoreFailed, match="not enough room"):
            publish(tmp_path / "in", store, block=2, version="b", groups=2)
    assert tree(store) == before
    publish(tmp_path / "in", store, block=2, version="b", groups=2)


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "in", fused())
    room = os.statvfs_result((4096, 4096, 10, 10, 3, 10, 10, 10, 0, 255))
    monkeypatch.setattr("os.statvfs", lambda _: room)
    with pytest.raises(StoreFailed, match="not enough room"):
        publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    assert tree(tmp_path / "store") == {".lock": b""}
    monkeypatch.undo()
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)


def test_an_old_version_that_cannot_be_deleted_does_not_undo_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = fused()
    data = write_checkpoint(tmp_path / "in", specs)
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        with pytest.raises(StoreFailed, match="b was published, but"):
            publish(tmp_path / "in", store, block=2, version="b", groups=2, keep=1)
    check_store(store, specs, data, SPLIT)
    publish(tmp_path / "in", store, block=3, version="c", groups=2, keep=1)
    assert os.listdir(store / "snapshots") == ["c"]


def test_a_store_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="cannot be written"):
        publish(tmp_path / "in", tmp_path / "file" / "store", block=1, version="a", groups=2)


def break_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"model-{number:05d}-of-00003.safetensors"


def put_instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def set_head(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (lambda f: os.rename(f, f.with_name("gone")), "is not a folder"),
    "missing shard": (lambda f: shard(f).unlink(), "cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither"),
    "both forms": (lambda f: (f / "model.safetensors").write_bytes(b""), "does not name"),
    "truncated": (lambda f: os.truncate(shard(f), os.stat(shard(f)).st_size - 1), "damaged or incomplete"),
    "grown": (lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), "damaged or incomplete"),
    "empty": (lambda f: os.truncate(shard(f), 0), "too short"),
    "lying head": (
        lambda f: set_head(shard(f), b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,9]}}'),
        "ask for 4",
    ),
    "oversize head": (lambda f: shard(f).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), "claims"),
    "not json": (lambda f: set_head(shard(f), b"hello"), "not a JSON object"),
    "duplicate name in a head": (lambda f: set_head(shard(f), b'{"a":1,"a":2}'), "twice"),
    "unknown dtype": (lambda f: set_head(shard(f), b'{"a":{"dtype":"Q4","shape":[0],"data_offsets":[0,0]}}'), "dtype"),
    "fifo": (lambda f: put_instead(shard(f), os.mkfifo), "not a regular file"),
    "folder as shard": (lambda f: put_instead(shard(f), Path.mkdir), "not a regular file"),
    "duplicate name in two shards": (
        lambda f: write_file(shard(f, 2), {"lm_head.weight": ("U8", (1,))} | dict(fused()), contents(fused())),
        "is in both",
    ),
    "index without map": (lambda f: break_index(f, lambda i: i.pop("weight_map")), "no weight_map"),
    "index with a path": (
        lambda f: break_index(f, lambda i: i["weight_map"].update(x="../../etc/passwd.safetensors")),
        "no .safetensors file name",
    ),
    "index with another type": (
        lambda f: break_index(f, lambda i: i["weight_map"].update(x="pytorch_model.bin")),
        "no .safetensors file name",
    ),
    "index names more": (
        lambda f: break_index(f, lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors")),
        "but it is not",
    ),
    "index names less": (lambda f: break_index(f, lambda i: i["weight_map"].pop("lm_head.weight")), "is not in"),
    "index is no json": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "config is no json": (lambda f: (f / "config.json").write_text("nothing"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config disagrees": (lambda f: (f / "config.json").write_text('{"num_experts": 7}'), "there are 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_one_sentence_and_changes_nothing(tmp_path: Path, case: str) -> None:
    spoil, sentence = BAD[case]
    write_checkpoint(tmp_path / "in", fused(), shards=3)
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    before = tree(store)
    spoil(tmp_path / "in")
    with pytest.raises(BadCheckpoint, match=sentence) as caught:
        publish(tmp_path / "in", store, block=2, version="b", groups=2)
    assert "\n" not in str(caught.value)
    assert tree(store) == before
    fresh = tmp_path / "fresh"
    with pytest.raises(BadCheckpoint):
        publish(tmp_path / "in", fresh, block=2, version="b", groups=2)
    assert not fresh.exists()
