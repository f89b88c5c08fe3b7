"""Every endpoint in one table: what is routed and what /openapi.json says are made from the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bzstream.api.documents import (
    Accepted,
    DuplicateBody,
    ErrorBody,
    Health,
    Manifest,
    ModelIndex,
    Scores,
    SubmissionBody,
    SubmissionStatus,
)

__all__ = ["OPERATIONS", "Operation", "Parameter"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One request parameter, as OpenAPI describes it."""

    name: str
    where: Literal["header", "query", "path"]
    schema: dict[str, Any]
    required: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. `name` is the key of its `Endpoint` in the table that `app.py` fills."""

    name: str
    method: Literal["GET", "POST"]
    path: str
    summary: str
    answers: Mapping[int, type | str]
    """Status -> type of its JSON body, or a media type."""
    errors: Mapping[int, type] = field(default_factory=dict)
    """Refusals of its own, beside those of every endpoint (framing, limits) and of every one that needs a token."""
    parameters: tuple[Parameter, ...] = ()
    body: type | None = None
    public: bool = False
    """Needs no token."""
    limited: bool = True
    """False: answered even when the worker is full, draining or the caller has too many connections."""
    ranges: bool = False
    """Honours conditions and ranges: answers 206, 304, 412 and 416 too."""
    response_headers: tuple[str, ...] = ()


_GROUP = Parameter(
    "X-Expert-Group",
    "header",
    {"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})$"},
    required=True,
    text="Expert group, a whole number",
)
_SS58 = {"type": "string", "format": "ss58", "pattern": "^5[1-9A-HJ-NP-Za-km-z]{47}$"}
_HOTKEY = Parameter("X-Hotkey", "header", _SS58, required=True, text="SS58 address of the caller's hotkey: a claim")
_CLAIM = Parameter("X-Hotkey", "header", _SS58, text="SS58 address of the caller's hotkey: a claim")
_FORMAT = Parameter(
    "format", "query", {"type": "string", "enum": ["safetensors"]}, text="Send the payload alone, without the envelope"
)
_VERSION = Parameter("version", "query", {"type": "string"}, text="One of the retained versions; default: the current")
_CONDITIONS = (
    Parameter("Range", "header", {"type": "string"}, text="`bytes=...`, RFC 9110 14.2; a malformed one is ignored"),
    Parameter("If-Range", "header", {"type": "string"}, text="ETag or date under which the range still holds"),
    Parameter("If-None-Match", "header", {"type": "string"}, text="ETags that the caller has"),
    Parameter("If-Modified-Since", "header", {"type": "string"}, text="HTTP date"),
)
_UNIT_HEADERS = (
    *("ETag", "Last-Modified", "Accept-Ranges", "Content-Length", "Cache-Control"),
    *("X-Block-Number", "X-Model-Version", "X-Content-Hash"),
)
_OCTETS = "application/octet-stream"
_UNKNOWN = {404: ErrorBody}

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "partial",
        "GET",
        "/model/partial",
        "One expert group's slice",
        {200: _OCTETS},
        _UNKNOWN,
        (_GROUP, _HOTKEY, _FORMAT, _VERSION, *_CONDITIONS),
        ranges=True,
        response_headers=(*_UNIT_HEADERS, "X-Expert-Group"),
    ),
    Operation(
        "shared",
        "GET",
        "/model/shared",
        "The tensors that belong to no expert",
        {200: _OCTETS},
        _UNKNOWN,
        (_HOTKEY, _FORMAT, _VERSION, *_CONDITIONS),
        ranges=True,
        response_headers=_UNIT_HEADERS,
    ),
    Operation(
        "full",
        "GET",
        "/model/full",
        "The whole model as one safetensors file, for validators",
        {200: _OCTETS},
        _UNKNOWN,
        (_CLAIM, _FORMAT, _VERSION, *_CONDITIONS),
        ranges=True,
        response_headers=_UNIT_HEADERS,
    ),
    Operation(
        "partial_manifest",
        "GET",
        "/model/partial/manifest",
        "The chunk hashes of a group's slice",
        {200: Manifest},
        _UNKNOWN,
        (_GROUP, _HOTKEY, _FORMAT, _VERSION),
    ),
    Operation(
        "shared_manifest",
        "GET",
        "/model/shared/manifest",
        "The chunk hashes of the shared tensors",
        {200: Manifest},
        _UNKNOWN,
        (_HOTKEY, _FORMAT, _VERSION),
    ),
    Operation(
        "full_manifest",
        "GET",
        "/model/full/manifest",
        "The chunk hashes of the whole model, for validators",
        {200: Manifest},
        _UNKNOWN,
        (_CLAIM, _FORMAT, _VERSION),
    ),
    Operation(
        "index",
        "GET",
        "/model",
        "Current and retained versions with every unit's size and hashes",
        {200: ModelIndex},
        parameters=(_CLAIM,),
    ),
    Operation(
        "submit",
        "POST",
        "/submit",
        "Submit a trained checkpoint, in the submit phase",
        {202: Accepted},
        {409: DuplicateBody, 423: ErrorBody},
        (_CLAIM,),
        body=SubmissionBody,
    ),
    Operation(
        "submission",
        "GET",
        "/submissions/{submission_id}",
        "What became of a submission",
        {200: SubmissionStatus},
        _UNKNOWN,
        (Parameter("submission_id", "path", {"type": "string", "format": "uuid"}, required=True), _CLAIM),
    ),
    Operation(
        "scores",
        "GET",
        "/scores",
        "The scores of the latest round with results, or of another",
        {200: Scores},
        _UNKNOWN,
        (
            Parameter(
                "round",
                "query",
                {"type": "string", "pattern": "^(0|[1-9][0-9]{0,15})$"},
                text="First block of the round's submit phase",
            ),
            _CLAIM,
        ),
    ),
    Operation("health", "GET", "/health", "Whether the node is well", {200: Health}, public=True, limited=False),
    Operation("openapi", "GET", "/openapi.json", "This document", {200: "application/json"}, public=True),
)
