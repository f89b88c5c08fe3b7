"""The commands as a person or a script runs them: files, output, exit status."""

from __future__ import annotations

import json
import os
import pty
import pwd
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.chain.keys import KeyUnavailable, load_key
from bzstream.cli import command_line
from tests.client.node import HOTKEY, TOKEN, Node, Seen

ENVIRONMENT = {**os.environ, "BZ_AUTH_TOKEN": TOKEN, "COLUMNS": "120", "TERM": "xterm"}


def run(*arguments: str | Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "bzstream", *map(str, arguments)],
        env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_pull_says_what_it_did_in_words_and_in_json(node: Node, payload: bytes, tmp_path: Path) -> None:
    arguments = ("pull", node.url, "--group", "0", "--out", tmp_path / "out", "--hotkey", HOTKEY)
    said = run(*arguments).stdout
    assert "3.0 MB of version step_1" in said
    assert node.units["partial", 0].sha256 in said
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["version"] == "step_1"
    assert document["units"][0]["fetched"] == 0
    assert document["units"][0]["content_hash"] == "sha256:" + node.units["partial", 0].sha256


def test_pull_fails_with_one_line_and_status_1(node: Node, tmp_path: Path) -> None:
    arguments = ("pull", node.url, "--out", tmp_path / "out", "--hotkey", HOTKEY)
    for more, words in (
        (("--group", "7"), "does not have group 7"),
        (("--group", "0", "--version", "step_9"), "does not have group 0 of step_9"),
    ):
        said = run(*arguments, *more, status=1).stderr
        assert words in said
        assert said.count("\n") == 1
    assert "BZ_AUTH_TOKEN" in run(*arguments, "--group", "0", status=1, BZ_AUTH_TOKEN="x" * 32).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--group", "0"),
        ("--hotkey", HOTKEY),
        ("--group", "0", "--hotkey", "nobody"),
        ("--group", "-1", "--hotkey", HOTKEY),
        ("--group", "0", "--hotkey", HOTKEY, "--verify", "md5"),
        ("--group", "0", "--hotkey", HOTKEY, "--connections", "0"),
        ("--group", "0", "--hotkey", HOTKEY, "--bogus"),
        *(("--group", "0", "--hotkey", HOTKEY, "--max-speed", wrong) for wrong in ("fast", "0", "50m", "-1", "5e3")),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], node: Node, tmp_path: Path) -> None:
    for url, more in ((node.url, arguments), ("ftp://x", ("--group", "0", "--hotkey", HOTKEY))):
        result = CliRunner().invoke(command_line(["pull"]), ["pull", url, "--out", str(tmp_path / "out"), *more])
        assert result.exit_code == 2, (result.output, result.exception)
    assert node.seen == []


