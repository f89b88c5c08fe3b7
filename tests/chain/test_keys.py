"""Keys, addresses and signatures: what is accepted, and every known way to cheat."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from pathlib import Path

import bittensor_core
import nacl.signing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bzstream.chain.keys import (
    InvalidHotkey,
    InvalidSignature,
    Key,
    KeyUnavailable,
    NotCanonical,
    Scheme,
    canonical_json,
    decode_hotkey,
    decode_signature,
    encode_hotkey,
    encode_signature,
    is_hotkey,
    load_key,
    verify,
)

SEED = bytes(range(32))
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
L = 2**252 + 27742317777372353535851937790883648493
"""Order of the group of both schemes (RFC 8032 5.1, ristretto255)."""

# The encodings of points of order 1, 2, 4 and 8, and non-canonical forms of them (libsodium's own block list).
SMALL_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0100000000000000000000000000000000000000000000000000000000000080",
]


# --- SS58 ---


@given(st.binary(min_size=32, max_size=32))
def test_an_address_is_the_librarys_and_comes_back(public_key: bytes) -> None:
    address = encode_hotkey(public_key)
    assert decode_hotkey(address) == public_key
    assert address == bittensor_core.ss58_encode(public_key, 42)
    assert bytes(bittensor_core.ss58_decode(address)) == public_key


@given(st.binary(min_size=32, max_size=32), st.integers(0, 47), st.sampled_from(ALPHABET))
def test_a_changed_character_is_refused_or_the_same_address(public_key: bytes, position: int, sign: str) -> None:
    address = encode_hotkey(public_key)
    changed = address[:position] + sign + address[position + 1 :]
    # A 16-bit checksum lets 1 in 65,536 through; then the text is another key's own address, never this one's.
    if is_hotkey(changed):
        assert encode_hotkey(decode_hotkey(changed)) == changed
        assert (decode_hotkey(changed) == public_key) == (changed == address)


@given(st.text(max_size=60))
def test_no_text_breaks_the_decoder(text: str) -> None:
    if is_hotkey(text):
        assert encode_hotkey(decode_hotkey(text)) == text
    else:
        with pytest.raises(InvalidHotkey):
            decode_hotkey(text)


@pytest.mark.parametrize("prefix", [0, 2, 41, 43, 63])
def test_other_networks_are_refused(prefix: int) -> None:
    with pytest.raises(InvalidHotkey):
        decode_hotkey(bittensor_core.ss58_encode(SEED, prefix))


def test_other_lengths_with_a_right_checksum_are_refused() -> None:
    for length in (1, 8, 20, 31, 33, 34):
        body = b"\x2a" + bytes(length)
        raw = body + hashlib.blake2b(b"SS58PRE" + body).digest()[:2]
        number, text = int.from_bytes(raw, "big"), ""
        while number:
            number, digit = divmod(number, 58)
            text = ALPHABET[digit] + text
        assert not is_hotkey(text)


@pytest.mark.parametrize("twist", ["1{}", "{}1", " {}", "{} ", "{}\n", "{}\0"])
def test_an_address_has_one_spelling(twist: str) -> None:
    assert not is_hotkey(twist.format(encode_hotkey(SEED)))


def test_only_text_is_a_hotkey() -> None:
    assert not any(is_hotkey(value) for value in (None, 5, b"5F", ["5F"], ""))


# --- canonical JSON ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_the_canonical_form_means_the_value_and_is_unique(value: object) -> None:
    form = canonical_json(value)
    assert json.loads(form) == value
    assert canonical_json(json.loads(form)) == form
    assert canonical_json(json.loads(json.dumps(value, indent=3))) == form


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 9), min_size=2, max_size=6))
def test_members_are_sorted_by_utf16_code_units(fields: dict[str, int]) -> None:
    names = list(json.loads(canonical_json(dict(reversed(fields.items())))))
    assert names == sorted(fields, key=lambda name: name.encode("utf-16-be"))


def test_the_contracts_example() -> None:
    fields = {"hotkey": "5F", "expert_group": 0, "checkpoint_url": "https://é/", "block_number": 12345}
    expected = '{"block_number":12345,"checkpoint_url":"https://é/","expert_group":0,"hotkey":"5F"}'
    assert canonical_json(fields) == expected.encode()


def test_the_rfcs_examples() -> None:
    # RFC 8785 3.2.3 (sorting) and 3.2.2.2 (strings).
    sorting = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert list(json.loads(canonical_json(sorting)).values()) == [2, 4, 6, 7, 1, 5, 3]
    assert canonical_json('€$\x0f\nA\'B"\\\\"/\x7f') == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/\x7f"'.encode()


@pytest.mark.parametrize(
    "value", [1.0, float("nan"), 2**53, -(2**53), b"x", {1: 2}, {"a": {2.5}}, "\ud800", {"\udfff": 1}]
)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(NotCanonical):
        canonical_json(value)


# --- signatures ---


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_a_signature_is_good_for_its_key_message_and_scheme(scheme: Scheme) -> None:
    key = Key.from_seed(SEED, scheme)
    other: Scheme = "sr25519" if scheme == "ed25519" else "ed25519"
    signature = key.sign(b"message")
    assert verify(key.ss58_address, b"message", signature)
    assert verify(key.ss58_address, b"message", signature, (scheme,))
    assert not verify(key.ss58_address, b"message", signature, (other,))
    assert not verify(key.ss58_address, b"message", signature, ())
    assert not verify(key.ss58_address, b"massage", signature)
    assert not verify(Key.from_seed(SEED[::-1], scheme).ss58_address, b"message", signature)
    assert not verify("5F", b"message", signature)


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_every_flipped_bit_is_refused(scheme: Scheme) -> None:
    key = Key.from_seed(SEED, scheme)
    signature = int.from_bytes(key.sign(b"message"), "big")
    for bit in range(512):
        assert not verify(key.ss58_address, b"message", (signature ^ (1 << bit)).to_bytes(64, "big")), bit


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_s_plus_the_order_of_the_group_is_refused(scheme: Scheme) -> None:
    key = Key.from_seed(SEED, scheme)
    signature = key.sign(b"message")
    marker = 0x80 if scheme == "sr25519" else 0  # schnorrkel marks its signatures in the top bit
    s = int.from_bytes(signature[32:63] + bytes([signature[63] & ~marker & 0xFF]), "little")
    for multiple in range(1, 8):
        shifted = (s + multiple * L).to_bytes(33, "little")
        if shifted[32]:
            break
        malleable = signature[:32] + shifted[:31] + bytes([shifted[31] | marker])
        assert not verify(key.ss58_address, b"message", malleable)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_other_lengths_are_refused(length: int) -> None:
    for scheme in ("ed25519", "sr25519"):
        key = Key.from_seed(SEED, scheme)
        assert not verify(key.ss58_address, b"m", (key.sign(b"m") * 2)[:length])


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_keys_of_small_order_sign_nothing(point: str) -> None:
    """With such a key R = [s]B is a forgery for many messages, whatever they are."""
    hotkey = encode_hotkey(bytes.fromhex(point))
    forged = [bytes.fromhex(r) + s for r in SMALL_ORDER for s in (bytes(32), b"\1" + bytes(31), bytes(31) + b"\x80")]
    base = nacl.signing.SigningKey(SEED).verify_key.encode()
    forged += [base + bytes(32), bytes(64), bytes(63) + b"\x80"]
    for number in range(16):
        message = b"message %d" % number
        assert not any(verify(hotkey, message, signature) for signature in forged)


def test_the_all_zero_sr25519_key_signs_nothing() -> None:
    hotkey = encode_hotkey(bytes(32))
    forged = bytes(63) + b"\x80"  # R = 0, s = 0 with schnorrkel's marker
    # The library alone lets it through: the guard is needed.
    assert bittensor_core.verify(b"anything", forged, hotkey, bittensor_core.CRYPTO_SR25519)
    assert not verify(hotkey, b"anything", forged)


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_a_signature_over_the_wrapped_message_is_refused(scheme: Scheme) -> None:
    key = Key.from_seed(SEED, scheme)
    assert not verify(key.ss58_address, b"m", key.sign(b"<Bytes>m</Bytes>"))
    assert not verify(key.ss58_address, b"<Bytes>m</Bytes>", key.sign(b"m"))
    assert verify(key.ss58_address, b"<Bytes>m</Bytes>", key.sign(b"<Bytes>m</Bytes>"))


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200), st.binary(min_size=64, max_size=64))
def test_random_bytes_sign_nothing(public_key: bytes, message: bytes, signature: bytes) -> None:
    assert not verify(encode_hotkey(public_key), message, signature)


@given(st.binary(min_size=64, max_size=64))
def test_a_signature_has_two_spellings_only(signature: bytes) -> None:
    padded = encode_signature(signature)
    assert padded.endswith("==")
    assert decode_signature(padded) == decode_signature(padded[:-2]) == signature
    ordinary = base64.b64encode(signature).decode()
    if ordinary != padded:
        with pytest.raises(InvalidSignature):
            decode_signature(ordinary)


@pytest.mark.parametrize(
    "text",
    [
        *("", "A" * 85, "A" * 87, "A" * 86 + "=", "A" * 86 + "===", "A" * 85 + "B", "A" * 85 + "=", " " + "A" * 86),
        *("A" * 86 + "\n", "A" * 88, "é" * 86, "A" * 43 + "\n" + "A" * 43, "+" * 86),
    ],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(InvalidSignature):
        decode_signature(text)


# --- private keys ---


@pytest.mark.parametrize("end", ["", "\n", " \r\n"])
def test_a_seed_file_is_an_ed25519_key(tmp_path: Path, end: str) -> None:
    (tmp_path / "seed").write_text(SEED.hex() + end)
    key = load_key(str(tmp_path / "seed"))
    assert key.scheme == "ed25519"
    assert decode_hotkey(key.ss58_address) == nacl.signing.SigningKey(SEED).verify_key.encode()
    assert key.sign(b"m") == nacl.signing.SigningKey(SEED).sign(b"m").signature
    fields = {"b": 1, "a": "x"}
    assert verify(key.ss58_address, b'{"a":"x","b":1}', decode_signature(key.sign_fields(fields)))
    assert SEED.hex() not in repr(key)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("BT_WALLET_PASSWORD", "BT_WALLET_PASSWORD_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_wallet(home: Path, scheme: Scheme, *, hotkey: str = "default", password: str | None = None) -> Path:
    """A hotkey as the SDK keeps it; the formats are bittensor_core's own, which the SDK writes to disk unchanged."""
    kind = bittensor_core.CRYPTO_ED25519 if scheme == "ed25519" else bittensor_core.CRYPTO_SR25519
    pair = bittensor_core.Keypair.create_from_seed(SEED, kind)
    data = bytes(bittensor_core.serialized_keypair_to_keyfile_data(pair))
    if password is not None:
        data = bytes(bittensor_core.encrypt_keyfile_data(data, password))
    file = home / ".bittensor" / "wallets" / "miner" / "hotkeys" / hotkey
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
def test_a_wallet_is_found_by_name_and_by_path(home: Path, scheme: Scheme) -> None:
    file = write_wallet(home, scheme)
    write_wallet(home, scheme, hotkey="second")
    expected = Key.from_seed(SEED, scheme)
    for text in ("miner", "miner/default", "miner/second", str(file), f"~/{file.relative_to(home)}"):
        key = load_key(text)
        assert (key.ss58_address, key.scheme) == (expected.ss58_address, scheme)
        assert verify(key.ss58_address, b"m", key.sign(b"m"), (scheme,))


