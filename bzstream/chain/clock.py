"""The cycle: which phase a block lies in, which round it belongs to. Pure arithmetic over block numbers.

    | distribute | train | commit | submit | distribute | ...
    ^ start(block)                ^ round(block)        ^ seed_block(round): its hash seeds the round's evaluation
A cycle is a list of phases. Each has a name of the subnet's own and is shown as one of the four of the HTTP contract
(`shown_as`): miners download in phases shown as "distribute" and submit in those shown as "submit". A *round* is named
by the first block of its cycle's submit phase. Its seed is the hash of the first block after that phase (finalized), so
that nobody can train for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bzstream.config import ChainSettings, ShownAs

__all__ = ["Cycle", "Phase"]


class Phase(NamedTuple):
    """One phase of the cycle."""

    name: str
    blocks: int
    shown_as: ShownAs


@dataclass(frozen=True)
class Cycle:
    """The phases of a cycle in their order, and a block at which a cycle begins. Default: the HTTP contract's."""

    phases: Sequence[Phase] = tuple(Phase(*phase) for phase in ChainSettings().cycle_phases)
    offset: int = 0

    @classmethod
    def of(cls, settings: ChainSettings) -> Cycle:
        """The cycle that the settings describe, already checked by `config.load`."""
        return cls(tuple(Phase(*phase) for phase in settings.cycle_phases), settings.cycle_offset)

    @cached_property
    def length(self) -> int:
        """Blocks of one cycle."""
        return sum(phase.blocks for phase in self.phases)

    @cached_property
    def _submit(self) -> range:
        """Positions in the cycle of the blocks in which submissions are taken."""
        return self._positions("submit")

    @cached_property
    def _distribute(self) -> range:
        return self._positions("distribute")

    @cached_property
    def _commit(self) -> range:
        return self._positions("commit")

    def _positions(self, shown_as: ShownAs) -> range:
        """The positions of the first phases in a row that are shown as `shown_as`; the cycle has one."""
        found, at = range(0), 0
        for phase in self.phases:
            if phase.shown_as == shown_as:
                found = range(found.start if found else at, at + phase.blocks)
            elif found:
                break
            at += phase.blocks
        return found

    def start(self, block: int) -> int:
        """First block of the cycle that `block` lies in."""
        return block - (block - self.offset) % self.length

    def detail(self, block: int) -> Phase:
        """The phase that `block` lies in."""
        position = (block - self.offset) % self.length
        for phase in self.phases:
            if position < phase.blocks:
                return phase
            position -= phase.blocks
        raise AssertionError("a position lies inside the cycle")

    def phase(self, block: int) -> ShownAs:
        """The phase that `block` lies in, as the HTTP contract shows it."""
        return self.detail(block).shown_as

    def last_distribute_block(self, block: int) -> int:
        """Last block of the distribute phase in the cycle that `block` lies in."""
        return self.start(block) + self._distribute.stop - 1

    def round(self, block: int) -> int:
        """First block of the submit phase in the cycle that `block` lies in: the name of the round."""
        return self.start(block) + self._submit.start

    def commit_phase(self, block: int) -> range:
        """Blocks of the commit phase before the submit phase, in the cycle that `block` lies in; may be empty."""
        start, commit = self.start(block), self._commit
        return range(start + commit.start, start + commit.stop) if commit.stop <= self._submit.start else range(0)

    def seed_block(self, round_: int) -> int:
        """First block after the submit phase of `round_`: its hash is the evaluation's seed."""
        return round_ + len(self._submit)

    def recent_seeds(self, block: int, rounds: int = 4) -> list[int]:
        """The seed blocks, not after `block`, of its round and of those before it; newest first."""
        newest = self.seed_block(self.round(block))
        seeds = (newest - back * self.length for back in range(rounds))
        return [seed for seed in seeds if 0 < seed <= block]

    def blocks_to_seed(self, block: int) -> int:
        """Blocks from `block` until the seed of its round exists; 0 if it does."""
        return max(0, self.seed_block(self.round(block)) - block)

    def due_round(self, block: int) -> int | None:
        """The newest round whose submit phase is over at `block`; None before the first one is."""
        round_ = self.round(block)
        if block < self.seed_block(round_):
            round_ -= self.length
        return round_ if round_ >= 0 else None

    def contains(self, current: int, block: int) -> bool:
        """Whether `block` lies in the cycle of `current` and is not after it."""
        return self.start(current) <= block <= current
