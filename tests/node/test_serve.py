"""The supervisor and its children as processes: starting, refusing to start, taking changes in, ending, dying."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.api.worker import CHAIN_POLL_S
from bzstream.api.worker import POLL_S as WORKER_POLL_S
from bzstream.chain.role import POLL_S
from bzstream.cli import command_line
from bzstream.demo.running_node import clean_environment
from bzstream.errors import BzstreamError
from bzstream.model import publish
from tests.nodes import (
    BLOCK,
    GROUPS,
    TOKEN,
    VERSION,
    Node,
    answers,
    child_processes,
    eventually,
    free_port,
    refused,
    running_node,
    write_chain,
)


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder with a store of its own."""
    publish(checkpoint, tmp_path / "store", block=BLOCK, version=VERSION, groups=GROUPS)
    return tmp_path


def serve(*arguments: str, token: str | None = TOKEN, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `bzstream serve` that is expected to refuse."""
    own = {} if token is None else {"BZ_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "bzstream", "serve", *arguments]
    return subprocess.run(
        command, env={**clean_environment(), **own, **environment}, capture_output=True, text=True, check=False
    )


def check(*arguments: str, token: str | None = TOKEN, **environment: str) -> str:
    """What `bzstream serve --check` raises, in this process; empty when it finds nothing."""
    own: dict[str, str | None] = {name: None for name in os.environ if name.startswith("BZ_")}
    own |= {"BZ_AUTH_TOKEN": token, **environment}
    result = CliRunner().invoke(command_line(["serve"]), ["serve", "--check", *arguments], env=own)
    assert isinstance(result.exception, BzstreamError) or result.exit_code == 0, result.exception
    return "" if result.exit_code == 0 else str(result.exception)


def test_serve_refuses_to_start(place: Path) -> None:
    store = ("--store", str(place / "store"), "--chain-file", str(place / "chain.json"), "--no-evaluator", "--port=0")
    write_chain(place, "5F")
    tokens = place / "loose.toml"
    tokens.write_text('"a" = "b"')
    tokens.chmod(0o644)
    (place / "notes.txt").write_text("not a database")
    real_chain = ("--store", str(place / "store"), "--no-evaluator", "--port=0")
    on_chain = {"BZ_CHAIN_ENDPOINT": '["ws://127.0.0.1:1"]', "BZ_CHAIN_NETUID": "1"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for said, says in (
            (check(*store, token=None), "BZ_AUTH_TOKEN"),
            (check(*store, token=""), "BZ_AUTH_TOKEN"),
            (check(*store, token="x" * 31), "32"),
            (check(*store, "--port", port), port),
            (check(*store, "--metrics-port", port), "metrics"),
            (check("--chain-file", "x"), "--store"),
            (check("--store", str(place / "mistyped")), "no store"),
            (check(*store, "--chain-file", str(place / "none.json")), "no chain file"),
            (check(*store, BZ_TOKENS_FILE=str(tokens)), "0600"),
            (check(*store, BZ_TOKENS_FILE=str(place / "none.toml")), "tokens file"),
            (check(*store, BZ_HTTP_PORT="many"), "BZ_HTTP_PORT"),
            (check(*store, BZ_HTTP_TRUSTED_PROXIES='["here"]'), "trusted_proxies"),
            (check(*store, "--tls-cert", str(place / "none.pem"), "--tls-key", "x"), "none.pem"),
            (check(*store, "--tls-cert", "x"), "--tls-key"),
            (check(*store[:4], BZ_EVALUATION_DATA=str(place / "none.npy")), "none.npy"),
            (check(*store, "--config", str(place / "none.toml")), "none.toml"),
            (check(*store, BZ_LEDGER="postgresql://me:secret@127.0.0.1:1/none"), "the ledger"),
            (check(*store, "--ledger", str(place / "notes.txt")), "not a ledger"),
            (check(*store, "--ledger", str(place / "none" / "ledger.sqlite")), "ledger"),
            (check(*store, BZ_NODE_WALLET=str(place / "no-wallet")), "no-wallet"),
            (check(*store[:4], "--role", "evaluator"), "evaluation.data"),
            (check(*store, "--role", "evaluator", BZ_EVALUATION_DATA="x"), "switched off"),
            (check(*real_chain, BZ_CHAIN_SET_WEIGHTS="true", **on_chain), "node.wallet"),
        ):
            assert says in said, (says, said)
            assert "\n" not in said
            assert "secret" not in said
    assert not (place / "mistyped").exists(), "a store is never made by serving it"
    assert check(*store) == ""


def test_a_refusal_is_one_line_and_status_1(place: Path) -> None:
    store = ("--store", str(place / "store"), "--no-evaluator")
    for arguments in (
        ("--chain-file", str(place / "none.json")),
        ("--chain-file", str(place / "none.json"), "--check"),
    ):
        result = serve(*store, *arguments)
        assert result.returncode == 1, result
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("bzstream: there is no chain file")
    assert serve(*store, "--role", "cook").returncode == 2


@pytest.mark.parametrize(
    ("missing", "settings", "says"),
    [
        ("psycopg", {"BZ_LEDGER": "postgresql://me@127.0.0.1/x"}, "psycopg; install"),
        ("bittensor", {"BZ_CHAIN_ENDPOINT": '["ws://127.0.0.1:1"]', "BZ_CHAIN_NETUID": "1"}, "bittensor; install"),
        ("torch", {"BZ_EVALUATION_DATA": "pyproject.toml"}, "torch; install"),
    ],
)
def test_what_is_not_installed_is_found_at_start(
    place: Path, monkeypatch: pytest.MonkeyPatch, missing: str, settings: dict[str, str], says: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    options = () if missing == "torch" else ("--no-evaluator",)
    if missing != "bittensor":
        write_chain(place, "5F")
        settings = {**settings, "BZ_CHAIN_FILE": str(place / "chain.json")}
    assert says in check("--store", str(place / "store"), "--port=0", *options, **settings)


def test_what_is_in_force_within_a_second() -> None:
    """The contract: a new snapshot, chain file or tokens file is in force within 1 s, on a machine that keeps up."""
    assert WORKER_POLL_S <= 0.5
    assert POLL_S + CHAIN_POLL_S <= 0.5


def test_a_new_snapshot_is_in_force_within_a_second(place: Path, checkpoint: Path) -> None:
    with running_node(place) as node:
        old = node.get("/model/partial", node.headers(0))
        publish(checkpoint, node.store, block=BLOCK + 1, version="step_1001", groups=GROUPS)
        eventually(lambda: node.get("/model", node.headers()).json["current"] == "step_1001", "flip")
        new = node.get("/model/partial", node.headers(0))
        assert new.headers["X-Model-Version"] == "step_1001"
        assert new.headers["ETag"] != old.headers["ETag"], "the envelope changed"
        assert node.get(f"/model/partial?version={VERSION}", node.headers(0)).body == old.body


def test_a_node_without_a_snapshot_starts_and_waits(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "store").mkdir()
    with running_node(tmp_path, wait=False) as node:
        eventually(lambda: answers(node), "the node answers")
        eventually(lambda: node.health()["current_block"] == BLOCK, "the chain is known")
        health = node.health()
        assert (health["status"], health["model_loaded"]) == ("starting", False)
        answer = node.get("/model/partial", node.headers(0))
        assert (answer.status, answer.json["code"]) == (503, "model_not_loaded")
        assert int(answer.headers["Retry-After"]) > 0
        assert node.get("/model/full", node.as_validator()).status == 503
        publish(checkpoint, node.store, block=BLOCK, version=VERSION, groups=GROUPS)
        eventually(lambda: node.health()["status"] == "healthy", "the snapshot is served")


def test_a_new_chain_file_is_in_force_within_a_second(place: Path) -> None:
    with running_node(place) as node:
        assert node.health()["phase"] == "train"
        node.write_chain(12530)
        eventually(lambda: node.health()["phase"] == "submit", "the phase")
        assert node.health()["current_block"] == 12530
        assert node.get("/model/full", node.as_validator()).status == 200
        node.write_chain(12530, validators=[])
        eventually(lambda: node.get("/model/full", node.as_validator()).status == 403, "permits")
        (place / "chain.json").write_text("{")
        eventually(lambda: "is not usable" in node.log(), "the file is refused in the log")
        assert node.health() == {"status": "healthy", "model_loaded": True, "current_block": 12530, "phase": "submit"}


def test_a_cycle_of_nine_phases(place: Path) -> None:
    """Phases of the subnet's own: 500 blocks, of which those from the 340th on take submissions."""
    phases = [
        ["distribute", 20, "distribute"], ["train", 300, "train"], ["commit_1", 10, "commit"],
        ["commit_2", 10, "commit"], ["submit", 80, "submit"], ["validate", 10, "train"], ["merge", 50, "train"],
        ["commit_3", 10, "commit"], ["commit_4", 10, "commit"],
    ]  # fmt: skip
    environment = {"BZ_CHAIN_PHASES": json.dumps(phases), "BZ_CHAIN_CYCLE_OFFSET": "7"}
    with running_node(place, environment=environment) as node:
        for block, phase, detail in ((12007 + 340, "submit", "submit"), (12007 + 431, "train", "merge")):
            node.write_chain(block)
            expected = {"current_block": block, "phase": phase, "phase_detail": detail}
            eventually(partial(lambda all_of: node.health().items() >= all_of.items(), expected), "the phase")


def test_a_changed_tokens_file_is_in_force_within_a_second(place: Path) -> None:
    with running_node(place) as node:
        fresh = "y" * 40
        tokens = node.tokens_file
        good = tokens.read_text()
        tokens.write_text(good + f'"{fresh}" = "{node.hotkey}"\n')
        headers = {"Authorization": f"Bearer {fresh}"}
        eventually(lambda: node.get("/model", headers).status == 200, "the new token")
        tokens.write_text(good + "not toml")
        eventually(lambda: "until then what it last held" in node.log(), "the warning")
        assert node.get("/model", headers).status == 200, "the last good one stays"
        assert node.log().count("until then what it last held") == 1
        tokens.write_text(good)
        eventually(lambda: node.get("/model", headers).status == 401, "the token is gone")
        assert fresh not in node.log()
        assert TOKEN not in node.log()


def test_a_cut_file_is_not_served(place: Path) -> None:
    with running_node(place) as node:
        file = node.store / "snapshots" / VERSION / "group-1.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        for path, headers in (("/model/partial", node.headers(1)), ("/model/full", node.as_validator())):
            answer = node.get(path, headers)
            assert (answer.status, answer.json["code"]) == (503, "unit_damaged")
        assert node.get("/model/partial", node.headers(0)).status == 200
        eventually(lambda: node.health()["status"] == "degraded", "health tells")
        assert any("partial/1" in reason for reason in node.health()["reasons"])


def test_a_worker_that_dies_is_started_again(place: Path) -> None:
    with running_node(place, "--workers", "2") as node:
        workers = child_processes(node.process.pid, "http")
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        # The supervisor holds the listening sockets, so that connections queue instead of being refused.
        assert node.get("/health").status == 200
        eventually(lambda: len(child_processes(node.process.pid, "http")) == 2, "both are back")
        assert not set(child_processes(node.process.pid, "http")) & set(workers)


def test_killing_the_supervisor_leaves_nothing(place: Path) -> None:
    with running_node(place, "--workers", "2") as node:
        family = child_processes(node.process.pid)
        assert len(family) == 3
        node.process.kill()
        node.process.wait()
        eventually(lambda: not any(alive(child) for child in family), "no process is left")
        eventually(lambda: free(node.port), "the port is free")


def test_sigterm_drains(place: Path) -> None:
    with running_node(place) as node, half_a_download(node) as (download, rest):
        node.process.send_signal(signal.SIGTERM)
        eventually(lambda: refused(node.port), "new connections are refused")
        received = 0
        while chunk := download.recv(1 << 20):
            received += len(chunk)
        assert received == rest, "the download under way was finished"
        assert node.process.wait(timeout=120) == 0


def test_drain_has_an_end(place: Path) -> None:
    with running_node(place, environment={"BZ_HTTP_DRAIN_S": "0.5"}) as node, half_a_download(node):
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(timeout=120) == 0


@contextmanager
def half_a_download(node: Node) -> Iterator[tuple[socket.socket, int]]:
    """A connection that has read the head of the full model and nothing more: (the socket, the bytes to come)."""
    with socket.create_connection(("127.0.0.1", node.port)) as download:
        download.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        head = f"GET /model/full HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {node.validator_token}\r\n\r\n"
        download.sendall(head.encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += download.recv(4096)
        head_bytes, body = data.split(b"\r\n\r\n", 1)
        length = re.search(rb"(?i)content-length: (\d+)", head_bytes)
        assert length is not None
        yield download, int(length[1]) - len(body)


def test_sighup_reads_the_settings_again(place: Path) -> None:
    config = place / "bzstream.toml"
    config.write_text("[auth]\ntrust_claimed_hotkey = false\n")
    with running_node(place, "--config", str(config)) as node:
        claim = {**node.headers(), "X-Hotkey": node.validator.ss58_address}
        assert node.get("/model/full", claim).status == 403
        config.write_text("[auth]\ntrust_claimed_hotkey = true\n")
        node.process.send_signal(signal.SIGHUP)
        eventually(lambda: node.get("/model/full", claim).status == 200, "the claim counts now")
        config.write_text("[auth]\ntrust_claimed_hotkey = 7\n")
        node.process.send_signal(signal.SIGHUP)
        eventually(lambda: "settings not reloaded" in node.log(), "bad settings are refused")
        assert node.get("/model/full", claim).status == 200


def test_one_role_alone(place: Path) -> None:
    with running_node(place, "--role", "http", wait=False) as node:
        eventually(lambda: answers(node), "the node answers")
        assert node.get("/model/partial", node.headers(0)).status == 200, "downloads need the store alone"
        health = node.health()
        assert health["status"] == "degraded"
        assert (health["current_block"], health["phase"]) == (0, "distribute")
        answer = node.get("/model/full", node.as_validator())
        assert (answer.status, answer.json["code"]) == (503, "chain_unknown")


def test_metrics_of_all_workers(place: Path) -> None:
    port = free_port()
    with running_node(place, "--workers", "2", "--metrics-port", str(port)) as node:
        for _ in range(20):
            assert node.get("/model/partial", node.headers(0)).status == 200
        metrics = dataclasses.replace(node, port=port)

        def counted() -> bool:
            text = metrics.get("/metrics").body.decode()
            return 'bzstream_unit_downloads_total{outcome="complete",unit="partial/0"} 20.0' in text

        eventually(counted, "20 downloads over both workers")
        text = metrics.get("/metrics").body.decode()
        assert f"bzstream_snapshot_block {float(BLOCK)}" in text
        assert TOKEN not in text


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_json_logs_hold_no_secret(place: Path) -> None:
    with running_node(place, "--log-json") as node:
        node.get("/model/partial?format=safetensors", node.headers(0))
        eventually(lambda: '"unit":"partial/0"' in node.log().replace(" ", ""), "the request is logged")
        assert TOKEN not in node.log()


def alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def free(port: int) -> bool:
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            again.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