def test_an_encrypted_hotkey_opens_with_its_password(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_wallet(home, "sr25519", password="open sesame")
    with pytest.raises(KeyUnavailable, match="encrypted"):
        load_key("miner")
    monkeypatch.setenv("BT_WALLET_PASSWORD", "wrong")
    with pytest.raises(KeyUnavailable, match="password"):
        load_key("miner")
    monkeypatch.delenv("BT_WALLET_PASSWORD")
    (home / "password").write_text("open sesame\n")
    monkeypatch.setenv("BT_WALLET_PASSWORD_FILE", str(home / "password"))
    assert load_key(str(file)).ss58_address == Key.from_seed(SEED, "sr25519").ss58_address


def test_the_public_half_is_refused(home: Path) -> None:
    (home / "pub.txt").write_text(json.dumps({"ss58Address": Key.from_seed(SEED).ss58_address}))
    with pytest.raises(KeyUnavailable, match="public half"):
        load_key("pub.txt")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff" * 64, b"00" * 31, b"00" * 33, b"x" * 70_000, b"$NACL"])
def test_other_files_are_refused_without_quoting_them(home: Path, content: bytes) -> None:
    (home / "file").write_bytes(content)
    with pytest.raises(KeyUnavailable) as caught:
        load_key("file")
    assert "0000" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "nobody", "nobody/default", "../x", "a/b/c", "no such file", "miner/"])
def test_what_is_not_there_is_said(home: Path, name: str) -> None:
    with pytest.raises(KeyUnavailable):
        load_key(name)


def test_a_random_key_signs_for_both_schemes() -> None:
    for scheme in ("ed25519", "sr25519"):
        key = Key.from_seed(secrets.token_bytes(32), scheme)
        assert verify(key.ss58_address, b"m", key.sign(b"m"))
        assert decode_hotkey(key.ss58_address) == key.public_key
    with pytest.raises(KeyUnavailable):
        Key.from_seed(b"short")
