"""`bzstream backup`: a copy of a ledger in use, and what it says of what it cannot copy."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bzstream.model import publish
from bzstream.submissions.ledger import Ledger
from tests.model.build import fused, write_checkpoint
from tests.nodes import BLOCK, GROUPS, VERSION, run_manual, running_node
from tests.submissions.test_processes import miners, rows
from tests.submissions.values import HOTKEYS, accepted, candidate

BACKUP = [sys.executable, "-m", "bzstream", "backup"]
MANUAL = Path(__file__).parents[2] / "docs" / "operator.md"


def backup(ledger: object, copy: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BACKUP, str(ledger), str(copy)], capture_output=True, text=True, timeout=120, check=False)


def new_ledger(file: Path) -> Path:
    Ledger.open(file).close()
    return file


def test_all_that_was_accepted_before_is_in_a_copy_made_under_load(tmp_path: Path) -> None:
    ledger, copy = tmp_path / "ledger.sqlite", tmp_path / "copy.sqlite"
    with miners(str(ledger)) as miner:
        pid = miner.start(0, 10**6)
        try:
            before = [answer for answer in (miner.answer() for _ in range(300)) if answer is not None]
            shutil.copyfile(ledger, tmp_path / "cp.sqlite")
            done = backup(ledger, copy)
            after = [miner.answer() for _ in range(50)]
        finally:
            os.kill(pid, signal.SIGKILL)
        miner.answers()
    assert (done.returncode, done.stderr) == (0, "")
    held = rows(str(copy))
    assert done.stdout == f"{copy}: {len(held):,} submissions\n"
    assert len(before) == 300
    assert set(before) <= set(held)
    assert set(held) <= set(rows(str(ledger)))
    assert None not in after, "nobody who submits was disturbed"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(".copy*"))
    with closing(sqlite3.connect(tmp_path / "cp.sqlite")) as plain, pytest.raises(sqlite3.Error):
        plain.execute("SELECT * FROM submissions")  # why there is a command for it


def test_a_copy_of_what_a_kill_left_behind(tmp_path: Path) -> None:
    ledger, copy = tmp_path / "ledger.sqlite", tmp_path / "copy.sqlite"
    with miners(str(ledger)) as miner:
        pid = miner.start(0, 10**6)
        given = [miner.answer() for _ in range(50)]
        os.kill(pid, signal.SIGKILL)
        miner.answers()
    assert Path(f"{ledger}-wal").stat().st_size
    assert backup(ledger, copy).returncode == 0
    assert set(given) <= set(rows(str(copy)))


def test_the_manuals_backup_and_restore(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=BLOCK, version=VERSION, groups=GROUPS)
    (tmp_path / "backups").mkdir()
    back_up, restore = re.findall(r"```sh\n([^`]*/var/backups/[^`]*)```", MANUAL.read_text("utf-8"))

    def bash(script: str) -> None:
        script = script.replace("/var/lib/bzstream", str(store)).replace("/var/backups", str(tmp_path / "backups"))
        done = run_manual(script, tmp_path, {})
        assert (done.returncode, done.stderr) == (0, "")

    with running_node(tmp_path) as node:
        ledger = Ledger.open(store / "ledger.sqlite")
        first = accepted(ledger.accept(candidate(HOTKEYS[0])))
        bash(back_up)
        second = accepted(ledger.accept(candidate(HOTKEYS[1])))
        ledger.close()
        assert node.get(f"/submissions/{second}", node.headers()).status == 200
    bash(restore)
    with running_node(tmp_path) as node:
        assert node.get(f"/submissions/{first}", node.headers()).json["status"] == "queued"
        assert node.get(f"/submissions/{second}", node.headers()).status == 404


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    ledger, copy = new_ledger(tmp_path / "ledger.sqlite"), tmp_path / "copy.sqlite"
    copy.write_text("mine")
    for target in (copy, ledger):
        before = target.read_bytes()
        done = backup(ledger, target)
        assert (done.returncode, done.stdout) == (1, "")
        assert "exists already" in done.stderr
        assert target.read_bytes() == before


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    ledger, copy = new_ledger(tmp_path / "ledger.sqlite"), tmp_path / "out" / "copy.sqlite"
    copy.parent.mkdir()
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *BACKUP, str(ledger), str(copy)]  # 8 KiB
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"bzstream: the ledger {ledger} was not copied to {copy}: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(copy.parent) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("none", "there is no ledger"),
        ("text", "file is not a database"),
        ("other", "is not a ledger"),
        ("newer", "this bzstream knows"),
        ("postgresql://user:hunter2@host/db", "pg_dump"),
    ],
)
def test_what_cannot_be_copied_is_told_in_one_line(tmp_path: Path, given: str, says: str) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    for name, statement in (("other", "CREATE TABLE t (x)"), ("newer", "UPDATE schema_version SET version = 999")):
        database = sqlite3.connect(new_ledger(tmp_path / name) if name == "newer" else tmp_path / name)
        database.execute(statement)
        database.commit()
        database.close()
    before = sorted(os.listdir(tmp_path))
    done = backup(given if "://" in given else tmp_path / given, tmp_path / "copy")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert says in done.stderr
    assert "hunter2" not in done.stderr
    # SQLite may leave its own -wal and -shm files beside a database that it opened.
    assert [name for name in sorted(os.listdir(tmp_path)) if not name.endswith(("-wal", "-shm"))] == [
        name for name in before if not name.endswith(("-wal", "-shm"))
    ]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = backup(new_ledger(tmp_path / "ledger.sqlite"), tmp_path / "none" / "copy")
    assert done.returncode == 1
    assert "cannot be written: No such file or directory" in done.stderr
