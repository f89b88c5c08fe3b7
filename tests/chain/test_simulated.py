"""The chain file: what it may say, when it is in force, and what a broken one does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.clock import Cycle
from bzstream.chain.keys import Key
from bzstream.chain.simulated import InvalidChainFile, SimulatedChain, block_hash, parse_chain_file

ALICE, BOB = Key.from_seed(b"a" * 32).ss58_address, Key.from_seed(b"b" * 32).ss58_address


def test_the_contracts_example() -> None:
    said = parse_chain_file(
        f'{{"block": 12345, "block_seconds": 0, "validators": ["{ALICE}"], "miners": null}}'.encode()
    )
    assert (said.block, said.block_seconds, said.validators, said.miners) == (12345, 0.0, frozenset({ALICE}), None)
    assert parse_chain_file(b'{"block": 0}').miners is None
    assert parse_chain_file(f'{{"block": 7, "miners": ["{ALICE}", "{BOB}"]}}'.encode()).miners == frozenset(
        {ALICE, BOB}
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "12345",
        "{}",
        '{"block": -1}',
        '{"block": 1.0}',
        '{"block": true}',
        '{"block": "1"}',
        '{"block": null}',
        '{"block": 1, "block": 1}',
        '{"block": 1, "blocks": 1}',
        '{"block": 9007199254740992}',
        '{"block": 1' + "0" * 5000 + "}",
        '{"block": 1, "block_seconds": -1}',
        '{"block": 1, "block_seconds": NaN}',
        '{"block": 1, "block_seconds": Infinity}',
        '{"block": 1, "block_seconds": "12"}',
        '{"block": 1, "block_seconds": false}',
        '{"block": 1, "validators": null}',
        '{"block": 1, "validators": "5F"}',
        '{"block": 1, "validators": ["5F"]}',
        '{"block": 1, "validators": [5]}',
        f'{{"block": 1, "validators": ["{ALICE}", "{ALICE}"]}}',
        '{"block": 1, "miners": {}}',
        "[" * 100_000,
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidChainFile):
        parse_chain_file(text.encode())


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(raw: bytes) -> None:
    try:
        parse_chain_file(raw)
    except InvalidChainFile:
        pass


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chain.json"


@pytest.fixture
def chain(file: Path, warnings: list[str]) -> SimulatedChain:
    return SimulatedChain(file, Cycle(), warnings.append)


def test_a_frozen_block_stays_and_is_confirmed(file: Path, chain: SimulatedChain) -> None:
    file.write_text('{"block": 500}')
    for moment in (0.0, 1000.0):
        state = chain.observe(wall=moment, monotonic=moment)
        assert state is not None
        assert (state.block, state.observed_at, state.frozen) == (500, moment, True)
        assert state.age(moment + 3) == 3
        assert state.is_miner(ALICE)
        assert not state.is_validator(ALICE)


def test_a_running_block_counts_from_the_moment_of_reading(file: Path, chain: SimulatedChain) -> None:
    file.write_text('{"block": 500, "block_seconds": 12}')
    blocks = [chain.observe(0, moment) for moment in (100.0, 111.9, 112.0, 220.0)]
    assert [state.block for state in blocks if state] == [500, 500, 501, 510]
    file.write_text('{"block": 900, "block_seconds": 2}')
    blocks = [chain.observe(0, moment) for moment in (230.0, 233.0)]
    assert [state.block for state in blocks if state] == [900, 901]


def test_a_broken_file_keeps_the_last_good_one_and_warns_once(
    file: Path, chain: SimulatedChain, warnings: list[str]
) -> None:
    assert chain.observe(0, 0) is None
    assert len(warnings) == 1
    file.write_text(json.dumps({"block": 5, "validators": [ALICE]}))
    for content in (None, '{"block": ', '{"block": -3}'):
        if content is not None:
            file.write_text(content)
        for _ in range(3):
            state = chain.observe(0, 0)
            assert state is not None
            assert (state.block, state.is_validator(ALICE)) == (5, True)
    assert len(warnings) == 2
    file.unlink()
    assert chain.observe(0, 0) is not None
    assert len(warnings) == 2
    file.write_text(json.dumps({"block": 5, "validators": [ALICE]}))
    chain.observe(0, 0)
    file.write_bytes(b" " * (4 * 1024 * 1024 + 1))
    assert chain.observe(0, 0) is not None
    assert len(warnings) == 3


def test_the_seeds_of_recent_rounds_are_known(file: Path, chain: SimulatedChain) -> None:
    file.write_text('{"block": 12600}')
    state = chain.observe(0, 0)
    assert state is not None
    assert sorted(state.hashes) == [11760, 12180, 12600]
    assert state.hashes[12600] == block_hash(12600) == hashlib.sha256(b"bzstream-sim-12600").hexdigest()
