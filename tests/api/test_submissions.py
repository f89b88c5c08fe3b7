"""POST /submit, GET /submissions/{id} and GET /scores against a real node, as the contract has them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bittensor_core
import nacl.signing
import pytest

from bzstream.chain.keys import Key, NotCanonical, canonical_json, encode_hotkey, encode_signature, load_key
from bzstream.chain.signatures import Scheme
from tests.api.desk import Desk, fields, new_key, signed, troubles
from tests.nodes import TOKEN, Answer, Node, answers, child_processes, eventually, running_node

BEARER = {"Authorization": f"Bearer {TOKEN}"}
NOW, START = Desk.NOW, Desk.START


def code(answer: Answer) -> tuple[int, str]:
    """Status and code of an error, whose form is checked."""
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json) - {"submission_id", "signed_text"} == {"detail", "code"}
    assert ("signed_text" in answer.json) == (answer.json["code"] == "invalid_signature")
    assert (answer.headers["Retry-After"] is not None) == (answer.status in (429, 503))
    return answer.status, answer.json["code"]


# --- accepted ---


def test_an_accepted_submission_and_its_status(desk: Desk) -> None:
    key = new_key()
    answer = desk.submit(signed(key, NOW))
    assert answer.status == 202
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json) == {"status", "submission_id", "evaluation_eta_blocks"}
    assert answer.json["status"] == "accepted"
    submission_id = answer.json["submission_id"]
    assert uuid.UUID(submission_id).version == 4
    assert str(uuid.UUID(submission_id)) == submission_id
    assert answer.json["evaluation_eta_blocks"] >= 12600 - NOW, "it waits for the round's seed"
    found = desk.get(f"/submissions/{submission_id}")
    assert (found.status, found.headers["Content-Type"]) == (200, "application/json")
    assert b"miner.example" not in found.body, "never the URL"
    document = found.json
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z", document.pop("received_at"))
    nothing = dict.fromkeys(("reason", "baseline_loss", "loss", "score", "finished_at"))
    assert document == {
        "submission_id": submission_id,
        "hotkey": key.ss58_address,
        "expert_group": 0,
        "block_number": NOW,
        "status": "queued",
        **nothing,
    }
    head = desk.node.request("HEAD", f"/submissions/{submission_id}", BEARER)
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", found.headers["Content-Length"])


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
@pytest.mark.parametrize("padded", [True, False])
def test_both_schemes_padded_or_not(desk: Desk, scheme: Scheme, padded: bool) -> None:
    body = signed(new_key(scheme), NOW)
    text = str(body["signature"])
    assert text.endswith("==")
    assert desk.submit({**body, "signature": text if padded else text.rstrip("=")}).status == 202


def test_what_others_sign_is_accepted(desk: Desk, tmp_path: Path) -> None:
    """PyNaCl, the Bittensor SDK's key pairs, a hotkey file that the SDK wrote, and a seed file through `load_key`."""
    seed = os.urandom(32)
    secret = nacl.signing.SigningKey(seed)
    content = {**fields(new_key(), NOW), "hotkey": encode_hotkey(secret.verify_key.encode())}
    literal = (
        f'{{"block_number":{NOW},"checkpoint_url":"{content["checkpoint_url"]}",'
        f'"expert_group":0,"hotkey":"{content["hotkey"]}"}}'
    )
    by_pynacl = encode_signature(secret.sign(literal.encode()).signature)
    assert desk.submit({**content, "signature": by_pynacl}).status == 202
    for kind in (bittensor_core.CRYPTO_ED25519, bittensor_core.CRYPTO_SR25519):
        pair = bittensor_core.Keypair.create_from_seed(os.urandom(32), kind)
        content["hotkey"] = pair.ss58_address
        by_sdk = encode_signature(bytes(pair.sign(canonical_json(content))))
        assert desk.submit({**content, "signature": by_sdk}).status == 202
    pair = bittensor_core.Keypair.create_from_seed(os.urandom(32), bittensor_core.CRYPTO_SR25519)
    (tmp_path / "hotkey").write_bytes(bytes(bittensor_core.serialized_keypair_to_keyfile_data(pair)))
    (tmp_path / "seed").write_text(os.urandom(32).hex())
    for name in ("hotkey", "seed"):
        assert desk.submit(signed(load_key(str(tmp_path / name)), NOW)).status == 202


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_what_a_wallet_wraps_before_it_signs_is_accepted(desk: Desk, scheme: Scheme) -> None:
    key = new_key(scheme)
    content = fields(key, NOW)
    wrapped = key.sign(b"<Bytes>" + canonical_json(content) + b"</Bytes>")
    accepted = desk.submit({**content, "signature": encode_signature(wrapped)})
    assert accepted.status == 202
    plain = desk.submit({**content, "signature": key.sign_fields(content)})
    assert (plain.status, plain.json["submission_id"]) == (409, accepted.json["submission_id"]), "it says the same"


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_whoever_signs_the_wrong_text_is_told_the_right_one(desk: Desk, scheme: Scheme) -> None:
    """Encodings that were seen: JSON with spaces, fields in the specification's order, other fields left in."""
    key = new_key(scheme)
    content = {**fields(key, NOW), "checkpoint_url": "https://miner.example/tür".replace("ü", "%C3%BC")}
    for text in (json.dumps(content), json.dumps(content, separators=(",", ":")), json.dumps({**content, "v": 1})):
        told = desk.submit({**content, "signature": encode_signature(key.sign(text.encode()))})
        assert code(told) == (400, "invalid_signature")
        assert told.json["signed_text"].encode() == canonical_json(content)
    spelled = desk.submit({**content, "signature": key.sign(canonical_json(content)).hex()})
    assert code(spelled) == (400, "invalid_signature"), "hex is no base64; it is told all the same"
    right = encode_signature(key.sign(told.json["signed_text"].encode()))
    assert desk.submit({**content, "signature": right}).status == 202


