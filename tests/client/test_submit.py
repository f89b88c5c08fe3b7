"""`submit`: signed as the contract says, sent until an answer is sure, followed to its end."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nacl.signing
import pytest

from bzstream.chain.keys import Key
from bzstream.client import ProtocolViolation, Refused, TransientError, UsageError, follow, submit
from tests.client.conftest import QUICK
from tests.client.node import TOKEN, Node, Seen

SEED = b"\7" * 32
ID = "550e8400-e29b-41d4-a716-446655440000"
URL = "https://miner.example/checkpoint.pt"
Answer = tuple[int, list[tuple[str, str]], bytes]


def answer(status: int, document: dict[str, Any], *fields: tuple[str, str]) -> Answer:
    return status, list(fields), json.dumps(document).encode()


ACCEPTED = answer(202, {"status": "accepted", "submission_id": ID, "evaluation_eta_blocks": 5})


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as running:
        running.answer = lambda seen: ACCEPTED
        yield running


def send(node: Node, **changes: Any) -> Any:
    arguments = {
        "key": Key.from_seed(SEED), "group": 0, "checkpoint_url": URL, "block": 12530, "token": TOKEN, "tuning": QUICK,
    }  # fmt: skip
    return submit(node.url, **{**arguments, **changes})


def check(seen: Seen) -> dict[str, Any]:
    """Verify the request with PyNaCl alone and give its fields back."""
    body: dict[str, Any] = json.loads(seen.body)
    signature = base64.urlsafe_b64decode(body.pop("signature"))
    message = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    nacl.signing.SigningKey(SEED).verify_key.verify(message, signature)
    assert seen.method == "POST"
    assert seen.path == "/submit"
    assert seen.headers["authorization"] == f"Bearer {TOKEN}"
    assert seen.headers["content-type"] == "application/json"
    return body


def test_the_body_is_what_the_contract_says(node: Node) -> None:
    report = send(node)
    assert check(node.seen[0]) == {
        "block_number": 12530,
        "checkpoint_url": URL,
        "expert_group": 0,
        "hotkey": Key.from_seed(SEED).ss58_address,
    }
    assert (report.submission_id, report.evaluation_eta_blocks, report.already) == (ID, 5, False)


def test_the_checkpoint_is_hashed_and_the_block_asked_for(node: Node, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"weights")
    health = answer(200, {"status": "healthy", "model_loaded": True, "current_block": 12555, "phase": "submit"})
    node.answer = lambda seen: health if seen.path == "/health" else ACCEPTED
    report = send(node, block=None, checkpoint=checkpoint)
    body = check(node.seen[-1])
    assert body["block_number"] == report.block_number == 12555
    assert body["checkpoint_hash"] == report.checkpoint_hash == "sha256:" + hashlib.sha256(b"weights").hexdigest()


def test_a_lost_answer_is_asked_for_again_and_the_same_submission_counts(node: Node) -> None:
    """The node takes the submission, and its answer is lost: the very same body again, and the 409 names it."""
    duplicate = answer(409, {"detail": "dup", "code": "duplicate", "submission_id": ID})
    answers: list[Answer | None] = [None, duplicate]

    def lose(seen: Seen) -> Answer | None:
        found = answers.pop(0)
        if found is None:
            raise ValueError("close the connection without an answer")
        return found

    node.answer = lose
    report = send(node)
    assert report.already
    assert report.submission_id == ID
    assert node.seen[0].body == node.seen[1].body


def test_a_busy_node_is_asked_again(node: Node) -> None:
    answers = [answer(503, {"detail": "starting", "code": "not_loaded"}, ("Retry-After", "1")), ACCEPTED]
    node.answer = lambda seen: answers.pop(0)
    began = time.monotonic()
    assert send(node).submission_id == ID
    assert time.monotonic() - began >= 1


def test_no_sure_answer_is_no_success(node: Node) -> None:
    node.stop()
    with pytest.raises(TransientError):
        send(node, patience_s=0.5)


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "bad_signature"), (401, "unauthorized"), (403, "not_registered"), (409, "duplicate"), (423, "phase"),
     (429, "too_many")],
)  # fmt: skip
def test_a_refusal_is_final_and_in_words(status: int, code: str, node: Node) -> None:
    node.answer = lambda seen: answer(status, {"detail": "the reason", "code": code}, ("Retry-After", "1"))
    with pytest.raises(Refused, match="the reason") as caught:
        send(node)
    assert caught.value.status == status
    assert len(node.seen) == 1


@pytest.mark.parametrize("document", [{}, {"submission_id": 7}, {"submission_id": "../../x"}, {"submission_id": ""}])
def test_a_malformed_answer_is_said(document: dict[str, Any], node: Node) -> None:
    node.answer = lambda seen: answer(202, document)
    with pytest.raises(ProtocolViolation):
        send(node)


def test_wrong_arguments(node: Node) -> None:
    with pytest.raises(UsageError):
        send(node, group=-1)
    with pytest.raises(UsageError):
        next(follow(node.url, "../x"))


def test_follow_gives_each_state_once_and_ends(node: Node) -> None:
    states = ["queued", "queued", "fetching", "evaluating", "evaluating", "scored"]

    def status(seen: Seen) -> Answer:
        assert seen.path == f"/submissions/{ID}"
        state = states.pop(0)
        score = 0.5 if state == "scored" else None
        return answer(200, {"submission_id": ID, "status": state, "score": score, "hotkey": "x", "new": 1})

    node.answer = status
    found = list(follow(node.url, ID, token=TOKEN, every_s=0.01, tuning=QUICK))
    assert [state.status for state in found] == ["queued", "fetching", "evaluating", "scored"]
    assert found[-1].score == 0.5


@pytest.mark.parametrize("document", [{"submission_id": ID}, {"submission_id": ID, "status": "\x1b[31m"}])
def test_follow_refuses_what_is_no_state(document: dict[str, Any], node: Node) -> None:
    node.answer = lambda seen: answer(200, document)
    with pytest.raises(ProtocolViolation):
        list(follow(node.url, ID, token=TOKEN, tuning=QUICK))
