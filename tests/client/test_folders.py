"""File systems that lack something, and what is in the way of a pull's files: it works, or a sentence says why not."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bzstream.client import DiskError
from tests.client.conftest import Puller
from tests.client.node import Node
from tests.client.test_pull import StopAfter, final


def refusing(number: int) -> Any:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_without_locks_it_is_said(
    number: int, payload: bytes, tmp_path: Path, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    said: list[str] = []
    pull_quickly(notify=said.append)
    assert final(tmp_path).read_bytes() == payload
    assert "has no locks" in said[0]


def test_without_shared_mappings_a_pull_still_goes_on_where_it_stopped(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mmap.mmap

    def private_only(fd: int, size: int, *more: Any, **options: Any) -> mmap.mmap:
        if fd != -1:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real(fd, size, *more, **options)

    monkeypatch.setattr(mmap, "mmap", private_only)
    node.rate = 2e6
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(progress=StopAfter(1_500_000), connections=1)
    node.rate = 0
    assert pull_quickly().fetched <= len(payload) - 1_400_000
    assert final(tmp_path).read_bytes() == payload


def test_without_folder_sync_files_are_as_durable_as_can_be(
    payload: bytes, tmp_path: Path, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def files_only(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    pull_quickly()
    assert final(tmp_path).read_bytes() == payload


def test_without_direct_writes(
    payload: bytes, tmp_path: Path, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", no_direct)
    pull_quickly()
    assert final(tmp_path).read_bytes() == payload


NAMES = ("group-0.safetensors", ".group-0.safetensors.part", ".group-0.safetensors.state")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_in_the_way_is_named(
    name: str, kind: str, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    place = tmp_path / "out" / name
    place.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
        (place / "something").touch()
    else:
        place.symlink_to(place)
    if name.endswith(".state") and kind != "folder":
        # A state file of ours may replace what is no state file; nothing else may.
        pull_quickly()
        assert final(tmp_path).read_bytes() == payload
        return
    with pytest.raises(DiskError, match=re.escape(name)):
        pull_quickly()
    assert place.is_symlink() or not place.is_file()


def test_a_link_to_a_device_is_not_written_to(tmp_path: Path, pull_quickly: Puller) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "group-0.safetensors").symlink_to("/dev/zero")
    with pytest.raises(DiskError, match="no regular file"):
        pull_quickly()
