"""The submission desk of a real node: bodies signed by fresh keys, sent, and the chain moved under it.

Block 12530 lies in the submit phase of the cycle that starts at 12180 and whose round is 12520 (api.md: distribute 20,
train 300, commit 20, submit 80).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from bzstream.chain.keys import Key
from bzstream.chain.signatures import Scheme
from tests.nodes import Answer, Node, eventually

_SEEDS = itertools.count(1)


def new_key(scheme: Scheme = "ed25519") -> Key:
    """A key that no other test has."""
    return Key.from_seed(b"desk" + next(_SEEDS).to_bytes(28, "big"), scheme)


def fields(key: Key, block: int, **changes: object) -> dict[str, object]:
    """What is signed, for a good submission but for `changes`."""
    return {
        "hotkey": key.ss58_address,
        "expert_group": 0,
        "checkpoint_url": "https://miner.example/checkpoint_500_12345.pt",
        "block_number": block,
        **changes,
    }


def signed(key: Key, block: int, **changes: object) -> dict[str, object]:
    """The body of POST /submit."""
    content = fields(key, block, **changes)
    return {**content, "signature": key.sign_fields(content)}


class Desk:
    """A node and the way to submit to it."""

    START: ClassVar = 12180
    ROUND: ClassVar = 12520
    NOW: ClassVar = 12530

    def __init__(self, node: Node) -> None:
        self.node = node

    def go_to(self, block: int, **chain: object) -> None:
        """Set the chain and wait until it is in force. `block` must differ from the one before."""
        self.node.write_chain(block, **chain)
        eventually(lambda: self.node.health()["current_block"] == block, f"block {block}")

    def send(self, raw: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        given = {"Authorization": f"Bearer {self.node.token}", "Content-Type": "application/json"}
        return self.node.request("POST", "/submit", given if headers is None else headers, raw)

    def submit(self, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Answer:
        return self.send(json.dumps(body).encode(), headers)

    def get(self, path: str) -> Answer:
        return self.node.get(path, {"Authorization": f"Bearer {self.node.token}"})

    def accepted(self, body: Mapping[str, object]) -> str:
        """Submit what must be accepted; its id."""
        answer = self.submit(body)
        assert answer.status == 202, answer.body
        submission_id: str = answer.json["submission_id"]
        return submission_id

    def status(self, submission_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/submissions/{submission_id}").json
        return found


def troubles(node: Node) -> list[str]:
    """Lines of the node's log that speak of a mistake of ours."""
    signs = ("Traceback", "] bug", "child died", "Task exception", "never awaited")
    return [line for line in node.log().splitlines() if any(sign in line for sign in signs)]
