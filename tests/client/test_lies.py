"""A server that lies never gets a file under its final name; an honest run through the same server does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from bzstream.client import ClientError, ProtocolViolation, TransientError, WrongHash
from tests.client.conftest import QUICK, Puller
from tests.client.node import TOKEN, Node, Unit

LIES = {
    "flip": WrongHash, "short": None, "empty": TransientError, "200": ProtocolViolation, "etag": ProtocolViolation,
    "reset": TransientError, "content-range": ProtocolViolation, "length": ProtocolViolation,
    "redirect": ProtocolViolation, "chunked": ProtocolViolation, "garbage": ProtocolViolation,
    "endless-head": ProtocolViolation, "endless-interim": ProtocolViolation, "stall": None,
}  # fmt: skip
"""Lie -> what the pull ends with if it is told for ever; None: the honest bytes before the lie add up to the file."""


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_told_for_ever_never_yields_a_file(
    lie: str, node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.lie = lie
    final = tmp_path / "out" / "group-0.safetensors"
    expected = LIES[lie]
    began = time.monotonic()
    hopeless = replace(QUICK, patience_s=1.5)
    if expected is None:
        try:
            pull_quickly(tuning=hopeless)
        except ClientError:
            assert not final.exists()
        else:
            assert final.read_bytes() == payload
    else:
        with pytest.raises(expected):
            pull_quickly(tuning=hopeless)
        assert not final.exists()
    assert time.monotonic() - began < 10
    node.lie = ""
    pull_quickly()
    assert final.read_bytes() == payload
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["group-0.safetensors"]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_told_once_costs_next_to_nothing(
    lie: str, node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.lie, node.lies_left = lie, 1
    pull_quickly()
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def test_only_the_wrong_chunk_is_fetched_again(node: Node, payload: bytes, pull_quickly: Puller) -> None:
    node.lie, node.lies_left = "flip", 1
    report = pull_quickly(connections=1)
    assert report.units[0].chunks_fetched_again == 1
    assert report.fetched == len(payload) + node.chunk_size


def test_a_damaged_copy_is_reported_within_seconds_and_names_the_chunk(node: Node, pull_quickly: Puller) -> None:
    node.lie = "flip"
    began = time.monotonic()
    with pytest.raises(WrongHash, match=r"chunk \d+ of group 0 with a wrong hash 3 times"):
        pull_quickly(connections=2)
    assert time.monotonic() - began < 10


def test_a_lying_mirror_is_dropped_and_the_others_finish(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    said: list[str] = []
    with Node({("partial", 0): Unit(payload)}, lie="flip") as liar:
        pull_quickly(url=[liar.url, node.url], notify=said.append, connections=4)
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload
    assert any(liar.url in line and "left out" in line for line in said)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"chunks": ["00" * 32] * 46}, WrongHash),
        ({"content_hash": "sha256:" + "00" * 32}, ProtocolViolation),
        ({"size": 10**6}, ClientError),
        ({"size": 2**60}, ClientError),
        ({"size": -1}, ClientError),
        ({"chunk_size": 0}, ClientError),
        ({"chunks": []}, ClientError),
        ({"unit": "full"}, ClientError),
        ({"expert_group": 1}, ClientError),
        ({"model_version": "../../x"}, ClientError),
        ({"chunk_hash": "md5"}, ClientError),
        ({"chunks": [7] * 46}, ClientError),
        ({"validator_hotkey": "nobody"}, ClientError),
        ({"signature": "A" * 86}, ClientError),
    ],
)
def test_a_wrong_manifest_never_yields_a_file(
    change: dict[str, object], error: type[Exception], node: Node, tmp_path: Path, pull_quickly: Puller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    honest = Node.manifest
    monkeypatch.setattr(Node, "manifest", lambda self, key: {**honest(self, key), **change})
    with pytest.raises(error):
        pull_quickly()
    assert not (tmp_path / "out" / "group-0.safetensors").exists()


def test_a_manifest_that_contradicts_its_chunks_fails_the_whole_hash(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right chunks, wrong content_hash, and a server whose entity tag agrees with the lie."""
    false = "11" * 32
    monkeypatch.setattr(Unit, "sha256", false)
    with pytest.raises(WrongHash, match="another SHA-256"):
        pull_quickly()
    assert not (tmp_path / "out" / "group-0.safetensors").exists()
    monkeypatch.undo()
    pull_quickly()
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def test_the_token_goes_to_nobody_else(node: Node, pull_quickly: Puller) -> None:
    """A redirect to another server is not followed, for the manifest neither."""
    with Node() as other:
        node.answer = lambda seen: (307, [("Location", other.url + seen.target)], b"")
        with pytest.raises(ProtocolViolation, match="redirect"):
            pull_quickly()
        assert other.connections == 0
    assert node.seen[0].headers["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("size", [1 << 20, 20 << 20])
def test_an_endless_document_is_cut_off(size: int, node: Node, pull_quickly: Puller) -> None:
    node.answer = lambda seen: (404, [], b"x" * size)
    with pytest.raises(ClientError):
        pull_quickly()
