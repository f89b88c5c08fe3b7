"""The phase clock against the plainest possible description of a cycle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.clock import Cycle, Phase
from bzstream.config import ChainSettings, ConfigError, ShownAs, load

NINE: list[tuple[str, int, ShownAs]] = [
    ("distribute", 20, "distribute"), ("train", 300, "train"), ("commit_1", 10, "commit"), ("commit_2", 10, "commit"),
    ("submit", 80, "submit"), ("validate", 10, "train"), ("merge", 50, "train"), ("commit_3", 10, "commit"),
    ("commit_4", 10, "commit"),
]  # fmt: skip
"""The cycle of 500 blocks that docs/operator.md shows."""


def cycle_of(lengths: list[int], offset: int) -> Cycle:
    """Four or nine phases of these lengths."""
    names = NINE if len(lengths) == 9 else ChainSettings().cycle_phases
    phases = tuple((name, blocks, as_) for (name, _, as_), blocks in zip(names, lengths, strict=True))
    return Cycle.of(ChainSettings(phases=phases, cycle_offset=offset))


LENGTHS = st.lists(st.integers(1, 400), min_size=4, max_size=4) | st.lists(st.integers(1, 400), min_size=9, max_size=9)
CYCLES = st.builds(cycle_of, LENGTHS, st.integers(0, 5000))
BLOCKS = st.integers(0, 10**9)


def test_the_contracts_examples() -> None:
    cycle = Cycle.of(ChainSettings())
    assert cycle == Cycle()
    assert cycle.length == 420
    assert cycle.phase(0) == "distribute"
    assert cycle.phase(12345) == "train"
    assert cycle.phase(12530) == "submit"
    assert (cycle.start(12530), cycle.round(12530), cycle.seed_block(cycle.round(12530))) == (12180, 12520, 12600)


def test_nine_phases() -> None:
    cycle = Cycle.of(load(flags={"chain.phases": NINE, "chain.cycle_offset": 7}).chain)
    assert cycle.length == 500
    shown = [
        (cycle.detail(block).name, cycle.phase(block)) for block in (7, 27, 326, 327, 337, 347, 426, 427, 437, 506)
    ]
    assert shown == [
        ("distribute", "distribute"), ("train", "train"), ("train", "train"), ("commit_1", "commit"),
        ("commit_2", "commit"), ("submit", "submit"), ("submit", "submit"), ("validate", "train"), ("merge", "train"),
        ("commit_4", "commit"),
    ]  # fmt: skip
    assert (cycle.start(506), cycle.start(507), cycle.last_distribute_block(400)) == (7, 507, 26)
    assert (cycle.round(400), cycle.seed_block(347)) == (347, 427)
    assert cycle.commit_phase(400) == range(327, 347)
    assert Cycle().commit_phase(12530) == range(12500, 12520)
    bare = Cycle((Phase("d", 5, "distribute"), Phase("s", 5, "submit"), Phase("c", 5, "commit")))
    assert len(bare.commit_phase(7)) == 0
    assert [cycle.due_round(block) for block in (426, 427, 926, 927)] == [None, 347, 347, 847]
    assert (cycle.blocks_to_seed(420), cycle.blocks_to_seed(430)) == (7, 0)


@given(CYCLES, BLOCKS)
def test_phases_follow_each_other_with_their_lengths(cycle: Cycle, block: int) -> None:
    start = cycle.start(block)
    laid_out = [phase for phase in cycle.phases for _ in range(phase.blocks)]
    assert (start - cycle.offset) % cycle.length == 0
    assert start <= block < start + cycle.length
    assert cycle.detail(block) == laid_out[block - start]
    assert cycle.phase(block) == laid_out[block - start].shown_as
    last = cycle.last_distribute_block(block) - start
    assert {phase.shown_as for phase in laid_out[: last + 1]} == {"distribute"}
    assert laid_out[last + 1].shown_as != "distribute"


@given(CYCLES, BLOCKS)
def test_a_round_is_its_submit_phase(cycle: Cycle, block: int) -> None:
    name, seed = cycle.round(block), cycle.seed_block(cycle.round(block))
    assert cycle.round(name) == name
    assert cycle.start(name) == cycle.start(block)
    assert all(cycle.phase(inside) == "submit" for inside in (name, seed - 1))
    assert all(cycle.phase(outside) != "submit" for outside in (name - 1, seed))
    assert cycle.blocks_to_seed(block) == max(0, seed - block)
    due = cycle.due_round(block)
    if due is not None:
        assert cycle.seed_block(due) <= block < cycle.seed_block(due + cycle.length)


@given(CYCLES, BLOCKS, st.integers(-1000, 1000))
def test_a_block_of_the_cycle_is_neither_older_nor_in_the_future(cycle: Cycle, current: int, step: int) -> None:
    block = max(0, current + step)
    expected = block <= current and cycle.start(block) == cycle.start(current)
    assert cycle.contains(current, block) == expected


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ([["train", 300, "train"], ["submit", 80, "submit"]], "begin with a phase shown as"),
        ([["distribute", 20, "distribute"], ["train", 300, "train"]], "at least one"),
        ([["d", 1, "distribute"], ["a", 1, "submit"], ["t", 1, "train"], ["b", 1, "submit"]], "side by side"),
        ([["d", 1, "distribute"], ["d", 1, "submit"]], "a name twice"),
        ([["d", 0, "distribute"], ["s", 1, "submit"]], "chain.phases"),
        ([["d", 1, "download"], ["s", 1, "submit"]], "chain.phases"),
        ([["D ", 1, "distribute"], ["s", 1, "submit"]], "chain.phases"),
    ],
)
def test_a_cycle_without_rounds_is_refused(phases: list[list[object]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(flags={"chain.phases": phases})