def test_bzstream_submit_is_accepted(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "seed").write_text(os.urandom(32).hex())
    options = ["--key", str(tmp_path / "seed"), "--group", "1", "--checkpoint-url", "https://miner.example/c.pt"]
    command = [sys.executable, "-m", "bzstream", "submit", desk.node.url, *options]
    environment = {**os.environ, "BZ_AUTH_TOKEN": TOKEN}
    for _ in range(2):  # the second time it is the 409 of the very same body: a success
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_the_spelling_of_the_body_does_not_matter(desk: Desk) -> None:
    body = signed(new_key(), NOW)
    document = {"unknown": [1.5, None, {"hotkey": 1}], "signature2": "", **dict(reversed(body.items()))}
    spelled = json.dumps(document, indent=3).replace("https", "\\u0068ttps").replace("miner", "\\u006diner")
    first = desk.send(spelled.encode(), {**BEARER, "Content-Type": "text/plain; charset=latin-1"})
    assert first.status == 202, "the media type is not looked at"
    again = desk.send(json.dumps(body).encode(), BEARER)
    assert again.json["submission_id"] == first.json["submission_id"], "it is the same signed body"


def test_a_chunked_body(desk: Desk) -> None:
    raw = json.dumps(signed(new_key(), NOW)).encode()
    pieces = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(raw[at : at + 7]), raw[at : at + 7]) for at in range(0, len(raw), 7))
    answer = desk.send(pieces + b"0\r\n\r\n", {**BEARER, "Transfer-Encoding": "chunked"})
    assert answer.status == 202


def test_a_checkpoint_hash_is_signed_with_the_rest(desk: Desk) -> None:
    value = "sha256:" + "ab" * 32
    assert desk.submit(signed(new_key(), NOW, checkpoint_hash=value)).status == 202
    key = new_key()
    assert code(desk.submit({**signed(key, NOW), "checkpoint_hash": value})) == (400, "invalid_signature")
    dropped = signed(key, NOW, checkpoint_hash=value)
    del dropped["checkpoint_hash"]
    assert code(desk.submit(dropped)) == (400, "invalid_signature")
    for wrong in (value.upper(), value[:-1], "md5:" + "ab" * 16, ""):
        assert code(desk.submit(signed(key, NOW, checkpoint_hash=wrong))) == (400, "invalid_checkpoint_hash")


# --- refused ---

