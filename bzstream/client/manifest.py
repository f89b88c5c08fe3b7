"""The manifest of a unit: what the file must be, chunk by chunk. Parsed strictly, as it decides what is trusted.

Whoever can change the manifest can change the model. Over TLS or a private network the manifest is as good as the
server; anywhere else it is good when the validator's hotkey signed it and the caller knows that hotkey
(`--validator-hotkey`). A signature does not say that the manifest is the newest one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from bzstream.chain.keys import InvalidHotkey, InvalidSignature, canonical_json, decode_hotkey, decode_signature, verify
from bzstream.client.address import VERSION_FORM, UnitRef
from bzstream.client.errors import BadManifest, BadSignature
from bzstream.errors import BzstreamError
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = ["Coding", "Manifest", "check_signature", "parse_manifest"]

_CONTENT_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_CODING_NAME = re.compile(r"[a-z][a-z0-9.-]{0,63}", re.ASCII)
_CHUNK_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
MAX_SIZE = 1 << 50
MAX_CHUNK = 256 * 1024 * 1024
"""A chunk is read back whole in the rare case that its parts came out of order."""


class _CodingDocument(msgspec.Struct):
    name: str
    base: str | None
    size: int
    chunks: list[tuple[int, int, str]]


class _Document(msgspec.Struct):
    unit: str
    expert_group: int | None
    block_number: int
    model_version: str
    content_hash: str
    payload_offset: int
    size: int
    chunk_size: int
    chunk_hash: str
    chunks: list[str]
    validator_hotkey: str | None
    signature: str | None
    codings: list[_CodingDocument] = []


@dataclass(frozen=True, slots=True)
class Coding:
    """A coded form of the unit: chunk i lies coded at `chunks[i]`: (offset, length, BLAKE3 digest).

    `base` is the SHA-256 of the version of the unit that it is a difference to, None when it stands alone.
    """

    name: str
    base: bytes | None
    size: int
    chunks: tuple[tuple[int, int, bytes], ...]
    etag: str
    """The entity tag of the coded bytes on every node that lists this very coding."""

    @property
    def query(self) -> str:
        """What names it in a request."""
        base = "" if self.base is None else f"&base=sha256:{self.base.hex()}"
        return f"coding={self.name}{base}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`size` bytes in chunks of `chunk_size` (the last may be shorter), `chunks[i]` the BLAKE3 digest of each."""

    unit: UnitRef
    version: str
    block: int
    sha256: bytes
    size: int
    chunk_size: int
    chunks: tuple[bytes, ...]
    validator_hotkey: str | None
    signed: bool
    codings: tuple[Coding, ...] = ()

    @property
    def etag(self) -> str:
        """The entity tag that the bare payload has on every node."""
        return f'"{self.sha256.hex()}"'

    @property
    def content_hash(self) -> str:
        return "sha256:" + self.sha256.hex()

    def chunk_length(self, index: int) -> int:
        return min(self.chunk_size, self.size - index * self.chunk_size)


def parse_manifest(raw: bytes, unit: UnitRef, *, version: str | None = None, signer: str | None = None) -> Manifest:
    """The manifest in `raw`, checked: right unit, right version if one is asked for, consistent with itself, and
    signed by `signer` (SS58) if given. Raises BadManifest and BadSignature.
    """
    try:
        plain = parse_json_object(raw)
        document = msgspec.convert(plain, _Document, strict=True)
    except (JsonError, msgspec.ValidationError) as error:
        raise BadManifest(f"the manifest of {unit.label} is malformed: {error}") from None
    wrong = _contradiction(document, unit, version)
    if wrong:
        raise BadManifest(f"the manifest of {unit.label} cannot be right: {wrong}")
    check_signature(plain, f"the manifest of {unit.label}", signer)
    return Manifest(
        unit=unit,
        version=document.model_version,
        block=document.block_number,
        sha256=bytes.fromhex(document.content_hash.removeprefix("sha256:")),
        size=document.size,
        chunk_size=document.chunk_size,
        chunks=tuple(map(bytes.fromhex, document.chunks)),
        validator_hotkey=document.validator_hotkey,
        signed=document.signature is not None,
        codings=tuple(map(_coding, document.codings, plain.get("codings", ()))),
    )


