"""The axon from the settings to the chain: the chain role, the unmodified SDK, a node on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import structlog

from bzstream.chain.keys import Key
from bzstream.chain.role import run
from bzstream.chain.state import ChainState
from bzstream.config import ChainSettings
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID
from tests.submissions.values import in_loop

VALIDATOR = Key.from_seed(b"v" * 32)
PLACE = (NETUID, VALIDATOR.ss58_address)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path / "symbols.json"))


async def _drop(state: ChainState) -> None:
    """What the role sees of the chain is not looked at here."""


@asynccontextmanager
async def role(node: FakeNode, place: Path, certificate: Path | None = None, **changes: Any) -> AsyncIterator[None]:
    wallet = place / "hotkey"
    wallet.write_text((b"v" * 32).hex())
    given = {"announce": True, "external_host": "203.0.113.7", "external_port": 8443, **changes}
    settings = ChainSettings(endpoint=(node.url,), netuid=NETUID, **given)
    stop = asyncio.Event()
    pem = None if certificate is None else str(certificate)
    running = asyncio.create_task(run(settings, _drop, stop, wallet=str(wallet), certificate=pem))
    try:
        await node.subscribed()
        yield
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await running


async def mine_until(node: FakeNode, condition: Callable[[], bool]) -> None:
    """Mine block after block until a condition holds."""
    async with asyncio.timeout(60):
        while not condition():
            await node.mine(node.block + 1)
            await asyncio.sleep(0.02)


async def included(node: FakeNode) -> dict[str, Any]:
    """The arguments of the next extrinsic, once it is in a final block."""
    before = len(node.chain.included)
    await mine_until(node, lambda: len(node.chain.included) > before)
    _, extrinsic, _ = node.chain.included[-1]
    assert extrinsic.signer == VALIDATOR.ss58_address
    return {"call": extrinsic.call, **extrinsic.arguments}


async def look_twice(node: FakeNode) -> None:
    """Until the role has asked twice more what the chain lists, and has so done with what it found the first time."""
    key = "0x" + node.chain.key("Axons", PLACE).hex()
    before = node.keys_read.count(key)
    await mine_until(node, lambda: node.keys_read.count(key) >= before + 2)


def subnet(node: FakeNode) -> None:
    node.neurons = [(VALIDATOR.ss58_address, True)]
    node.chain.set("ServingRateLimit", NETUID, value=5)


@in_loop
async def test_the_axon_is_announced_once_and_again_when_it_was_lost_or_changed(tmp_path: Path) -> None:
    expected = {"netuid": NETUID, "ip": int(ip_address("203.0.113.7")), "port": 8443, "ip_type": 4}
    async with FakeNode(block=100) as node:
        subnet(node)
        async with role(node, tmp_path):
            arguments = await included(node)
            assert arguments["call"] == "serve_axon"
            assert {name: arguments[name] for name in expected} == expected
            await look_twice(node)
            assert len(node.chain.included) == 1
            node.chain.forget("Axons", *PLACE)
            assert (await included(node))["port"] == 8443
            await look_twice(node)
        async with role(node, tmp_path, external_host="2001:db8::7", external_port=9000):
            arguments = await included(node)
    assert (arguments["ip"], arguments["ip_type"]) == (int(ip_address("2001:db8::7")), 6)
    assert node.chain.get("Axons", *PLACE)["port"] == 9000
    assert [error for _, _, error in node.chain.included] == [None] * 3


def certificate(place: Path, name: str, *key: str) -> tuple[Path, str]:
    """A certificate in PEM, and the pin of its key as OpenSSL makes it."""
    pem, public = place / f"{name}.pem", place / "public"
    make = ["openssl", "req", "-x509", "-newkey", *key, "-nodes", "-subj", "/CN=node", "-out", str(pem)]
    subprocess.run([*make, "-keyout", str(place / f"{name}.key")], check=True, capture_output=True)
    told = subprocess.run(["openssl", "x509", "-in", str(pem), "-pubkey", "-noout"], check=True, capture_output=True)
    public.write_bytes(told.stdout)
    to_der = ["openssl", "pkey", "-pubin", "-in", str(public), "-outform", "DER"]
    return pem, hashlib.sha256(subprocess.run(to_der, check=True, capture_output=True).stdout).hexdigest()


@in_loop
async def test_the_pin_of_the_tls_key_goes_along(tmp_path: Path) -> None:
    """Of an EC and an RSA key, each the first certificate of its chain."""
    ec, ec_pin = certificate(tmp_path, "ec", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    rsa, rsa_pin = certificate(tmp_path, "rsa", "rsa:2048")
    rsa.write_text(rsa.read_text() + ec.read_text())
    async with FakeNode(block=100) as node:
        subnet(node)
        for pem, pin in ((ec, ec_pin), (rsa, rsa_pin)):
            async with role(node, tmp_path, pem):
                arguments = await included(node)
                assert arguments["call"] == "serve_axon_tls"
                assert arguments["certificate"] == "0x53" + pin
                await look_twice(node)
    assert [error for _, _, error in node.chain.included] == [None, None]


@in_loop
async def test_a_refusal_is_told_once_and_tried_again(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with FakeNode(block=100) as node, role(node, tmp_path):
            await included(node)
            await included(node)
            await look_twice(node)
    assert {error for _, _, error in node.chain.included} == {"HotKeyNotRegisteredInNetwork"}
    told = [entry for entry in logs if "HotKeyNotRegisteredInNetwork" in entry.get("reason", "")]
    assert [entry["log_level"] for entry in told] == ["error"]  # when the role ends, an attempt may be under way