# Code -> field -> values that it must not have.
WRONG: dict[str, dict[str, list[object]]] = {
    "invalid_field": {
        "expert_group": [1.0, 1e3, True, "0", None, [], -1, 10**9, 10**30, {}],
        "block_number": [12530.0, 1.253e4, False, "12530", None, -1, 2**53],
        **{name: [1, None] for name in ("hotkey", "checkpoint_url", "signature", "checkpoint_hash")},
    },
    "invalid_hotkey": {"hotkey": ["", "5", "x" * 48, "5" * 48]},
    "invalid_url": {
        "checkpoint_url": [
            *("miner.example/c.pt", "https://2130706433/c.pt"),
            *("https://miner.example/\u00e9", "https://miner.example/\ud800"),
        ]
    },
    "url_scheme_not_allowed": {"checkpoint_url": ["http://miner.example/c.pt", "file:///etc/passwd"]},
    "url_has_credentials": {"checkpoint_url": ["https://a:b@miner.example/c.pt"]},
    "url_has_fragment": {"checkpoint_url": ["https://miner.example/c.pt#x"]},
    "url_too_long": {"checkpoint_url": ["https://miner.example/" + "c" * 2048]},
    "url_host_not_public": {
        "checkpoint_url": [
            f"https://{host}/c.pt"
            for host in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:8.8.8.8]", "localhost", "box")
        ]
    },
    "invalid_signature": {"signature": ["", "A" * 86, "A" * 85 + "B", "+" * 86, "A" * 86 + "="]},
    "invalid_checkpoint_hash": {"checkpoint_hash": ["", "sha256:", "sha256:" + "AB" * 32]},
}
CASES = [(code, name, value) for code, names in WRONG.items() for name, values in names.items() for value in values]


@pytest.mark.parametrize(("expected", "name", "value"), CASES)
def test_a_field_that_is_wrong(desk: Desk, expected: str, name: str, value: object) -> None:
    """Each is wrong by itself: where the wrong value can be signed, it is."""
    key = new_key()
    body = {**signed(key, NOW), name: value}
    if name != "signature":
        with contextlib.suppress(NotCanonical):
            body["signature"] = key.sign_fields({name: value for name, value in body.items() if name != "signature"})
    assert code(desk.submit(body)) == (400, expected)


@pytest.mark.parametrize("name", ["hotkey", "expert_group", "checkpoint_url", "block_number", "signature"])
def test_a_field_that_is_missing(desk: Desk, name: str) -> None:
    body = signed(new_key(), NOW)
    del body[name]
    assert code(desk.submit(body)) == (400, "missing_field")


def test_bodies_that_are_no_json_object(desk: Desk) -> None:
    good = json.dumps(signed(new_key(), NOW))
    for raw in (
        b"",
        b"{}x",
        b"[]",
        b"null",
        b"\xff",
        b"\xef\xbb\xbf" + good.encode(),
        good[:-1].encode(),
        b"[" * 60000,
    ):
        assert code(desk.send(raw)) == (400, "invalid_json")
    for again in ('"expert_group":0', '"expert_\\u0067roup":0', '"x":1,"x":1', '"x":{"y":1,"y":2}'):
        assert code(desk.send(f"{good[:-1]},{again}}}".encode())) == (400, "duplicate_key")
    for number in ("1.0", "1e0", "1E+0", "-0", "00", "01", "+1", "0x1", "١", "1_0"):
        raw = good.replace('"expert_group": 0', f'"expert_group": {number}').encode()
        assert code(desk.send(raw))[0] == 400


def test_huge_bodies(desk: Desk) -> None:
    good = json.dumps(signed(new_key(), NOW)).encode()
    assert code(desk.send(good + b" " * (65537 - len(good)))) == (413, "body_too_large")
    chunk = b"10001\r\n" + b" " * 65537 + b"\r\n0\r\n\r\n"
    assert code(desk.send(chunk, {**BEARER, "Transfer-Encoding": "chunked"})) == (413, "body_too_large")
    assert code(desk.send(good, {"Content-Length": "99999999"})) == (401, "unauthorized"), "401 comes first"
    assert desk.send(good + b" " * (65536 - len(good))).status == 202


# Points of small order on edwards25519, and their spellings that are not canonical (y >= p).
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of edwards25519's base point."""


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_keys_that_would_sign_anything(desk: Desk, point: str) -> None:
    """R = the identity or the key itself, s = 0: a forgery under a small-order ed25519 or the all-zero sr25519 key."""
    body = {**fields(new_key(), NOW), "hotkey": encode_hotkey(bytes.fromhex(point))}
    for r, s in itertools.product(SMALL_ORDER, (bytes(32), bytes(31) + b"\x80")):
        signature = encode_signature(bytes.fromhex(r) + s)
        assert code(desk.submit({**body, "signature": signature})) == (400, "invalid_signature")


