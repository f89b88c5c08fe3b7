"""Commitments: a miner says on the chain, in the commit phase, which file it will submit. Pure; any thread.

The text is `bz1:` and the hex SHA-256 of `<hotkey>:<hex SHA-256 of the file>`, so that nobody can copy it for another
hotkey, and the file stays unknown until it is submitted. What stands on the chain at the last block of the commit phase
counts for that cycle's round, if it was written in that cycle; its block is the submission's precedence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["COMMITMENT", "Commitment", "RoundCommitments", "commitment_text"]

COMMITMENT = re.compile(r"bz1:[0-9a-f]{64}", re.ASCII)
"""What a commitment of ours looks like; others stand on the chain too."""


class Commitment(NamedTuple):
    """A hotkey's commitment, and the block it was written in."""

    text: str
    block: int


class RoundCommitments(NamedTuple):
    """The commitments that count in one round, by hotkey."""

    round: int
    by_hotkey: Mapping[str, Commitment]


def commitment_text(hotkey: str, file_hash: str) -> str:
    """What the hotkey (SS58) commits for a file whose SHA-256 is `file_hash` (64 hex digits)."""
    return "bz1:" + hashlib.sha256(f"{hotkey}:{file_hash}".encode("ascii")).hexdigest()
