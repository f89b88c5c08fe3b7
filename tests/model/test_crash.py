"""SIGKILL at some 210 points of a publish: the old snapshot is served throughout, and the next publish cleans up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bzstream.model import Library, publish
from bzstream.model.verify import inspect_store, verify_store

from .build import check_store, contents, fused, write_checkpoint

Kill = Callable[[Path, int], str]
"""Publish version "new" into a store, killed at the n-th call; "killed", or how many calls a whole publish makes."""

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

        def ask(store: Path, at: int, version: str = "new") -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            request = {"source": str(source), "store": str(store), "version": version, "kill": at}
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
    subprocess.run(["cp", "-a", str(store), str(target)], check=True)
    return target


def check_after_kill(store: Path, source: Path, *, begun: str | None) -> None:
    """What must hold after a publish of "new" was killed; `begun` is the version that was current before."""
    current = Path(os.readlink(store / "current")).name if (store / "current").is_symlink() else None
    assert current in (begun, "new")
    library = Library(store)
    library.refresh()
    assert (library.current.version if library.current else None) == current
    assert library.damaged == []
    library.close()
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
        wanted = {"snapshot.json", *(unit.file for unit in record.units if unit.file)}
        assert set(os.listdir(store / "snapshots" / record.version)) == wanted


@pytest.mark.slow
def test_killed_at_every_call_of_a_later_publish(kill: Kill, published: Path, source: Path, place: Path) -> None:
    calls = int(kill(copy(published, place / "whole"), 0))
    assert calls >= 55
    for at in range(1, calls + 1):
        store = copy(published, place / "store")
        old = Library(store)
        assert old.refresh()
        assert kill(store, at) == "killed"
        old.refresh()
        assert old.current is not None
        assert old.current.version in ("old", "new")
        assert old.current.full.intact()
        old.close()
        check_after_kill(store, source, begun="old")
        shutil.rmtree(store)


@pytest.mark.slow
def test_killed_at_every_call_of_the_first_publish(kill: Kill, source: Path, place: Path) -> None:
    calls = int(kill(place / "first", 0))
    assert calls >= 55
    for at in range(1, calls + 1):
        store = place / "store"
        assert kill(store, at) == "killed"
        check_after_kill(store, source, begun=None)
        shutil.rmtree(store)


@pytest.mark.slow
def test_killed_again_while_cleaning_up(kill: Kill, published: Path, source: Path, place: Path) -> None:
    """Two kills in a row, at random calls: the second also hits the recovery from the first."""
    pick = random.Random(1)
    calls = int(kill(copy(published, place / "again"), 0))
    for _ in range(80):
        store = copy(published, place / "store")
        assert kill(store, pick.randint(1, calls)) == "killed"
        kill(store, pick.randint(1, calls))
        check_after_kill(store, source, begun="old")
        shutil.rmtree(store)


@pytest.mark.slow
def test_killed_at_random_times(published: Path, source: Path, place: Path) -> None:
    """From outside, with the real command: the kill may hit anything, also between two calls."""
    pick = random.Random(2)
    command = [sys.executable, "-c", "from bzstream.cli import main; main()", "publish", str(source)]
    for _ in range(20):
        store = copy(published, place / "store")
        arguments = ["--store", str(store), "--block", "2", "--version", "new", "--groups", str(GROUPS)]
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        while not list(store.glob("snapshots/.new-*")) and process.poll() is None:
            pass  # the start of the interpreter is not what is to be hit
        try:
            process.wait(pick.uniform(0, 0.06))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        check_after_kill(store, source, begun="old")
        shutil.rmtree(store)


def test_a_pending_flip_is_not_offered(published: Path, place: Path) -> None:
    """Between the two last renames the new folder is whole, but it is not published: nobody may see it yet."""
    store = copy(published, place / "pending")
    os.symlink("snapshots/old", store / "current.new")
    os.rename(store / "current.new", store / "current")
    shutil.copytree(store / "snapshots/old", store / "snapshots/next")
    os.symlink("snapshots/next", store / ".current-next")
    library = Library(store)
    library.refresh()
    assert sorted(snapshot.version for snapshot in library.versions()) == ["old", "old-0", "old-1"]
    library.close()
    assert ".current-next" in inspect_store(store).leftovers