def test_forged_and_malleable_signatures(desk: Desk) -> None:
    for scheme, marker in (("ed25519", 0), ("sr25519", 0x80)):
        key, stranger = new_key(scheme), new_key(scheme)  # type: ignore[arg-type]
        content = fields(key, NOW)
        signature = key.sign(canonical_json(content))
        s = int.from_bytes(signature[32:63] + bytes([signature[63] & 0x7F]), "little")
        shifted = bytearray((s + ORDER).to_bytes(32, "little"))
        shifted[31] |= marker
        flipped = bytearray(signature)
        flipped[5] ^= 1
        forgeries = [
            signature[:32] + bytes(shifted),
            bytes(flipped),
            signature[::-1],
            bytes(64),
            stranger.sign(canonical_json(content)),
            key.sign(canonical_json({**content, "expert_group": 1})),
            key.sign(b"<Bytes>" + canonical_json({**content, "expert_group": 1}) + b"</Bytes>"),
            key.sign(b"<Bytes><Bytes>" + canonical_json(content) + b"</Bytes></Bytes>"),
            key.sign(json.dumps(content).encode()),
        ]
        for forged in forgeries:
            answer = desk.submit({**content, "signature": encode_signature(forged)})
            assert code(answer) == (400, "invalid_signature")
        plain = encode_signature(signature)
        for spelled in (plain + "=", plain[:-1], plain + "\n", " " + plain, plain.replace("=", "")[:-1] + "B"):
            assert code(desk.submit({**content, "signature": spelled})) == (400, "invalid_signature")
        assert desk.submit({**content, "signature": plain}).status == 202, "after all that it is still free"


# --- the order of checks ---


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a request; the earlier in the list of faults, the earlier it is found."""

    status: int
    code: str


FAULTS = {
    "token": Fault(401, "unauthorized"),
    "signature": Fault(400, "invalid_signature"),
    "chain": Fault(503, "chain_unknown"),
    "group": Fault(400, "unknown_expert_group"),
    "phase": Fault(423, "not_in_submit_phase"),
    "block": Fault(400, "block_number_out_of_cycle"),
    "stranger": Fault(403, "hotkey_not_registered"),
    "duplicate": Fault(409, "duplicate_submission"),
    "limit": Fault(429, "too_many_submissions"),
}
"""In the contract's order."""

IN_REQUEST = ("token", "signature", "group", "block", "stranger", "duplicate", "limit")


@pytest.fixture(scope="module")
def ordered(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Desk, dict[frozenset[str], Key]]]:
    """A node, and keys that are (not) strangers, have (not) submitted for block NOW, are (not) at their limit."""
    from tests.api.conftest import beside

    place = beside(node, tmp_path_factory.mktemp("ordered"))
    with running_node(place, "--ledger", str(place / "ledger.sqlite")) as running:
        desk = Desk(running)
        desk.go_to(NOW)
        kinds = [frozenset(kind) for n in range(4) for kind in itertools.combinations(IN_REQUEST[-3:], n)]
        keys = {kind: new_key() for kind in kinds}
        for kind, key in keys.items():
            blocks = ([NOW] if "duplicate" in kind else []) + list(range(START, START + 3))
            for block in blocks[: 3 if "limit" in kind else 1 if "duplicate" in kind else 0]:
                desk.accepted(signed(key, block))
        yield desk, keys


@pytest.mark.parametrize("state", ["", "phase", "chain"])
def test_each_earlier_failure_wins(ordered: tuple[Desk, dict[frozenset[str], Key]], state: str, place: Path) -> None:
    """Every set of faults of the request, in every state of the node: 384 requests."""
    desk, keys = ordered
    registered = [key.ss58_address for kind, key in keys.items() if "stranger" not in kind]
    if state != "chain":
        desk.go_to({"": NOW + 1, "phase": NOW - 20}[state], miners=registered)
        check_every_order(desk, keys, state)
        return
    # An HTTP worker alone on a new ledger never hears of the chain.
    with running_node(place, "--role", "http", "--ledger", str(place / "ledger.sqlite"), wait=False) as alone:
        eventually(lambda: answers(alone), "the node answers")
        check_every_order(Desk(alone), keys, state)


def check_every_order(desk: Desk, keys: dict[frozenset[str], Key], state: str) -> None:
    for size in range(len(IN_REQUEST) + 1):
        for chosen in itertools.combinations(IN_REQUEST, size):
            faults = {*chosen, state} - {""}
            key = keys[frozenset(chosen) & frozenset(IN_REQUEST[-3:])]
            block = START - 1 if "block" in faults else NOW if "duplicate" in faults else NOW - 1
            body = signed(key, block, expert_group=99 if "group" in faults else 0)
            if "signature" in faults:
                body["signature"] = signed(key, block, expert_group=1)["signature"]
            answer = desk.submit(body, {} if "token" in faults else BEARER)
            if not faults:
                assert answer.status == 202
                continue
            first = next(fault for name, fault in FAULTS.items() if name in faults)
            assert code(answer) == (first.status, first.code), faults


