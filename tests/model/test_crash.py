"""SIGKILL at any point of a publish: the old snapshot is served throughout, and the next publish cleans up.

A long run tries every system call; other runs try some, and always the first and the last ones, which commit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from bzstream.model import SnapshotCache, publish
from bzstream.model.inspection import inspect_store, verify_store
from tests.seeds import seeds

from .build import check_store, contents, fused, write_checkpoint


class Kill(Protocol):
    """Publish version "new" into a store, killed at a call or after a time; "killed", or how many calls it made."""

    def __call__(self, store: Path, at: int = 0, after: float | None = None) -> str: ...


SPECS = fused(experts=8)
GROUPS = 8
SPLIT = {group: {0: (group,), 1: (group,)} for group in range(GROUPS)}
OLD, NEW = contents(SPECS, 0), {**contents(SPECS, 0), "lm_head.weight": bytes(256)}
"""Between the two only the shared unit changes: the others are linked, so a publish both writes and links."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory where there is one: some 10,000 syncs would otherwise wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def source(place: Path) -> Path:
    write_checkpoint(place / "new", SPECS, NEW, shards=2)
    return place / "new"


@pytest.fixture(scope="module")
def kill(source: Path) -> Iterator[Kill]:
    command = [sys.executable, "-m", "tests.model.killed"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(store: Path, at: int = 0, after: float | None = None) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            request = {"source": str(source), "store": str(store), "version": "new", "kill": at, "after": after}
            process.stdin.write(json.dumps(request) + "\n")
            return process.stdout.readline().strip()

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def published(place: Path) -> Path:
    """A store with three versions, so that a publish also deletes one."""
    write_checkpoint(place / "old", SPECS, OLD)
    for number, version in enumerate(["old-0", "old-1", "old"]):
        publish(place / "old", place / "published", block=number, version=version, groups=GROUPS)
    return place / "published"


def copy(store: Path, target: Path) -> Path:
    """A store like `store`, with its times and hard links."""
    copies: dict[int, str] = {}

    def once(old: str, new: str) -> None:
        inode = os.stat(old, follow_symlinks=False).st_ino
        if inode in copies:
            os.link(copies[inode], new)
        else:
            copies[inode] = new
            shutil.copy2(old, new, follow_symlinks=False)

    shutil.copytree(store, target, symlinks=True, copy_function=once)
    return target


def check_after_kill(store: Path, source: Path, *, begun: str | None) -> None:
    """What must hold after a publish of "new" was killed; `begun` is the version that was current before."""
    current = Path(os.readlink(store / "current")).name if (store / "current").is_symlink() else None
    assert current in (begun, "new")
    cache = SnapshotCache(store)
    cache.refresh()
    assert (cache.current.version if cache.current else None) == current
    assert cache.damaged == []
    cache.close()
    if current == begun:
        publish(source, store, block=2, version="new", groups=GROUPS)
    else:
        publish(source, store, block=3, version="newer", groups=GROUPS)
    check_store(store, SPECS, NEW, SPLIT)
    report = verify_store(store)
    assert (report.findings, report.leftovers) == ((), ())
    assert sorted(os.listdir(store)) == [".lock", "current", "snapshots"]
    assert sorted(os.listdir(store / "snapshots")) == sorted(record.version for record in report.snapshots)
    for record in report.snapshots:
        wanted = {"snapshot.json", "files", *(unit.file for unit in record.units if unit.file)}
        assert set(os.listdir(store / "snapshots" / record.version)) == wanted


def points(calls: int) -> list[int]:
    """The calls to kill at."""
    some = random.Random(3).sample(range(1, calls + 1), seeds(8, calls))
    return sorted({1, *some, *range(calls - 8, calls + 1)})


def test_killed_at_every_call_of_a_later_publish(kill: Kill, published: Path, source: Path, place: Path) -> None:
    calls = int(kill(copy(published, place / "whole"), 0))
    assert calls >= 55
    for at in points(calls):
        store = copy(published, place / "store")
        old = SnapshotCache(store)
        assert old.refresh()
        assert kill(store, at) == "killed"
        old.refresh()
        assert old.current is not None
        assert old.current.version in ("old", "new")
        assert old.current.full.intact()
        old.close()
        check_after_kill(store, source, begun="old")
        shutil.rmtree(store)


def test_killed_at_every_call_of_the_first_publish(kill: Kill, source: Path, place: Path) -> None:
    calls = int(kill(place / "first", 0))
    assert calls >= 55
    for at in points(calls):
        store = place / "store"
        assert kill(store, at) == "killed"
        check_after_kill(store, source, begun=None)
        shutil.rmtree(store)


def test_killed_again_while_cleaning_up(kill: Kill, published: Path, source: Path, place: Path) -> None:
    """Two kills in a row, at random calls: the second also hits the recovery from the first."""
    pick = random.Random(1)
    calls = int(kill(copy(published, place / "again"), 0))
    for _ in range(seeds(8, 80)):
        store = copy(published, place / "store")
        assert kill(store, pick.randint(1, calls)) == "killed"
        kill(store, pick.randint(1, calls))
        check_after_kill(store, source, begun="old")
        shutil.rmtree(store)


def test_killed_at_random_times(kill: Kill, published: Path, source: Path, place: Path) -> None:
    """From outside: the kill may hit anything, also between two calls."""
    pick = random.Random(2)
    begun = time.monotonic()
    assert kill(copy(published, place / "timed")).isdigit()
    whole = time.monotonic() - begun
    for _ in range(seeds(6, 40)):
        store = copy(published, place / "store")
        kill(store, after=pick.uniform(0, whole))
        check_after_kill(store, source, begun="old")
        shutil.rmtree(store)


def test_a_pending_flip_is_not_offered(published: Path, place: Path) -> None:
    """Between the two last renames the new folder is whole, but it is not published: nobody may see it yet."""
    store = copy(published, place / "pending")
    os.symlink("snapshots/old", store / "current.new")
    os.rename(store / "current.new", store / "current")
    shutil.copytree(store / "snapshots/old", store / "snapshots/next")
    os.symlink("snapshots/next", store / ".current-next")
    cache = SnapshotCache(store)
    cache.refresh()
    assert sorted(snapshot.version for snapshot in cache.versions()) == ["old", "old-0", "old-1"]
    cache.close()
    assert ".current-next" in inspect_store(store).leftovers