def _coding(document: _CodingDocument, plain: dict[str, Any]) -> Coding:
    # The node makes the entity tag of the manifest's entry (docs/coding.md): it changes with every coded byte.
    entry = {name: plain[name] for name in ("name", "base", "size", "chunks")}
    return Coding(
        document.name,
        None if document.base is None else bytes.fromhex(document.base.removeprefix("sha256:")),
        document.size,
        tuple((offset, length, bytes.fromhex(digest)) for offset, length, digest in document.chunks),
        f'"{hashlib.sha256(canonical_json(entry)).hexdigest()}"',
    )


def _wrong_coding(coding: _CodingDocument, document: _Document) -> str | None:
    """What is wrong with an entry of `codings`, or None."""
    if not _CODING_NAME.fullmatch(coding.name):
        return "a coding's name is not one"
    if coding.base is not None and not _CONTENT_HASH.fullmatch(coding.base):
        return "a coding's base is not sha256:<64 hex>"
    if not 0 < coding.size <= document.size or len(coding.chunks) != len(document.chunks):
        return "a coding does not cover the unit"
    for offset, length, digest in coding.chunks:
        if not (offset >= 0 and 0 < length <= document.chunk_size and offset + length <= coding.size):
            return "a coded chunk is out of range"
        if not _CHUNK_HASH.fullmatch(digest):
            return "a coded chunk's hash is not 64 hex digits"
    return None


def _contradiction(document: _Document, unit: UnitRef, version: str | None) -> str | None:
    """What is wrong with it, or None."""
    if document.unit != unit.kind or document.expert_group != unit.group:
        return f"it is for {document.unit!r:.40}, group {document.expert_group}"
    if not VERSION_FORM.fullmatch(document.model_version):
        return "its model_version is not a version"
    if version is not None and document.model_version != version:
        return f"it is of version {document.model_version}, asked for was {version}"
    if not _CONTENT_HASH.fullmatch(document.content_hash):
        return "its content_hash is not sha256:<64 hex>"
    if document.chunk_hash != "blake3":
        return f"its chunks are hashed with {document.chunk_hash!r:.40}, this client knows blake3"
    if not 0 < document.size <= MAX_SIZE or not 0 < document.chunk_size <= MAX_CHUNK:
        return "its sizes are out of range"
    if document.block_number < 0 or document.payload_offset < 0:
        return "it holds negative numbers"
    if len(document.chunks) != -(-document.size // document.chunk_size):
        return f"{len(document.chunks)} chunk hashes do not cover {document.size} bytes"
    if not all(map(_CHUNK_HASH.fullmatch, document.chunks)):
        return "a chunk hash is not 64 hex digits"
    for coding in document.codings:
        if wrong := _wrong_coding(coding, document):
            return wrong
    if document.validator_hotkey is not None:
        try:
            decode_hotkey(document.validator_hotkey)
        except InvalidHotkey:
            return "its validator_hotkey is not a hotkey"
    return None


def check_signature(plain: dict[str, Any], what: str, signer: str | None) -> None:
    """Check the `signature` by `validator_hotkey` over the other members of a document, which is called `what`.

    A signature that is there must be good, asked for or not; one by `signer` (SS58), if given, must be there. The types
    of both members were checked before. Raises BadSignature.
    """
    hotkey, signature = plain["validator_hotkey"], plain["signature"]
    if signature is None:
        if signer is not None:
            raise BadSignature(f"{what} is not signed; {signer} should have signed it")
        return
    if signer is not None and hotkey != signer:
        raise BadSignature(f"{what} is signed by {hotkey}, not by {signer}")
    if hotkey is None:
        raise BadSignature(f"{what} is signed by nobody")
    try:
        message = canonical_json({name: value for name, value in plain.items() if name != "signature"})
        good = verify(hotkey, message, decode_signature(signature))
    except (InvalidSignature, BzstreamError):
        good = False
    if not good:
        raise BadSignature(f"the signature of {what} is not by {hotkey} over what it says")