def test_a_node_without_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with running_node(tmp_path, wait=False) as node:
        eventually(lambda: answers(node) and node.health()["current_block"], "the chain is known")
        desk = Desk(node)
        desk.go_to(NOW)
        assert code(desk.submit(signed(new_key(), NOW, expert_group=99))) == (503, "model_not_loaded")
        assert code(desk.submit({})) == (400, "missing_field")
        assert code(desk.submit({}, {})) == (401, "unauthorized")


def test_a_chain_that_went_silent(place: Path) -> None:
    environment = {"BZ_CHAIN_STALE_S": "2.5"}
    with running_node(place, "--ledger", str(place / "ledger.sqlite"), environment=environment) as node:
        desk = Desk(node)
        desk.go_to(NOW)
        assert desk.submit(signed(new_key(), NOW)).status == 202
        (chain,) = child_processes(node.process.pid, "chain")
        os.kill(chain, signal.SIGSTOP)
        try:
            eventually(lambda: node.health()["status"] == "degraded", "the chain is stale")
            assert code(desk.submit(signed(new_key(), NOW))) == (503, "chain_stale")
            assert desk.get("/scores").status == 404
            assert node.get("/model/shared", node.headers()).status == 200, "downloads go on"
        finally:
            os.kill(chain, signal.SIGCONT)
        eventually(lambda: node.health()["status"] == "healthy", "the chain is back")
        assert desk.submit(signed(new_key(), NOW)).status == 202


# --- identity ---


def test_a_bound_token_submits_for_its_own_hotkey_alone(desk: Desk) -> None:
    bound = desk.node.as_validator()
    assert code(desk.submit(signed(new_key(), NOW), bound)) == (403, "hotkey_mismatch")
    own = signed(desk.node.validator, NOW)
    assert code(desk.submit(own, {**bound, "X-Hotkey": new_key().ss58_address})) == (403, "hotkey_mismatch")
    assert desk.submit(own, {**bound, "X-Hotkey": desk.node.validator.ss58_address}).status == 202


def test_a_claim_need_not_be_the_submissions_hotkey(desk: Desk) -> None:
    """The contract names the bound hotkey; X-Hotkey is a claim. It must be a hotkey all the same."""
    assert desk.submit(signed(new_key(), NOW), {**BEARER, "X-Hotkey": new_key().ss58_address}).status == 202
    wrong = desk.submit(signed(new_key(), NOW), {**BEARER, "X-Hotkey": "nobody"})
    assert code(wrong) == (400, "invalid_hotkey")


# --- duplicates, limits, superseding ---


def test_duplicates(desk: Desk) -> None:
    key = new_key()
    body = signed(key, NOW)
    submission_id = desk.accepted(body)
    same = desk.submit(body)
    assert code(same) == (409, "duplicate_submission")
    assert same.json["submission_id"] == submission_id
    for other in (signed(key, NOW, expert_group=1), signed(key, NOW, checkpoint_hash="sha256:" + "0" * 64)):
        answer = desk.submit(other)
        assert code(answer) == (409, "duplicate_submission")
        assert "submission_id" not in answer.json, "another body"


def test_the_limit_of_a_cycle_and_superseding(desk: Desk) -> None:
    key = new_key()
    bodies = [signed(key, NOW - n) for n in range(4)]
    first, second, third = (desk.accepted(body) for body in bodies[:3])
    answer = desk.submit(bodies[3])
    assert code(answer) == (429, "too_many_submissions")
    left = START + 420 - desk.node.health()["current_block"]
    assert int(answer.headers["Retry-After"]) == math.ceil(left * 12), "when the next cycle begins"
    for early in (first, second):
        found = desk.status(early)
        assert (found["status"], found["reason"], found["score"]) == ("rejected", "superseded", 0.0)
        assert found["finished_at"] is not None
    assert desk.status(third)["status"] == "queued"
    repeated = desk.submit(bodies[0])
    assert repeated.status == 409, "409 comes before 429"
    assert repeated.json["submission_id"] == first


def test_blocks_of_the_cycle(desk: Desk) -> None:
    current = desk.node.health()["current_block"]
    for block, status in ((START, 202), (current, 202), (START - 1, 400), (current + 1, 400), (0, 400)):
        assert desk.submit(signed(new_key(), block)).status == status, block


