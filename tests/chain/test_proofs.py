"""Signed requests: the SDK's proofs are accepted once, for one node, one target and one moment."""

from __future__ import annotations

from types import SimpleNamespace

import bittensor_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.keys import Key, Scheme
from bzstream.chain.proofs import InvalidProof, NonceCache, Proof, carries_proof, sign_request, verify_request

NODE = Key.from_seed(b"n" * 32, "sr25519").ss58_address
NOW = 1_700_000_000.0
NONCE = int(NOW * 1e9)
TARGET = "/model/partial?format=safetensors"


def check(headers: dict[str, str], **changes: object) -> str:
    """The hotkey of a proof that is good, and is used up now."""
    arguments = {"method": "GET", "target": TARGET, "receiver": NODE, "nonces": NonceCache(), "now": NOW} | changes
    proof = verify_request(headers.get, **arguments)  # type: ignore[arg-type]
    assert arguments["nonces"].use(proof)  # type: ignore[attr-defined]
    return proof.hotkey


def sdk_headers(scheme: Scheme, **changes: object) -> dict[str, str]:
    from bittensor import http_auth

    kind = bittensor_core.CRYPTO_ED25519 if scheme == "ed25519" else bittensor_core.CRYPTO_SR25519
    hotkey = bittensor_core.Keypair.create_from_seed(b"m" * 32, kind)
    wallet = SimpleNamespace(hotkey=hotkey, coldkey=None, coldkeypub=None)
    arguments = {"method": "GET", "path": TARGET, "receiver_ss58": NODE, "nonce_ns": NONCE} | changes
    return dict(http_auth.sign(wallet, **arguments))


@pytest.mark.parametrize("scheme", ["sr25519", "ed25519"])
def test_a_request_signed_by_the_sdk_is_accepted(scheme: Scheme) -> None:
    assert check(sdk_headers(scheme)) == Key.from_seed(b"m" * 32, scheme).ss58_address


@pytest.mark.parametrize("scheme", ["sr25519", "ed25519"])
def test_the_sdk_accepts_ours(scheme: Scheme) -> None:
    from bittensor import http_auth

    key = Key.from_seed(b"m" * 32, scheme)
    headers = sign_request(key, "get", TARGET, NODE, nonce=NONCE)
    caller = http_auth.verify(headers, b"", method="GET", path=TARGET, self_hotkey_ss58=NODE, now_ns=NONCE)
    assert caller.hotkey_ss58 == key.ss58_address
    assert check(headers) == key.ss58_address


def test_ed25519_headers_are_the_sdks_own() -> None:
    key = Key.from_seed(b"m" * 32, "ed25519")
    assert sign_request(key, "GET", TARGET, NODE, nonce=NONCE) == sdk_headers("ed25519")


def test_a_replay_is_refused() -> None:
    nonces, headers = NonceCache(), sdk_headers("sr25519")
    check(headers, nonces=nonces)
    with pytest.raises(InvalidProof, match="used before"):
        check(headers, nonces=nonces)
    check(sdk_headers("sr25519", nonce_ns=NONCE + 1), nonces=nonces)


def test_a_proof_is_used_up_by_use_alone() -> None:
    nonces, headers = NonceCache(), sdk_headers("sr25519")
    proofs = [verify_request(headers.get, "GET", TARGET, NODE, nonces, now=NOW) for _ in range(2)]
    assert [nonces.use(proof) for proof in proofs] == [True, False]


def test_a_failed_proof_uses_no_nonce_up() -> None:
    nonces, headers = NonceCache(), sdk_headers("sr25519")
    with pytest.raises(InvalidProof):
        check(headers, nonces=nonces, target="/model/full")
    assert check(headers, nonces=nonces)


@pytest.mark.parametrize(
    "change",
    [
        {"target": "/model/full"},
        {"target": "/model/partial"},
        {"method": "HEAD"},
        {"method": "DELETE"},
        {"receiver": Key.from_seed(b"o" * 32).ss58_address},
        {"body": b"{}"},
        {"now": NOW + 10.1},
        {"now": NOW - 2.1},
        {"schemes": ("ed25519",)},
    ],
)
def test_another_request_node_or_moment_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidProof):
        check(sdk_headers("sr25519"), **change)


@pytest.mark.parametrize("moment", [NOW - 1.9, NOW + 9.9])
def test_the_window_is_the_sdks(moment: float) -> None:
    assert check(sdk_headers("sr25519"), now=moment)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Bittensor-Version", None),
        ("X-Bittensor-Version", "2"),
        ("X-Bittensor-Hotkey", None),
        ("X-Bittensor-Hotkey", "5F"),
        ("X-Bittensor-Hotkey", NODE),
        ("X-Bittensor-Receiver", None),
        ("X-Bittensor-Receiver", "-"),
        ("X-Bittensor-Nonce", None),
        ("X-Bittensor-Nonce", ""),
        ("X-Bittensor-Nonce", f"+{NONCE}"),
        ("X-Bittensor-Nonce", f" {NONCE}"),
        ("X-Bittensor-Nonce", f"0{NONCE}"),
        ("X-Bittensor-Nonce", "1_700_000_000_000_000_000"),
        ("X-Bittensor-Nonce", "٣" * 19),
        ("X-Bittensor-Nonce", "9" * 5000),
        ("X-Bittensor-Crypto", "ed25519"),
        ("X-Bittensor-Crypto", "ecdsa"),
        ("X-Bittensor-Signature", None),
        ("X-Bittensor-Signature", "0x"),
        ("X-Bittensor-Signature", "00" * 64),
        ("X-Bittensor-Signature", "zz" * 64),
    ],
)
def test_a_wrong_header_is_refused(name: str, value: str | None) -> None:
    headers = sdk_headers("sr25519")
    headers.pop(name, None)
    if value is not None:
        headers[name] = value
    assert carries_proof(headers.get)
    with pytest.raises(InvalidProof):
        check(headers)


def test_a_request_without_the_headers_carries_no_proof() -> None:
    assert not carries_proof({"Authorization": "Bearer x", "X-Hotkey": NODE}.get)


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abc")), max_size=60), st.integers(1, 8))
def test_no_capacity_lets_a_replay_through(uses: list[tuple[int, str]], capacity: int) -> None:
    nonces, accepted = NonceCache(capacity), set()
    for nonce, hotkey in uses:
        fresh = nonces.use(Proof(hotkey, nonce, oldest=0))
        assert not (fresh and (nonce, hotkey) in accepted)
        if fresh:
            accepted.add((nonce, hotkey))
        assert len(nonces) <= capacity


def test_what_is_stale_is_forgotten_and_stays_refused() -> None:
    nonces = NonceCache()
    assert nonces.use(Proof("a", 5, oldest=0))
    assert nonces.use(Proof("a", 50, oldest=20))
    assert len(nonces) == 1
    assert not nonces.use(Proof("a", 5, oldest=0))  # the clock was set back
