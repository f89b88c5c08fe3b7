"""From a validator's hotkey to its node: the address and the key's pin from a chain on loopback, TLS, and the token."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result
from websockets.sync.server import ServerConnection, serve

from bzstream.chain.keys import Key
from bzstream.cli import command_line
from bzstream.client import AxonNotFound, ClientError, UsageError, find_axon
from bzstream.client.address import parse_address
from bzstream.util.key_pin import key_pin
from tests.chain.node import FakeNode
from tests.chain.subtensor import NETUID
from tests.client.conftest import Puller
from tests.client.node import HOTKEY, TOKEN, Node, Unit

VALIDATOR = Key.from_seed(b"v" * 32).ss58_address


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`named`: holds 127.0.0.1. `other`: holds no address."""
    folder = tmp_path_factory.mktemp("certificates")
    for name, extension in (("named", "subjectAltName=IP:127.0.0.1"), ("other", "subjectAltName=DNS:node.example")):
        make = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        made = ["-subj", f"/CN={name}", "-addext", extension]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        subprocess.run([*make, *made, *files], check=True, capture_output=True)
    return folder


def pin(certificates: Path, name: str) -> bytes:
    return key_pin(ssl.PEM_cert_to_DER_cert((certificates / f"{name}.pem").read_text()))


def tls(certificates: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return context


class Chain:
    """A fake chain in a thread with a loop of its own, for blocking callers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.node = FakeNode()
        asyncio.run_coroutine_threadsafe(self.node.start(), self._loop).result(20)

    def announce(self, ip: str, port: int, pin: bytes | None = None, algorithm: int = 83) -> None:
        address = ip_address(ip)
        axon = {"block": 1, "version": 1, "ip": int(address), "port": port, "ip_type": address.version, "protocol": 4}
        axon |= {"placeholder1": 0, "placeholder2": 0}
        self.node.chain.set("Axons", NETUID, VALIDATOR, value=axon)
        if pin is not None:
            held = {"algorithm": algorithm, "public_key": "0x" + pin.hex()}
            self.node.chain.set("NeuronCertificates", NETUID, VALIDATOR, value=held)

    def find(self) -> str:
        return find_axon(self.node.url, NETUID, VALIDATOR)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.node.stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


@pytest.fixture
def chain() -> Iterator[Chain]:
    chain = Chain()
    try:
        yield chain
    finally:
        chain.close()


def pull(chain: Chain, out: Path, *more: str) -> Result:
    found = ["--network", chain.node.url, "--netuid", str(NETUID), "--validator-hotkey", VALIDATOR]
    arguments = ["pull", "--group", "0", "--hotkey", HOTKEY, "--out", str(out), "--patience", "2", *found, *more]
    return CliRunner().invoke(
        command_line(), arguments, env={"BZ_AUTH_TOKEN": TOKEN, "BZSTREAM_URL": "http://127.0.0.1:9"}
    )


def reached(node: Node) -> bool:
    """Whether a request came, and then with the token."""
    assert all(seen.headers["authorization"] == f"Bearer {TOKEN}" for seen in node.seen)
    return bool(node.seen)


@pytest.mark.parametrize(
    ("certificate", "announced", "trusted", "comes"),
    [
        ("other", "other", None, True),
        ("named", None, "named", True),
        ("other", "named", None, False),
        ("named", "other", "named", False),  # the pin counts, although the name would be verified
        ("other", None, "other", False),
        ("named", None, None, False),
        (None, None, None, False),  # plain HTTP
    ],
)
def test_the_token_goes_to_a_verified_name_or_a_pinned_key_alone(
    chain: Chain, certificates: Path, certificate: str | None, announced: str | None,
    trusted: str | None, comes: bool, pull_quickly: Puller,
) -> None:  # fmt: skip
    with Node({("partial", 0): Unit(b"x" * 9)}, tls=certificate and tls(certificates, certificate)) as node:  # type: ignore[arg-type]
        chain.announce("127.0.0.1", node.port, announced and pin(certificates, announced))  # type: ignore[arg-type]
        ca_file = str(certificates / f"{trusted}.pem") if trusted else None
        try:
            pull_quickly(url=chain.find(), ca_file=ca_file)
        except ClientError:
            assert not comes
        assert reached(node) is comes


def test_what_the_validator_signed_is_fetched(chain: Chain, certificates: Path, tmp_path: Path) -> None:
    key = Key.from_seed(b"v" * 32)
    payload = b"x" * 200_000
    with Node(
        {("partial", 0): Unit(payload)}, tls=tls(certificates, "other"), sign=lambda fields: _signed(key, fields)
    ) as node:
        chain.announce("127.0.0.1", node.port, pin(certificates, "other"))
        result = pull(chain, tmp_path / "out")
        assert result.exit_code == 0, result.exception
    assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == payload


def _signed(key: Key, fields: dict[str, object]) -> tuple[str, str]:
    return key.ss58_address, key.sign_fields({**fields, "validator_hotkey": key.ss58_address})


@pytest.mark.parametrize("more", [["http://127.0.0.1:8"], ["--mirror", "http://127.0.0.1:8"]])
def test_no_other_validator_gets_the_token(chain: Chain, tmp_path: Path, more: list[str]) -> None:
    assert pull(chain, tmp_path / "out", *more).exit_code == 2
    assert not chain.node.asked


def test_submit_finds_the_validator_too(chain: Chain, certificates: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("11" * 32)
    with Node({}, tls=tls(certificates, "other")) as node:
        chain.announce("127.0.0.1", node.port, pin(certificates, "other"))
        arguments = [
            "submit",
            "--key",
            str(key),
            "--group",
            "0",
            "--checkpoint-url",
            "https://a.example/c",
            "--block",
            "1",
        ]
        found = ["--network", chain.node.url, "--netuid", str(NETUID), "--validator-hotkey", VALIDATOR]
        CliRunner().invoke(command_line(), [*arguments, *found], env={"BZ_AUTH_TOKEN": TOKEN})
        assert reached(node)
        assert {seen.path for seen in node.seen} == {"/submit"}


def test_addresses_and_pins_are_read_as_the_chain_keeps_them(chain: Chain) -> None:
    with pytest.raises(AxonNotFound, match="lists no address"):
        chain.find()
    chain.announce("2001:db8::7", 8443)
    assert chain.find() == "https://[2001:db8::7]:8443"
    chain.announce("203.0.113.7", 443, b"\1" * 32, algorithm=4)
    assert chain.find() == "https://203.0.113.7:443"
    chain.announce("203.0.113.7", 443, bytes(range(32)))
    assert parse_address(chain.find()).pin == bytes(range(32))


@pytest.mark.parametrize("network", ["ws://node.example", "ws://10.0.0.1:9944", "https://node.example", "", "wss://[x"])
def test_the_chain_is_not_asked_in_clear(network: str) -> None:
    with pytest.raises(UsageError):
        find_axon(network, NETUID, VALIDATOR)


@pytest.mark.parametrize(
    "answer", ["", "nonsense", "[]", '{"id":1,"result":5}', '{"id":1,"error":{}}', "x" * 70_000, "close"]
)
def test_a_node_that_answers_nonsense_is_an_error(answer: str) -> None:
    def lie(connection: ServerConnection) -> None:
        for _ in connection:
            if answer == "close":
                break
            connection.send(answer)

    with serve(lie, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(ClientError):
            find_axon(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", NETUID, VALIDATOR)
        server.shutdown()
        thread.join(20)


def test_a_silent_node_is_given_up(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bzstream.client.axon.TIMEOUT_S", 0.3)
    chain.node.silent = True
    with pytest.raises(AxonNotFound, match="cannot be asked"):
        chain.find()
