"""Submissions for tests, without the trouble of signing them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from bzstream.chain.keys import Key, canonical_json
from bzstream.submissions.types import AdmissionResult, Admitted, Candidate, Submission

ROUND = 12520
HOTKEYS = [Key.from_seed(bytes([number]) * 32).ss58_address for number in range(16)]


def candidate(
    hotkey: str = HOTKEYS[0],
    block: int = 12530,
    *,
    round_: int = ROUND,
    limit: int = 3,
    url: str = "https://miner.example/1",
    checkpoint_hash: str | None = None,
) -> Candidate:
    """A candidate as intake makes it."""
    fields: dict[str, object] = {"hotkey": hotkey, "block_number": block, "checkpoint_url": url, "expert_group": 0}
    if checkpoint_hash is not None:
        fields["checkpoint_hash"] = checkpoint_hash
    signed = canonical_json(fields)
    return Candidate(Submission(hotkey, 0, url, block, checkpoint_hash, "c2ln", signed), round_, limit)


def accepted(outcome: AdmissionResult) -> str:
    """The id of what must have been accepted."""
    assert isinstance(outcome, Admitted), outcome
    return outcome.submission_id


_P = ParamSpec("_P")


def in_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Run an asynchronous test in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: _P.args, **named: _P.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    return run