def test_ctrl_c_stops_at_once_and_the_next_call_goes_on(node: Node, payload: bytes, tmp_path: Path) -> None:
    node.rate = 1e6
    command = [sys.executable, "-m", "bzstream", "pull", node.url, "--group", "0", "--hotkey", HOTKEY,
               "--out", str(tmp_path / "out"), "--connections", "1"]  # fmt: skip
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        # A background job of a plain shell ignores SIGINT, and its children inherit that; a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while node.sent < 1_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert process.returncode == 130
    assert said == "bzstream: stopped; the same command goes on from here\n"
    node.rate = 0
    document = json.loads(run(*command[3:], "--json").stdout)
    assert document["units"][0]["reused"] > 900_000
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def pull_arguments(node: Node, tmp_path: Path) -> list[str]:
    return ["pull", node.url, "--group", "0", "--hotkey", HOTKEY, "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("redirections", "said"),
    [
        ("2>&-", ""), ("2>/dev/full", ""), (">&-", ""), ("<&- >&- 2>&-", ""),
        (">/dev/full", "done, but the result cannot be printed: No space left on device"),
    ],
)  # fmt: skip
def test_closed_and_full_streams_do_not_fail_a_complete_pull(
    redirections: str, said: str, node: Node, payload: bytes, tmp_path: Path
) -> None:
    command = shlex.join([sys.executable, "-m", "bzstream", *pull_arguments(node, tmp_path)])
    done = subprocess.run(["sh", "-c", f"{command} {redirections}"], env=ENVIRONMENT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr.decode()
    assert b"bug" not in done.stderr
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def test_other_commands_say_that_their_output_was_lost(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -m bzstream pull --help >/dev/full"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the output cannot be written" in done.stderr
    assert "bug" not in done.stderr


def test_an_encoding_without_the_character_gets_an_escape(node: Node, tmp_path: Path) -> None:
    said = run("pull", node.url, "--group", "0", "--hotkey", HOTKEY, "--out", tmp_path / "ö", PYTHONIOENCODING="ascii")
    assert "\\xf6/group-0.safetensors" in said.stdout


@pytest.mark.parametrize("key", ["~nosuch/key", "no-wallet/of-mine"])
def test_a_key_that_cannot_be_found_is_a_sentence(key: str, node: Node, tmp_path: Path) -> None:
    said = run("pull", node.url, "--group", "0", "--key", key, "--out", tmp_path / "out", status=1).stderr
    assert said.startswith("bzstream: there is no key file")
    assert said.count("\n") == 1


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(KeyUnavailable, match="where your home is"):
        load_key("wallet/hotkey")


def test_the_environment_names_the_validator_and_the_caller(node: Node, payload: bytes, tmp_path: Path) -> None:
    arguments = ("pull", "--group", "0", "--out", tmp_path / "out")
    run(*arguments, BZSTREAM_URL=node.url, BZSTREAM_HOTKEY=HOTKEY)
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload
    assert {seen.headers["x-hotkey"] for seen in node.seen} == {HOTKEY}
    key = tmp_path / "key"
    key.write_text("07" * 32)
    node.hotkey = HOTKEY
    node.seen.clear()
    run(*arguments, BZSTREAM_URL=node.url, BZSTREAM_KEY=str(key))
    assert node.seen[-1].headers["x-bittensor-receiver"] == HOTKEY
    node.seen.clear()
    run(*arguments, "--hotkey", HOTKEY, BZSTREAM_URL=node.url, BZSTREAM_KEY=str(key))
    assert {seen.headers["x-hotkey"] for seen in node.seen} == {HOTKEY}, "an option counts more than the environment"


def test_a_dry_run_and_a_quiet_one(node: Node, payload: bytes, tmp_path: Path) -> None:
    arguments = pull_arguments(node, tmp_path)
    assert "3.0 MB, of which 3.0 MB would be fetched" in run(*arguments, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    done = run(*arguments, "--quiet", "--max-speed", "50M")
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def test_a_terminal_gets_a_bar(node: Node, tmp_path: Path) -> None:
    node.rate = 2e6
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bzstream", "pull", node.url, "--group", "0", "--hotkey", HOTKEY,
         "--out", str(tmp_path), "--connections", "1"],
        env=ENVIRONMENT, stderr=terminal, stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(main, 65536):
            shown += piece
    except OSError:  # EIO: the other end is closed
        pass
    os.close(main)
    process.communicate(timeout=10)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for part in (r"group 0", r"/ 3\.0 MB", r"MB/s", r"left", r"\d+% verified", r"1 connections"):
        assert re.search(part, text), (part, text)


def test_submit_and_wait(node: Node, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("07" * 32)
    states = iter(["queued", "evaluating", "rejected"])

    def answer(seen: Seen) -> tuple[int, list[tuple[str, str]], bytes]:
        if seen.path == "/submit":
            return 202, [], b'{"status":"accepted","submission_id":"abc-1","evaluation_eta_blocks":5}'
        state = next(states)
        reason = "nan_weights" if state == "rejected" else None
        return 200, [], json.dumps({"submission_id": "abc-1", "status": state, "reason": reason}).encode()

    node.answer = answer
    arguments = (
        "submit",
        node.url,
        "--key",
        key,
        "--group",
        "0",
        "--checkpoint-url",
        "https://m.example/c",
        "--block",
        5,
    )
    said = run(*map(str, arguments)).stdout
    assert "accepted as abc-1 for block 5" in said
    done = run(*map(str, arguments), "--wait", status=1)
    assert "evaluating" in done.stdout
    assert "nan_weights" in done.stderr
    assert len({seen.body for seen in node.seen if seen.path == "/submit"}) == 1


def test_bench_prints_a_table_json_and_a_plot(node: Node, tmp_path: Path) -> None:
    arguments = ("bench", node.url, "--group", "0", "--connections", "1,2", "--seconds", "0.2")
    said = run(*arguments, "--plot", tmp_path / "plot.png").stdout
    assert "GB/s" in said
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [sweep["connections"] for sweep in json.loads(run(*arguments, "--json").stdout)["sweeps"]] == [1, 2]
    run("bench", node.url, "--connections", "1,x", status=2)


@pytest.mark.parametrize("command", ["pull", "submit", "bench"])
def test_help_says_what_matters(command: str) -> None:
    said = run(command, "--help").stdout
    assert "BZ_AUTH_TOKEN" in said
    if command == "pull":
        assert "--validator-hotkey" in said
        assert "protect" in said
