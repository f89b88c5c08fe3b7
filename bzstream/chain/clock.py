"""The cycle: which phase a block lies in, which round it belongs to. Pure arithmetic, counted from block 0.

    | distribute | train | commit | submit | distribute | ...
    ^ start(block)                ^ round(block)        ^ seed_block(round): its hash seeds the round's evaluation
A *round* is named by the first block of its submit phase. Its seed is the hash of the first block after that phase
(finalized), so that nobody can train for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bzstream.config import ChainSettings

__all__ = ["PHASES", "Cycle", "Phase"]

Phase = Literal["distribute", "train", "commit", "submit"]
PHASES: tuple[Phase, ...] = ("distribute", "train", "commit", "submit")


@dataclass(frozen=True, slots=True)
class Cycle:
    """Lengths of the four phases in blocks, each at least 1. Blocks are integers from 0."""

    distribute: int = 20
    train: int = 300
    commit: int = 20
    submit: int = 80

    @classmethod
    def of(cls, settings: ChainSettings) -> Cycle:
        """The cycle that the settings describe."""
        return cls(settings.distribute_blocks, settings.train_blocks, settings.commit_blocks, settings.submit_blocks)

    @property
    def length(self) -> int:
        """Blocks of one cycle."""
        return self.distribute + self.train + self.commit + self.submit

    def start(self, block: int) -> int:
        """First block of the cycle that `block` lies in."""
        return block - block % self.length

    def last_distribute_block(self, block: int) -> int:
        """Last block of the distribute phase in the cycle that `block` lies in."""
        return self.start(block) + self.distribute - 1

    def phase(self, block: int) -> Phase:
        """The phase that `block` lies in."""
        position = block % self.length
        for phase, blocks in zip(PHASES, (self.distribute, self.train, self.commit, self.submit), strict=True):
            if position < blocks:
                return phase
            position -= blocks
        raise AssertionError("a position lies inside the cycle")

    def round(self, block: int) -> int:
        """First block of the submit phase in the cycle that `block` lies in: the name of the round."""
        return self.start(block) + self.length - self.submit

    def seed_block(self, round_: int) -> int:
        """First block after the submit phase of `round_`: its hash is the evaluation's seed."""
        return round_ + self.submit

    def recent_seeds(self, block: int, rounds: int = 4) -> list[int]:
        """The seed blocks, not after `block`, of its round and of those before it; newest first."""
        newest = self.seed_block(self.round(block))
        seeds = (newest - back * self.length for back in range(rounds))
        return [seed for seed in seeds if 0 < seed <= block]

    def blocks_to_seed(self, block: int) -> int:
        """Blocks from `block` until the seed of its round exists; at least 1."""
        return self.seed_block(self.round(block)) - block

    def contains(self, current: int, block: int) -> bool:
        """Whether `block` lies in the cycle of `current` and is not after it."""
        return self.start(current) <= block <= current
