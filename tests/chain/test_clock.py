"""The phase clock against the plainest possible description of a cycle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.clock import PHASES, Cycle
from bzstream.config import ChainSettings

CYCLES = st.builds(Cycle, *[st.integers(1, 400)] * 4)
BLOCKS = st.integers(0, 10**9)


def test_the_contracts_examples() -> None:
    cycle = Cycle.of(ChainSettings())
    assert cycle.length == 420
    assert cycle.phase(0) == "distribute"
    assert cycle.phase(12345) == "train"
    assert cycle.phase(12530) == "submit"
    assert (cycle.start(12530), cycle.round(12530), cycle.seed_block(cycle.round(12530))) == (12180, 12520, 12600)


@given(CYCLES, BLOCKS)
def test_phases_follow_each_other_with_their_lengths(cycle: Cycle, block: int) -> None:
    start = cycle.start(block)
    laid_out = [phase for phase in PHASES for _ in range(getattr(cycle, phase))]
    assert start % cycle.length == 0
    assert start <= block < start + cycle.length
    assert cycle.phase(block) == laid_out[block - start]


@given(CYCLES, BLOCKS)
def test_a_round_is_its_submit_phase(cycle: Cycle, block: int) -> None:
    name, seed = cycle.round(block), cycle.seed_block(cycle.round(block))
    assert cycle.round(name) == name
    assert cycle.start(name) == cycle.start(block)
    assert all(cycle.phase(inside) == "submit" for inside in (name, seed - 1))
    assert cycle.phase(name - 1) == "commit"
    assert (cycle.phase(seed), cycle.start(seed)) == ("distribute", seed)
    assert cycle.blocks_to_seed(block) == seed - block >= 1


@given(CYCLES, BLOCKS, st.integers(-1000, 1000))
def test_a_block_of_the_cycle_is_neither_older_nor_in_the_future(cycle: Cycle, current: int, step: int) -> None:
    block = max(0, current + step)
    expected = block <= current and cycle.start(block) == cycle.start(current)
    assert cycle.contains(current, block) == expected
