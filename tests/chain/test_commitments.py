"""From `bzstream commit` to the chain, and from the chain into the ledger: the unmodified SDK, a node on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bzstream.chain.commitments import Commitment, RoundCommitments, commitment_text
from bzstream.chain.keys import Key
from bzstream.chain.role import run
from bzstream.cli import command_line
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError
from bzstream.submissions.ledger import AsyncLedger
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID, PoolError
from tests.submissions.values import ROUND, in_loop

FIRST, LAST = 12500, 12519
"""The commit phase before the round."""
MINER = Key.from_seed(b"m" * 32)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path / "symbols.json"))


def commit(
    place: Path, node: FakeNode, seed: bytes, content: bytes, *, warned: bool | None = None
) -> dict[str, object]:
    """Run the command; what it printed."""
    key, checkpoint = place / seed.hex()[:8], place / "checkpoint"
    key.write_text(seed.hex())
    checkpoint.write_bytes(content)
    arguments = ["--key", str(key), "--checkpoint", str(checkpoint), "--network", node.url, "--netuid", str(NETUID)]
    result = CliRunner().invoke(command_line(), ["commit", *arguments, "--json"])
    if isinstance(result.exception, BzstreamError):
        raise result.exception
    assert result.exit_code == 0, result.output
    if warned is not None:
        assert ("is not in the commit phase" in result.stderr) is warned
    printed: dict[str, object] = json.loads(result.stdout)
    return printed


async def committed(place: Path, node: FakeNode, block: int, seed: bytes, content: bytes) -> dict[str, object]:
    """The command's commitment, in this block."""
    running = asyncio.create_task(asyncio.to_thread(commit, place, node, seed, content))
    await node.until(lambda: bool(node.chain.pool))
    await node.mine(block)
    return await running


class SeenLedger:
    """A ledger that remembers the commitments it was given."""

    def __init__(self, ledger: AsyncLedger) -> None:
        self.written: list[RoundCommitments] = []
        self.arrived = asyncio.Event()
        self.round_weights, self.weights_before = ledger.round_weights, ledger.weights_before
        self.write_round_weights, self.scores = ledger.write_round_weights, ledger.scores
        self.round_bases, self.write_round_base = ledger.round_bases, ledger.write_round_base

    async def write_commitments(self, commitments: RoundCommitments) -> None:
        self.written.append(commitments)
        self.arrived.set()


@in_loop
async def test_what_stands_at_the_end_of_the_commit_phase_counts(tmp_path: Path) -> None:
    """Of two commitments the later; none of an earlier cycle, none that is changed afterwards, none of another form."""
    contents = [b"old", b"first", b"second", b"too late"]
    texts = [commitment_text(MINER.ss58_address, hashlib.sha256(content).hexdigest()) for content in contents]
    stale = Key.from_seed(b"s" * 32)
    async with FakeNode(block=FIRST - 420) as node:
        assert (await committed(tmp_path, node, FIRST - 410, b"s" * 32, b"old"))["block"] == FIRST - 410
        node.block = node.finalized = FIRST
        assert await committed(tmp_path, node, FIRST + 1, b"m" * 32, contents[1]) == {
            "hotkey": MINER.ss58_address,
            "commitment": texts[1],
            "block": FIRST + 1,
        }
        await committed(tmp_path, node, LAST, b"m" * 32, contents[2])
        await committed(tmp_path, node, LAST + 1, b"m" * 32, contents[3])
        ledger, stop = AsyncLedger.open(tmp_path / "ledger"), asyncio.Event()
        seen = SeenLedger(ledger)
        settings = ChainSettings(endpoint=(node.url,), netuid=NETUID)
        node.finalized = LAST - 1
        role = asyncio.create_task(run(settings, ledger.write_chain_state, stop, ledger=seen))
        await node.subscribed()
        assert not seen.written, "the last block of the phase is not final yet"
        await node.mine(LAST + 3, finalized=LAST)
        async with asyncio.timeout(20):
            await seen.arrived.wait()
        for block in range(LAST + 4, LAST + 8):
            await node.mine(block)
        stop.set()
        await role
        ledger.close()
    assert seen.written == [RoundCommitments(ROUND, {MINER.ss58_address: Commitment(texts[2], LAST)})]
    assert stale.ss58_address not in seen.written[0].by_hotkey


@pytest.mark.parametrize(("block", "phases", "warned"), [
    (FIRST, "", False), (LAST, "", False), (FIRST - 1, "", True), (LAST + 1, "", True),
    (LAST + 1, '[["distribute", 20, "distribute"], ["commit", 400, "commit"], ["submit", 5, "submit"]]', False),
    (LAST + 1, '[["distribute", 20, "distribute"], ["submit", 5, "submit"]]', True),
])  # fmt: skip
@in_loop
async def test_a_commitment_outside_the_commit_phase_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    block: int, phases: str, warned: bool,
) -> None:  # fmt: skip
    if phases:
        monkeypatch.setenv("BZ_CHAIN_PHASES", phases)
    async with FakeNode(block=FIRST - 10) as node:
        running = asyncio.create_task(asyncio.to_thread(commit, tmp_path, node, b"m" * 32, b"x", warned=warned))
        await node.until(lambda: bool(node.chain.pool))
        await node.mine(block)
        assert (await running)["block"] == block


@in_loop
async def test_what_goes_wrong_is_a_sentence(tmp_path: Path) -> None:
    async with FakeNode(block=FIRST) as node:
        node.pool_answers = [PoolError(1010, "Invalid Transaction", "Inability to pay some fees")]
        with pytest.raises(BzstreamError, match="does not take the commitment"):
            await asyncio.to_thread(commit, tmp_path, node, b"m" * 32, b"x")
    with pytest.raises(BzstreamError, match="does not take the commitment"):
        await asyncio.to_thread(commit, tmp_path, node, b"m" * 32, b"x")  # no node there
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "checkpoint").mkdir()
    arguments = ["--key", str(tmp_path / (b"m" * 4).hex()), "--checkpoint", str(tmp_path / "checkpoint")]
    result = CliRunner().invoke(command_line(), ["commit", *arguments, "--network", node.url, "--netuid", "1"])
    assert isinstance(result.exception, BzstreamError)
    assert "cannot be read" in str(result.exception)
