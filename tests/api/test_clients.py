"""curl, aria2c and wget fetch a slice, are killed on the way, go on, and end with the published hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nodes import Node, eventually

URL = "{node.url}/model/partial?format=safetensors"
ENOUGH = 1 << 20
"""Bytes that the first attempt must have on disk before it is killed."""


def curl(node: Node, out: Path) -> list[str]:
    headers = [part for name, value in node.headers(0).items() for part in ("-H", f"{name}: {value}")]
    return ["curl", "-sS", "-f", "-C", "-", "-o", str(out), *headers, URL.format(node=node)]


def wget(node: Node, out: Path) -> list[str]:
    headers = [f"--header={name}: {value}" for name, value in node.headers(0).items()]
    return ["wget", "-q", "-c", "-O", str(out), *headers, URL.format(node=node)]


def aria2c(node: Node, out: Path) -> list[str]:
    headers = [f"--header={name}: {value}" for name, value in node.headers(0).items()]
    options = ["-q", "-c", "-x8", "-s8", "-k1M", "--file-allocation=none", "--auto-save-interval=1", "-o", out.name]
    return ["aria2c", *options, "-d", str(out.parent), *headers, URL.format(node=node)]


SLOWLY = {"curl": ["--limit-rate", "4M"], "wget": ["--limit-rate=4M"], "aria2c": ["--max-download-limit=4M"]}


@pytest.mark.parametrize("client", [curl, wget, aria2c])
def test_resume_ends_with_the_published_hash(
    node: Node, tmp_path: Path, client: Callable[[Node, Path], list[str]]
) -> None:
    name = client.__name__
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    out = tmp_path / "group-0.safetensors"
    whole, *rest = client(node, out)
    first = subprocess.Popen([whole, *SLOWLY[name], *rest])
    # Blocks, not size: aria2c writes all over a sparse file.
    eventually(lambda: out.exists() and out.stat().st_blocks * 512 > ENOUGH, f"{name} has some of it")
    first.send_signal(signal.SIGINT if name == "aria2c" else signal.SIGKILL)  # aria2c writes its notes on SIGINT
    first.wait()
    size = int(node.request("HEAD", "/model/partial?format=safetensors", node.headers(0)).headers["Content-Length"])
    had = out.stat().st_blocks * 512
    assert had < size, f"{name} was killed before it was done"
    seen = len(node.log())
    subprocess.run([whole, *rest], check=True, timeout=60)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    published = node.request("HEAD", "/model/partial", node.headers(0)).headers["X-Content-Hash"]
    assert f"sha256:{digest}" == published
    resumed = [line for line in node.log()[seen:].splitlines() if "method=GET" in line and "unit=partial/0" in line]
    if name == "aria2c":  # it asks for the first hole without a Range and breaks off where the hole ends
        resumed = [line for line in resumed if "status=200" not in line]
    assert resumed
    assert all("status=206" in line for line in resumed), "only the rest was fetched"
    assert os.path.getsize(out) == size
