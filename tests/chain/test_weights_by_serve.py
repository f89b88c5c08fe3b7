"""`bzstream serve` sets weights on a chain, and says in /health and /metrics when the chain refuses them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bzstream.submissions.ledger import AsyncLedger
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID
from tests.chain.test_weights_on_chain import DUE, VALIDATOR, mine_until, subnet, weights_command, with_scores
from tests.nodes import free_port
from tests.submissions.values import HOTKEYS, ROUND, in_loop


@asynccontextmanager
async def serving(place: Path, node: FakeNode, **settings: str) -> AsyncIterator[Callable[[str], str]]:
    """A node on the chain with `chain.set_weights`; a function that gets a path of it, or of its metrics."""
    (place / "hotkey").write_text((b"v" * 32).hex())
    (place / "store").mkdir()
    port, metrics = free_port(), free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("BZ_")},
        "HOME": str(place),
        "BITTENSOR_RUNTIME_CACHE_DIR": str(place / "runtime"),
        "BTCLI_TOKEN_SYMBOLS_CACHE": str(place / "symbols.json"),
        "BZ_AUTH_TOKEN": "t" * 40,
        "BZ_LEDGER": str(place / "ledger"),
        "BZ_METRICS_PORT": str(metrics),
        "BZ_NODE_WALLET": str(place / "hotkey"),
        "BZ_CHAIN_ENDPOINT": json.dumps([node.url]),
        "BZ_CHAIN_NETUID": str(NETUID),
        "BZ_CHAIN_SET_WEIGHTS": "true",
        **settings,
    }
    command = ("-m", "bzstream", "serve", "--store", str(place / "store"), "--port", str(port), "--no-evaluator")
    process = await asyncio.create_subprocess_exec(sys.executable, *command, env=environment)

    def get(path: str) -> str:
        where = metrics if path == "/metrics" else port
        with urllib.request.urlopen(f"http://127.0.0.1:{where}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    try:
        yield get
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0


@in_loop
async def test_the_weights_on_the_chain_are_those_that_the_command_prints(tmp_path: Path) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0, HOTKEYS[1]: 1.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        async with serving(tmp_path, node, BZ_CHAIN_BURN=HOTKEYS[7], BZ_CHAIN_BURN_RATE="0.25"):
            await node.subscribed(60)
            ledger = await asyncio.to_thread(AsyncLedger.open, tmp_path / "ledger")
            await mine_until(node, ledger, DUE + 1)
            await asyncio.to_thread(ledger.close)
    shown = weights_command(tmp_path / "ledger")
    assert shown == pytest.approx({HOTKEYS[0]: 0.5625, HOTKEYS[1]: 0.1875, HOTKEYS[7]: 0.25})
    held = node.chain.weights_of(VALIDATOR.ss58_address)
    assert held == {hotkey: round(share / 0.5625 * 65535) for hotkey, share in shown.items()}
    assert len(node.chain.included) == 1


@in_loop
async def test_a_refusal_is_seen_in_health_and_metrics(tmp_path: Path) -> None:
    with_scores(tmp_path / "ledger", {HOTKEYS[0]: 3.0})
    async with FakeNode() as node:
        subnet(node, commit_reveal=False)
        node.neurons = [(VALIDATOR.ss58_address, False), *node.neurons[1:]]  # no permit
        async with serving(tmp_path, node) as get:
            await node.subscribed(60)
            ledger = await asyncio.to_thread(AsyncLedger.open, tmp_path / "ledger")
            await mine_until(node, ledger, DUE + 1, "refused")
            await asyncio.to_thread(ledger.close)
            async with asyncio.timeout(60):
                while "NeuronNoValidatorPermit" not in (health := await asyncio.to_thread(get, "/health")):
                    await asyncio.sleep(0.05)
            assert f"the weights of round {ROUND} are not set: NeuronNoValidatorPermit" in health
            metrics = await asyncio.to_thread(get, "/metrics")
            assert f'bzstream_weights_round{{outcome="refused"}} {float(ROUND)}' in metrics
