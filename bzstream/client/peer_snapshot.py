"""GET /model/snapshot as a follower reads it: strictly, as it decides what the store will hold. Pure.

A small file's name becomes a file's name here, and its content is only ever read as data.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from bzstream.chain.keys import InvalidHotkey, decode_hotkey
from bzstream.client.address import VERSION_FORM
from bzstream.client.errors import BadSnapshot
from bzstream.client.manifest import MAX_SIZE, check_signature
from bzstream.model.small_files import FILE_NAME, MAX_FILES
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = ["MAX_DOCUMENT", "PeerSnapshot", "parse_snapshot"]

MAX_DOCUMENT = MAX_FILES // 3 * 4 + 10 * 1024 * 1024
"""Bytes of the document: the small files in base64, and room for 1,000 groups' expert maps."""

MAX_NUMBER = (1 << 53) - 1
_LABEL = re.compile(r"partial/(?:0|[1-9][0-9]{0,8})|shared|ungrouped|full", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_CONTENT_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


class _Unit(msgspec.Struct):
    name: str
    size: int
    content_hash: str


class _File(msgspec.Struct):
    name: str
    size: int
    sha256: str
    content: str


class _Document(msgspec.Struct):
    model_version: str
    block_number: int
    sequence: int
    units: list[_Unit]
    expert_map: dict[str, dict[str, list[int]]]
    files: list[_File]
    validator_hotkey: str | None
    signature: str | None


@dataclass(frozen=True, slots=True)
class PeerSnapshot:
    """What a peer says that its snapshot is. `units`: label -> (size, content hash); `files`: name -> content."""

    version: str
    block: int
    sequence: int
    units: dict[str, tuple[int, str]]
    experts: dict[int, dict[int, tuple[int, ...]]]
    files: dict[str, bytes]
    hotkey: str | None
    """The validator whose signature was checked; None when it is not signed."""


def parse_snapshot(raw: bytes, *, version: str | None = None, signer: str | None = None) -> PeerSnapshot:
    """The snapshot in `raw`, checked: of `version` if given, consistent with itself, signed by `signer` if given.

    Raises BadSnapshot and BadSignature.
    """
    try:
        plain: dict[str, Any] = parse_json_object(raw, max_bytes=MAX_DOCUMENT)
        document = msgspec.convert(plain, _Document)
    except (JsonError, msgspec.MsgspecError) as error:
        raise BadSnapshot(f"the peer's snapshot cannot be used: {error!s:.200}") from None
    if wrong := _contradiction(document, version):
        raise BadSnapshot(f"the peer's snapshot cannot be right: {wrong}")
    check_signature(plain, "the peer's snapshot", signer)
    return PeerSnapshot(
        version=document.model_version,
        block=document.block_number,
        sequence=document.sequence,
        units={unit.name: (unit.size, unit.content_hash) for unit in document.units},
        experts={
            int(group): {int(layer): tuple(indices) for layer, indices in layers.items()}
            for group, layers in document.expert_map.items()
        },
        files=_contents(document.files),
        hotkey=document.validator_hotkey if document.signature is not None else None,
    )


def _contradiction(document: _Document, version: str | None) -> str | None:
    """What is wrong with it, or None."""
    if not VERSION_FORM.fullmatch(document.model_version):
        return "its model_version is not a version"
    if version is not None and document.model_version != version:
        return f"it is of version {document.model_version}, asked for was {version}"
    if not 0 <= document.block_number <= MAX_NUMBER or not 0 <= document.sequence <= MAX_NUMBER:
        return "its numbers are out of range"
    for unit in document.units:
        if not _LABEL.fullmatch(unit.name):
            return f"{unit.name!r:.40} is not a unit"
        if not 0 < unit.size <= MAX_SIZE or not _CONTENT_HASH.fullmatch(unit.content_hash):
            return f"the size or the content_hash of {unit.name} is none"
    if len({unit.name for unit in document.units}) != len(document.units):
        return "it lists a unit twice"
    for group, layers in document.expert_map.items():
        if not _NUMBER.fullmatch(group) or not all(map(_NUMBER.fullmatch, layers)):
            return "the expert map has a group or a layer that is no number"
    if document.validator_hotkey is not None:
        try:
            decode_hotkey(document.validator_hotkey)
        except InvalidHotkey:
            return "its validator_hotkey is not a hotkey"
    return None


def _contents(files: list[_File]) -> dict[str, bytes]:
    """Name -> content. Raises BadSnapshot for a name that is not of the contract's form, and for a wrong content."""
    found: dict[str, bytes] = {}
    left = MAX_FILES
    for file in files:
        if not FILE_NAME.fullmatch(file.name) or file.name in found:
            raise BadSnapshot(f"the peer's snapshot names a file {file.name!r:.120}, which is refused")
        try:
            content = base64.b64decode(file.content, validate=True)
        except (binascii.Error, ValueError):
            raise BadSnapshot(f"the content of {file.name} in the peer's snapshot is not base64") from None
        left -= len(content)
        if left < 0:
            raise BadSnapshot(f"the small files of the peer's snapshot have more than {MAX_FILES} bytes")
        if len(content) != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
            raise BadSnapshot(f"{file.name} in the peer's snapshot has another size or SHA-256 than it says")
        found[file.name] = content
    return found