def test_registered_miners(place: Path) -> None:
    known, unknown = new_key(), new_key()
    with running_node(place, "--ledger", str(place / "ledger.sqlite")) as node:
        desk = Desk(node)
        desk.go_to(NOW, miners=[known.ss58_address])
        assert code(desk.submit(signed(unknown, NOW))) == (403, "hotkey_not_registered")
        assert desk.submit(signed(known, NOW)).status == 202
        desk.go_to(NOW + 1, miners=[])
        assert code(desk.submit(signed(new_key(), NOW))) == (403, "hotkey_not_registered")
        for phase_start, phase in ((12600, "distribute"), (12620, "train"), (12920, "commit")):
            desk.go_to(phase_start)
            answer = desk.submit(signed(unknown, phase_start))
            assert code(answer) == (423, "not_in_submit_phase")
            assert phase in answer.json["detail"]
        desk.go_to(12940)
        assert code(desk.submit(signed(unknown, NOW))) == (400, "block_number_out_of_cycle")
        assert desk.submit(signed(known, 12940)).status == 202, "a new cycle"


# --- /submissions and /scores ---


def test_submissions_that_do_not_exist(desk: Desk) -> None:
    for wrong in (
        str(uuid.uuid4()),
        "x",
        "%00",
        "%2e%2e",
        "x" * 5000,
        "%ff",
        "'; DROP TABLE submissions;--".replace(" ", "%20"),
    ):
        assert code(desk.get(f"/submissions/{wrong}")) == (404, "unknown_submission")
    assert code(desk.get("/submissions/")) == (404, "not_found")
    assert code(desk.get("/submissions")) == (404, "not_found")
    assert desk.node.request("POST", f"/submissions/{uuid.uuid4()}", BEARER).headers["Allow"] == "GET, HEAD"


def test_scores(place: Path) -> None:
    """A round without results is nobody's latest; what is superseded is not listed."""
    from bzstream.submissions.ledger import Ledger
    from bzstream.submissions.types import GroupPay

    where = str(place / "ledger.sqlite")
    with running_node(place, "--ledger", where) as node:
        desk = Desk(node)
        desk.go_to(NOW)
        assert code(desk.get("/scores")) == (404, "unknown_round")
        for wrong in ("", "x", "-1", "1.0", "01", "1" * 17, "%20", "1&round=1"):
            assert desk.get(f"/scores?round={wrong}").status == 400, wrong
        assert code(desk.get("/scores?round=12520")) == (404, "unknown_round")
        key, other = new_key(), new_key()
        desk.accepted(signed(key, NOW))
        ids = [desk.accepted(signed(key, NOW - 1, expert_group=2)), desk.accepted(signed(other, NOW))]
        assert [row["status"] for row in desk.get("/scores?round=12520").json["results"]] == ["queued", "queued"]
        ledger = Ledger.open(where)
        jobs = {job.record.submission_id: job for job in ledger.claim("judge", lease_s=60, limit=10)}
        job = ledger.advance(jobs[ids[0]], "verifying")
        job = ledger.advance(job, "evaluating", model_version="step_1000")
        ledger.advance(job, "scored", baseline_loss=2.5, loss=2.25, score=0.25)
        ledger.advance(jobs[ids[1]], "rejected", reason="not_a_checkpoint")
        assert [row["pay"] for row in desk.get("/scores").json["results"]] == [None, None]
        ledger.write_pay(GroupPay(12520, {ids[0]: ("scored", 0.125), ids[1]: ("rejected", 0.0)}))
        ledger.close()
        rows: list[dict[str, Any]] = [
            {"hotkey": key.ss58_address, "expert_group": 2, "submission_id": ids[0], "status": "scored", "reason": None}
            | {"score": 0.25, "pay": 0.125},
            {"hotkey": other.ss58_address, "expert_group": 0, "submission_id": ids[1], "status": "rejected"}
            | {"reason": "not_a_checkpoint", "score": 0.0, "pay": 0.0},
        ]
        wanted = {"round": 12520, "model_version": "step_1000", "results": rows}
        assert desk.get("/scores").json == wanted
        assert desk.get("/scores?round=12520").json == wanted
        assert code(desk.get("/scores?round=12940")) == (404, "unknown_round")
        found = desk.status(ids[0])
        assert (found["baseline_loss"], found["loss"], found["score"]) == (2.5, 2.25, 0.25)
        assert found["finished_at"] >= found["received_at"]
        assert troubles(node) == []
