"""Intake: every way in which a submission can be wrong, and the order in which it is told so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import bittensor_core
import nacl.signing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.clock import Cycle
from bzstream.chain.keys import Key, canonical_json, encode_signature
from bzstream.chain.state import ChainState
from bzstream.config import SubmitSettings
from bzstream.submissions.intake import ChainContext, SubmissionRefused, decide, read_body, refusal_of
from bzstream.submissions.types import Duplicate, LimitReached

SEED = b"s" * 32
KEY = Key.from_seed(SEED)
RULES = SubmitSettings()
FIELDS: dict[str, object] = {
    "hotkey": KEY.ss58_address,
    "expert_group": 0,
    "checkpoint_url": "https://miner.example/checkpoint_500_12345.pt",
    "block_number": 12530,
}


def signed(fields: Mapping[str, object] = FIELDS, key: Key = KEY) -> dict[str, Any]:
    return {**fields, "signature": key.sign_fields(fields)}


def body(**changes: object) -> bytes:
    return json.dumps(signed({**FIELDS, **changes})).encode()


def refused(raw: bytes, rules: SubmitSettings = RULES) -> SubmissionRefused:
    with pytest.raises(SubmissionRefused) as caught:
        read_body(raw, rules)
    assert caught.value.status == 400
    return caught.value


# --- the body ---


def test_a_good_body_is_read() -> None:
    submission = read_body(body(), RULES)
    assert (submission.hotkey, submission.expert_group, submission.block_number) == (KEY.ss58_address, 0, 12530)
    assert submission.signed == canonical_json(FIELDS)
    assert submission.checkpoint_hash is None


def test_spelling_of_the_json_and_unknown_fields_do_not_matter() -> None:
    document = {"extra": [{"nested": 1.5}], **dict(reversed(signed().items()))}
    text = json.dumps(document, indent=2, ensure_ascii=True).replace("https", "\\u0068ttps")
    assert read_body(text.encode(), RULES).digest == read_body(body(), RULES).digest


def test_signatures_of_pynacl_and_of_the_sdks_keypairs_are_accepted() -> None:
    by_pynacl = encode_signature(nacl.signing.SigningKey(SEED).sign(canonical_json(FIELDS)).signature)
    for signature in (by_pynacl, by_pynacl.rstrip("=")):
        assert read_body(json.dumps({**FIELDS, "signature": signature}).encode(), RULES).hotkey == KEY.ss58_address
    pair = bittensor_core.Keypair.create_from_seed(SEED, bittensor_core.CRYPTO_SR25519)
    fields = {**FIELDS, "hotkey": pair.ss58_address}
    signature = encode_signature(bytes(pair.sign(canonical_json(fields))))
    raw = json.dumps({**fields, "signature": signature}).encode()
    assert read_body(raw, RULES).hotkey == pair.ss58_address
    only = SubmitSettings(signature_schemes=("ed25519",))
    assert refused(raw, only).code == "invalid_signature"


def test_a_checkpoint_hash_is_part_of_what_is_signed() -> None:
    value = "sha256:" + "ab" * 32
    submission = read_body(body(checkpoint_hash=value), RULES)
    assert submission.checkpoint_hash == value
    assert json.loads(submission.signed)["checkpoint_hash"] == value
    added = {**signed(), "checkpoint_hash": value}
    assert refused(json.dumps(added).encode()).code == "invalid_signature"
    dropped = signed({**FIELDS, "checkpoint_hash": value})
    del dropped["checkpoint_hash"]
    assert refused(json.dumps(dropped).encode()).code == "invalid_signature"
    for wrong in ("", "sha256:", value.upper(), value[:-1], value + "0", "md5:" + "ab" * 16, None, 5, value + "\n"):
        assert refused(body(checkpoint_hash=wrong)).code in ("invalid_checkpoint_hash", "invalid_field")


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b"{",
            b"null",
            b"[]",
            b'"x"',
            b"5",
            b"\xff\xfe",
            b"\xef\xbb\xbf{}",
            b"{} {}",
            b"{'a': 1}",
            b'{"a": NaN}',
        ),
        *(b'{"a": -Infinity}', b"[" * 60_000, b'{"a":' * 10_000, b'{"a": 01}', b'{"a": "\x01"}', b"{,}"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    assert refused(raw).code == "invalid_json"


def test_a_field_named_twice_is_refused_even_with_one_value() -> None:
    text = body().decode()
    for again in ('"expert_group": 0', '"unknown": 1, "unknown": 1', '"expert_\\u0067roup": 1'):
        assert refused(f"{text[:-1]}, {again}}}".encode()).code == "duplicate_key"


@pytest.mark.parametrize("name", [*FIELDS, "signature"])
def test_every_field_is_needed(name: str) -> None:
    document = signed()
    del document[name]
    assert refused(json.dumps(document).encode()).code == "missing_field"


@pytest.mark.parametrize("name", ["expert_group", "block_number"])
@pytest.mark.parametrize(
    "number", ["1.0", "1e0", "1E2", "-1", "-0", "true", "false", "null", '"1"', "[1]", "1" * 17, "9" * 60_000, "1e999"]
)
def test_integers_are_plain_integers(name: str, number: str) -> None:
    text = json.dumps({**signed(), name: "HERE"}).replace('"HERE"', number)
    assert refused(text.encode()).code == "invalid_field"


@pytest.mark.parametrize("name", ["hotkey", "checkpoint_url", "signature"])
@pytest.mark.parametrize("value", [None, 5, True, ["x"], {}])
def test_texts_are_texts(name: str, value: object) -> None:
    assert refused(json.dumps({**signed(), name: value}).encode()).code == "invalid_field"


def test_ranges_end_where_the_contract_says() -> None:
    assert read_body(body(expert_group=999_999_999, block_number=2**53 - 1), RULES).block_number == 2**53 - 1
    for changes in ({"expert_group": 1_000_000_000}, {"block_number": 2**53}):
        document = {**signed(), **changes}
        assert refused(json.dumps(document).encode()).code == "invalid_field"


def test_a_hotkey_is_an_ss58_address_of_bittensor() -> None:
    for wrong in ("", "5F", KEY.ss58_address[:-1] + "1", bittensor_core.ss58_encode(KEY.public_key, 0)):
        assert refused(body(hotkey=wrong)).code == "invalid_hotkey"


@pytest.mark.parametrize(
    "changed", [{"block_number": 12531}, {"expert_group": 1}, {"checkpoint_url": "https://o.example/"}]
)
def test_a_changed_field_breaks_the_signature(changed: dict[str, object]) -> None:
    assert refused(json.dumps({**signed(), **changed}).encode()).code == "invalid_signature"


def test_another_keys_signature_is_refused() -> None:
    other = Key.from_seed(b"o" * 32)
    assert refused(json.dumps(signed(key=other)).encode()).code == "invalid_signature"
    assert refused(json.dumps({**signed(), "signature": "x"}).encode()).code == "invalid_signature"


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    refused(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*FIELDS, "signature", "checkpoint_hash"], JSON)))
def test_no_json_breaks_the_reader(changes: dict[str, object]) -> None:
    raw = json.dumps({**signed(), **changes}).encode()
    if raw != json.dumps(signed()).encode():
        refused(raw)
    else:
        assert read_body(raw, RULES).signed == canonical_json(FIELDS)


# --- the moment ---

CONTEXT = ChainContext(
    groups={0, 1},
    chain=ChainState(12540, 1000.0, miners=frozenset({KEY.ss58_address})),
    cycle=Cycle(),
    stale_s=60.0,
    now=1030.0,
)


def code(context: ChainContext, **changes: object) -> tuple[int, str]:
    with pytest.raises(SubmissionRefused) as caught:
        decide(read_body(body(**changes), RULES), context, RULES)
    return caught.value.status, caught.value.code


def at_block(block: int) -> ChainContext:
    assert CONTEXT.chain is not None
    return replace(CONTEXT, chain=replace(CONTEXT.chain, block=block))


def test_the_right_moment() -> None:
    candidate = decide(read_body(body(), RULES), CONTEXT, RULES)
    assert (candidate.round, candidate.max_per_cycle) == (12520, 3)
    for block in (12180, 12539, 12540):
        decide(read_body(body(block_number=block), RULES), CONTEXT, RULES)
    decide(read_body(body(), RULES), replace(CONTEXT, identities=(KEY.ss58_address,)), RULES)


def test_each_refusal_comes_in_the_contracts_order() -> None:
    """Everything is wrong at once; then one thing after the other is put right."""
    assert CONTEXT.chain is not None
    wrong: dict[str, object] = {"expert_group": 2, "block_number": 12541}
    nobody = replace(CONTEXT.chain, miners=frozenset(), block=12345)
    context = replace(CONTEXT, groups=None, chain=None, identities=("5other",))
    assert code(context, **wrong) == (503, "model_not_loaded")
    context = replace(context, groups={0, 1})
    assert code(context, **wrong) == (503, "chain_unknown")
    context = replace(context, chain=nobody, now=1060.1)
    assert code(context, **wrong) == (503, "chain_stale")
    context = replace(context, now=1060.0)
    assert code(context, **wrong) == (400, "unknown_expert_group")
    del wrong["expert_group"]
    assert code(context, **wrong) == (423, "not_in_submit_phase")
    context = replace(context, chain=replace(nobody, block=12540))
    assert code(context, **wrong) == (400, "block_number_out_of_cycle")
    assert code(context) == (403, "hotkey_mismatch")
    context = replace(context, identities=())
    assert code(context) == (403, "hotkey_not_registered")
    assert decide(read_body(body(), RULES), replace(context, chain=CONTEXT.chain), RULES)


@pytest.mark.parametrize(("block", "blocks"), [(12519, "1 blocks"), (12180, "340 blocks"), (12600, "340 blocks")])
def test_out_of_phase_says_how_long(block: int, blocks: str) -> None:
    with pytest.raises(SubmissionRefused, match=blocks):
        decide(read_body(body(), RULES), at_block(block), RULES)


@pytest.mark.parametrize("block", [12179, 12541, 0, 2**53 - 1])
def test_blocks_of_other_cycles_and_of_the_future_are_refused(block: int) -> None:
    assert code(CONTEXT, block_number=block) == (400, "block_number_out_of_cycle")


def test_the_ledgers_refusals_have_their_codes() -> None:
    duplicate, many = refusal_of(Duplicate(None), retry_after=9), refusal_of(LimitReached(3), retry_after=9)
    assert (duplicate.status, duplicate.code, duplicate.retry_after) == (409, "duplicate_submission", None)
    assert (many.status, many.code, many.retry_after) == (429, "too_many_submissions", 9)
