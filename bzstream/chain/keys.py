"""Private keys: where a miner or a validator keeps one, and what is signed with it.

`load_key` reads, in this order, a file that exists at the path, else a Bittensor wallet `<wallet>/<hotkey>` (or
`<wallet>`, whose hotkey is `default`) under ~/.bittensor/wallets. A file holds either 64 hex digits, the seed of an
ed25519 key, or what the Bittensor SDK writes for a hotkey: JSON, plain or encrypted. The password of an encrypted one
comes from where the SDK takes it: BT_WALLET_PASSWORD, BT_PW_<path>, the file that BT_WALLET_PASSWORD_FILE names, or a
prompt when a person sits there.

The public half of keys and signatures (`ss58`, `signatures`, `canonical`) is exported here too, so that callers import
everything about keys from this module.
"""

from __future__ import annotations

import getpass
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bittensor_core

from bzstream.chain.canonical import NotCanonical, canonical_json
from bzstream.chain.signatures import (
    SCHEMES,
    InvalidSignature,
    Scheme,
    decode_signature,
    encode_signature,
    verify,
)
from bzstream.chain.ss58 import InvalidHotkey, decode_hotkey, encode_hotkey, is_hotkey
from bzstream.errors import BzstreamError

__all__ = [
    "SCHEMES",
    "InvalidHotkey",
    "InvalidSignature",
    "Key",
    "KeyUnavailable",
    "NotCanonical",
    "Scheme",
    "canonical_json",
    "decode_hotkey",
    "decode_signature",
    "encode_hotkey",
    "encode_signature",
    "is_hotkey",
    "load_key",
    "verify",
]

_MAX_FILE = 64 * 1024
"""Bytes of a key file; the SDK's largest, encrypted with a mnemonic inside, has less than 1 KiB."""
_SEED = re.compile(rb"\s*([0-9a-fA-F]{64})\s*")
_WALLET = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)?")


class KeyUnavailable(BzstreamError):
    """A private key cannot be loaded: no such file or wallet, wrong password, not a private key."""


class Key:
    """A private key, able to sign. Its `repr` shows the public half only.

    It has the four members that the Bittensor SDK expects of a signer (`ss58_address`, `public_key`, `crypto_type`,
    `sign`), so that the SDK can submit weights with it. It must not have a member `hotkey`: the SDK takes an object
    that has one for a whole wallet and reads `wallet.hotkey.ss58_address` and `wallet.hotkey.public_key`
    (bittensor 11.3, intents/base.py: `hotkey_address`, `hotkey_public_key`).
    """

    __slots__ = ("_pair", "scheme", "ss58_address")

    def __init__(self, pair: Any) -> None:
        """`pair`: a `bittensor_core.Keypair` that holds its private half; else KeyUnavailable."""
        self._pair = pair
        self.scheme: Scheme = "ed25519" if pair.crypto_type == bittensor_core.CRYPTO_ED25519 else "sr25519"
        self.ss58_address: str = encode_hotkey(bytes(pair.public_key))
        try:
            pair.sign(b"")
        except ValueError:
            raise KeyUnavailable(
                f"only the public half of {self.ss58_address} is there; give the private key"
            ) from None

    @classmethod
    def from_seed(cls, seed: bytes, scheme: Scheme = "ed25519") -> Key:
        """The key of a 32-byte seed."""
        if len(seed) != 32:
            raise KeyUnavailable(f"a seed has 32 bytes, not {len(seed)}")
        kind = bittensor_core.CRYPTO_ED25519 if scheme == "ed25519" else bittensor_core.CRYPTO_SR25519
        return cls(bittensor_core.Keypair.create_from_seed(seed, kind))

    @property
    def public_key(self) -> bytes:
        return bytes(self._pair.public_key)

    @property
    def crypto_type(self) -> int:
        """0 ed25519, 1 sr25519: the SDK's number of the scheme."""
        return int(self._pair.crypto_type)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature over `message`."""
        return bytes(self._pair.sign(message))

    def sign_fields(self, fields: Mapping[str, object]) -> str:
        """The signature over the canonical JSON of `fields`, as URL-safe base64 with padding. Raises NotCanonical."""
        return encode_signature(self.sign(canonical_json(fields)))

    def __repr__(self) -> str:
        return f"Key({self.ss58_address}, {self.scheme})"


def load_key(text: str) -> Key:
    """The private key in the file or the Bittensor wallet that `text` names. Raises KeyUnavailable."""
    file = _locate(text)
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_FILE + 1)
    except OSError as error:
        raise KeyUnavailable(f"the key file {file} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise KeyUnavailable(f"{file} is too large for a key file; give 64 hex digits or a Bittensor hotkey file")
    if seed := _SEED.fullmatch(data):
        return Key.from_seed(bytes.fromhex(seed[1].decode("ascii")))
    try:
        if bittensor_core.keyfile_data_is_encrypted(data):
            data = bytes(bittensor_core.decrypt_keyfile_data(data, _password(file)))
        pair = bittensor_core.deserialize_keypair_from_keyfile_data(data)
    except bittensor_core.WrongPasswordError:
        raise KeyUnavailable(f"the password does not open the key file {file}") from None
    except (bittensor_core.KeyfileError, ValueError):
        # The library's own text may quote what it read, so that it is not repeated.
        raise KeyUnavailable(
            f"{file} is no key file: it must hold 64 hex digits (an ed25519 seed) or a Bittensor hotkey"
        ) from None
    return Key(pair)


def _locate(text: str) -> Path:
    try:
        file = Path(text).expanduser()
        home = Path.home()
    except RuntimeError:  # no such user, or one without a home
        file, home = Path(text), None
    if file.is_file():
        return file
    if not _WALLET.fullmatch(text):
        raise KeyUnavailable(f"there is no key file {text!r}, and it is no name of a wallet either")
    wallet, _, hotkey = text.partition("/")
    if home is None:
        raise KeyUnavailable(f"{text!r} names a wallet, but nothing says where your home is; set HOME or give a file")
    found = home / ".bittensor" / "wallets" / wallet / "hotkeys" / (hotkey or "default")
    if not found.is_file():
        raise KeyUnavailable(f"there is no key file {text!r} and no wallet with its hotkey in {found}")
    return found


def _password(file: Path) -> str:
    if password := os.environ.get("BT_WALLET_PASSWORD"):
        return password
    # The SDK's own name and scrambling of a saved password (bittensor.keyfiles.Keyfile.env_var_name).
    variable = "BT_PW_" + str(file).replace(os.sep, "_").replace(".", "_").upper()
    if password := bittensor_core.get_password_from_environment(variable):
        return str(password)
    if where := os.environ.get("BT_WALLET_PASSWORD_FILE"):
        try:
            return Path(where).read_text(encoding="utf-8").splitlines()[0]
        except (OSError, UnicodeDecodeError, IndexError):
            raise KeyUnavailable(
                "the file that BT_WALLET_PASSWORD_FILE names has no password in its first line"
            ) from None
    if sys.stdin.isatty():
        return getpass.getpass(f"Password of {file}: ")
    raise KeyUnavailable(f"the key file {file} is encrypted; set BT_WALLET_PASSWORD or run where you can type")
