"""Reads and writes that go on until they are done, bounded reads, stamps and hashes."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from bzstream.util.durable import replace_file, sync_folder, temporary_name, write_file
from bzstream.util.files import file_stamp, hash_file, read_fully, read_small_file, stamp_of, write_fully


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:2]], offset))
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    try:
        write_fully(fd, b"0123456789", 5)
        into = memoryview(bytearray(8))
        assert read_fully(fd, into, 6) == 8
        assert bytes(into) == b"12345678"
        assert read_fully(fd, into, 13) == 2  # the file ends
        assert bytes(into[:2]) == b"89"
        assert read_fully(fd, into, 99) == 0
    finally:
        os.close(fd)


def test_a_pipe_is_written_without_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    reader, writer = os.pipe()
    try:
        write_fully(writer, b"0123456789")
        assert os.read(reader, 100) == b"0123456789"
    finally:
        os.close(reader)
        os.close(writer)


def test_small_files_are_bounded_and_regular(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_small_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_small_file(path, 4)
    os.mkfifo(tmp_path / "pipe")  # nobody writes: a plain open would hang
    for odd in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_small_file(odd, 5)
    with pytest.raises(FileNotFoundError):
        read_small_file(tmp_path / "missing", 5)

    def private(status: os.stat_result) -> None:
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(1, "others can read it")

    path.chmod(0o644)
    with pytest.raises(PermissionError, match="others"):
        read_small_file(path, 5, check=private)
    path.chmod(0o600)
    assert read_small_file(path, 5, check=private) == b"12345"


def test_a_stamp_tells_another_file_size_or_time_but_no_other_link(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    stamp = file_stamp(path)
    assert stamp == stamp_of(path.stat())
    fd = os.open(path, os.O_RDONLY)
    try:
        os.link(path, tmp_path / "b")
        os.unlink(tmp_path / "b")
        assert file_stamp(fd) == file_stamp(path) == stamp
    finally:
        os.close(fd)
    os.utime(path, ns=(0, 7))
    later = file_stamp(path)
    assert later != stamp
    path.write_bytes(b"1234")
    os.utime(path, ns=(0, 7))
    assert file_stamp(path) not in (stamp, later)
    assert file_stamp(tmp_path / "missing") is None


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"12345").hexdigest()


def test_a_written_file_has_its_mode_and_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    old = os.umask(0o077)
    try:
        write_file(path, b"one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        temporary_name(path).write_bytes(b"left by a crash")
        write_file(path, b"two", 0o600)
    finally:
        os.umask(old)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_file(path, b"one")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"two")
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"one"


def test_the_order_is_bytes_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(fd: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_file(tmp_path / "a", b"one")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize(("number", "ignored"), [(22, True), (38, True), (95, True), (5, False)])
def test_a_file_system_without_folder_sync_is_lived_with_and_a_broken_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, ignored: bool
) -> None:
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "new").write_bytes(b"x")
    if ignored:
        sync_folder(tmp_path)
        replace_file(tmp_path / "new", tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]
    else:
        with pytest.raises(OSError, match="Input/output"):
            sync_folder(tmp_path)
