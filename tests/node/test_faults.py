"""What a machine does to a node: full disks, closed descriptors, folders that vanish, another node beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.cli import command_line
from bzstream.demo.running_node import clean_environment
from bzstream.model import publish
from bzstream.node import NodeError
from bzstream.node.metrics_folder import PREFIX, MetricsFolder
from tests.nodes import BLOCK, GROUPS, TOKEN, VERSION, Node, child_processes, eventually, free_port, running_node

PYTHON = (sys.executable, "-m", "bzstream")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder with a published store."""
    folder = tmp_path_factory.mktemp("faults")
    publish(checkpoint, folder / "store", block=BLOCK, version=VERSION, groups=GROUPS)
    return folder


def kill_worker_and_wait(node: Node) -> None:
    """Kill the HTTP worker; another one serves."""
    (worker,) = eventually(lambda: child_processes(node.process.pid, "http"), "a worker runs")
    os.kill(worker, signal.SIGKILL)
    eventually(
        lambda: (now := child_processes(node.process.pid, "http")) and worker not in now, "a worker is started again"
    )
    node.wait_until_healthy()


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", "2> >(exec true)", "<&-", "<&- >&- 2>&-"])
def test_a_log_that_cannot_be_written_never_stops_supervision(place: Path, redirection: str) -> None:
    shell = ("bash", "-c", f'exec "$@" {redirection}', "bash", *PYTHON)
    with running_node(place, command=shell) as node:
        kill_worker_and_wait(node)
        assert node.get("/model/partial", node.headers(0)).status == 200
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(timeout=120) == 0


def test_counters_of_a_living_node_are_left_alone_and_those_of_a_dead_one_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    first, second = MetricsFolder(), MetricsFolder()
    first.ensure()
    second.ensure()
    mine = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    assert len(list(tmp_path.iterdir())) == 2, "the abandoned folder is gone, both nodes have one"
    shutil.rmtree(mine)
    second.ensure()
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == mine
    fd = os.open(mine, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_starts_again_after_the_counters_vanished(place: Path, tmp_path: Path) -> None:
    port = free_port()
    with running_node(place, "--metrics-port", str(port), environment={"TMPDIR": str(tmp_path)}) as node:
        (folder,) = tmp_path.glob(f"{PREFIX}*")
        shutil.rmtree(folder)
        kill_worker_and_wait(node)
        assert folder.is_dir()
    assert not folder.exists()


def test_without_a_folder_to_write_to_only_metrics_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setenv("BZ_AUTH_TOKEN", TOKEN)
    arguments = ["serve", "--check", "--store", str(place / "store"), "--role", "http", "--port", "0"]
    assert CliRunner().invoke(command_line(["serve"]), arguments).exit_code == 0
    refused = CliRunner().invoke(command_line(["serve"]), [*arguments, "--metrics-port", "0"])
    assert isinstance(refused.exception, NodeError)
    assert "metrics need a folder" in str(refused.exception)


def test_a_base_install_says_what_to_install(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("text " * 20_000)
    program = "import sys; sys.modules['torch'] = None; from bzstream.cli import main; main()"
    store = place / "store"
    arguments = ("evaluate", str(store / "current" / "group-0.safetensors"), "--group", "0", "--store", str(store))
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--data", str(data)],
        env={**clean_environment(), "BZ_EVALUATION_TOKENIZER": "bytes"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "bzstream: this needs torch; install it with: pip install 'bzstream[validator]'\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_health_tells_that_the_ledgers_disk_is_full(place: Path, small_disk: Path) -> None:
    ledger = ("--ledger", str(small_disk / "ledger.sqlite"))
    with running_node(place, *ledger, environment={"BZ_CHAIN_STALE_S": "0.5"}) as node:
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        eventually(lambda: any("disk" in reason for reason in node.health().get("reasons", ())), "the reason is told")
        assert node.get("/model/partial", node.headers(0)).status == 200
        filler.unlink()
        eventually(lambda: node.health()["status"] == "healthy", "it recovers")
