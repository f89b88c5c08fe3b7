"""Payload against plain bytes: every slice, position and sum of any mix of parts is what bytes would give."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.payload import Extent, Payload, UnitFile, size_of

CONTENT = bytes(range(256))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnitFile]:
    path = tmp_path_factory.mktemp("payload") / "unit"
    path.write_bytes(CONTENT)
    opened = UnitFile(path)
    yield opened
    opened.release()


parts = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.tuples(st.integers(0, 200), st.integers(0, 20)),  # an extent: offset, length
    ),
    max_size=8,
)


def build(file: UnitFile, chosen: list[bytes | tuple[int, int]]) -> tuple[Payload, bytes]:
    made = tuple(part if isinstance(part, bytes) else Extent(file, *part) for part in chosen)
    plain = b"".join(part if isinstance(part, bytes) else CONTENT[part[0] : part[0] + part[1]] for part in chosen)
    return Payload(made), plain


@settings(deadline=None)  # a busy machine's pauses are no fault of ours
@given(chosen=parts, cuts=st.lists(st.tuples(*[st.none() | st.integers(-30, 60)] * 2), max_size=3))
def test_slices_of_slices(file: UnitFile, chosen: list[bytes | tuple[int, int]], cuts: list[tuple[int, int]]) -> None:
    payload, plain = build(file, chosen)
    for start, stop in cuts:
        payload, plain = payload[start:stop], plain[start:stop]
    assert len(payload) == len(plain)
    assert payload.read() == plain
    assert sum(size_of(part) for part in payload) == len(plain)
    assert all(size_of(part) for part in payload)


@settings(deadline=None)
@given(chosen=parts, data=st.data())
def test_at_gives_the_rest_of_a_part(
    file: UnitFile, chosen: list[bytes | tuple[int, int]], data: st.DataObject
) -> None:
    payload, plain = build(file, chosen)
    for outside in (-1, len(plain), len(plain) + 1):
        with pytest.raises(IndexError):
            payload.at(outside)
    if plain:
        position = data.draw(st.integers(0, len(plain) - 1))
        part = payload.at(position)
        found = Payload((part,)).read()
        assert found
        assert plain[position : position + len(found)] == found


@settings(max_examples=50, deadline=None)
@given(left=parts, right=parts)
def test_sums(file: UnitFile, left: list[bytes | tuple[int, int]], right: list[bytes | tuple[int, int]]) -> None:
    (first, one), (second, two) = build(file, left), build(file, right)
    both = first[1:] + second
    assert both.read() == one[1:] + two


def test_only_step_one(file: UnitFile) -> None:
    payload, plain = build(file, [b"abc", (0, 3)])
    assert payload[0:9:1].read() == plain
    with pytest.raises(ValueError, match="step 1"):
        payload[::2]


def test_files_are_counted_once_each_and_closed_by_the_last_user(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    file = UnitFile(tmp_path / "a")
    payload = Payload((Extent(file, 0, 2), b"-", Extent(file, 3, 2)))
    assert payload.files == payload[1:2].files == (file,)
    cut = payload[0:1]
    cut.retain()
    file.release()
    assert payload.read() == b"he-lo"
    cut.release()
    assert file.fd == -1
    for call in (file.retain, file.release):
        with pytest.raises(AssertionError):
            call()


def test_a_changed_file_is_not_intact_for_ever_after(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    file = UnitFile(path)
    payload = Payload((Extent(file, 0, 5),))
    assert payload.intact()
    status = os.stat(path)
    os.truncate(path, 4)
    assert not payload.intact()
    assert payload.read() == b"hell"
    target = memoryview(bytearray(5))
    assert payload.read_into(target) == 4
    assert bytes(target) == b"hell\0"
    path.write_bytes(b"hello")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not payload.intact()
    file.release()


def test_empty_missing_and_linked_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    file = UnitFile(tmp_path / "empty")
    assert (file.size, file.intact()) == (0, True)
    file.release()
    with pytest.raises(FileNotFoundError):
        UnitFile(tmp_path / "missing")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OSError, match="symbolic links"):
        UnitFile(tmp_path / "link")
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(tmp_path / "pipe")  # nobody writes: a plain open would hang
    for odd in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="not a regular file"):
            UnitFile(odd)
    assert len(os.listdir("/proc/self/fd")) == before
