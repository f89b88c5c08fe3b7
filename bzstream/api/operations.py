"""Every endpoint in one table: what is routed and what /openapi.json says are made from the same rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from bzstream.api.documents import (
    Accepted,
    Health,
    Manifest,
    ModelIndex,
    Scores,
    SubmissionBody,
    SubmissionStatus,
)
from bzstream.http import Request, Result

__all__ = ["OPERATIONS", "Handler", "Operation", "Parameter"]

Handler = Callable[[Request], Result | Awaitable[Result]]


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
    """One endpoint. `name` is the handler's name in the table that `app.py` fills."""

    name: str
    method: Literal["GET", "POST"]
    path: str
    summary: str
    answers: dict[int, type | str]
    """Status -> type of its JSON body, or a media type; the errors beside them are `errors`."""
    errors: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    body: type | None = None
    public: bool = False
    ranges: bool = False
    """Answers 206, 304, 412 and 416 too."""
    response_headers: tuple[str, ...] = field(default=())


_GROUP = Parameter(
    "X-Expert-Group",
    "header",
    {"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})$"},
    required=True,
    text="Expert group, a whole number",
)
_SS58 = {"type": "string", "pattern": "^[1-9A-HJ-NP-Za-km-z]{46,48}$"}
_HOTKEY = Parameter("X-Hotkey", "header", _SS58, required=True, text="SS58 address of the caller's hotkey: a claim")
_CLAIM = Parameter("X-Hotkey", "header", _SS58, text="SS58 address of the caller's hotkey: a claim")
_FORMAT = Parameter(
    "format", "query", {"type": "string", "enum": ["safetensors"]}, text="Send the payload alone, without the envelope"
)
_VERSION = Parameter("version", "query", {"type": "string"}, text="One of the retained versions; default: the current")
_UNIT_HEADERS = ("ETag", "Last-Modified", "Accept-Ranges", "X-Block-Number", "X-Model-Version", "X-Content-Hash")
_OCTETS = "application/octet-stream"
_DOWNLOAD_ERRORS = (400, 401, 403, 404, 429, 503)

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "partial",
        "GET",
        "/model/partial",
        "One expert group's slice",
        {200: _OCTETS},
        _DOWNLOAD_ERRORS,
        (_GROUP, _HOTKEY, _FORMAT, _VERSION),
        ranges=True,
        response_headers=(*_UNIT_HEADERS, "X-Expert-Group"),
    ),
    Operation(
        "shared",
        "GET",
        "/model/shared",
        "The tensors that belong to no expert",
        {200: _OCTETS},
        _DOWNLOAD_ERRORS,
        (_HOTKEY, _FORMAT, _VERSION),
        ranges=True,
        response_headers=_UNIT_HEADERS,
    ),
    Operation(
        "full",
        "GET",
        "/model/full",
        "The whole model as one safetensors file, for validators",
        {200: _OCTETS},
        _DOWNLOAD_ERRORS,
        (_CLAIM, _FORMAT, _VERSION),
        ranges=True,
        response_headers=_UNIT_HEADERS,
    ),
    Operation(
        "partial_manifest",
        "GET",
        "/model/partial/manifest",
        "The chunk hashes of a group's slice",
        {200: Manifest},
        _DOWNLOAD_ERRORS,
        (_GROUP, _HOTKEY, _FORMAT, _VERSION),
    ),
    Operation(
        "shared_manifest",
        "GET",
        "/model/shared/manifest",
        "The chunk hashes of the shared tensors",
        {200: Manifest},
        _DOWNLOAD_ERRORS,
        (_HOTKEY, _FORMAT, _VERSION),
    ),
    Operation(
        "full_manifest",
        "GET",
        "/model/full/manifest",
        "The chunk hashes of the whole model, for validators",
        {200: Manifest},
        _DOWNLOAD_ERRORS,
        (_CLAIM, _FORMAT, _VERSION),
    ),
    Operation(
        "index",
        "GET",
        "/model",
        "Current and retained versions with every unit's size and hashes",
        {200: ModelIndex},
        (400, 401, 403, 429, 503),
        (_CLAIM,),
    ),
    Operation(
        "submit",
        "POST",
        "/submit",
        "Submit a trained checkpoint, in the submit phase",
        {202: Accepted},
        (400, 401, 403, 408, 409, 413, 417, 423, 429, 503),
        (_CLAIM,),
        body=SubmissionBody,
    ),
    Operation(
        "submission",
        "GET",
        "/submissions/{submission_id}",
        "What became of a submission",
        {200: SubmissionStatus},
        (400, 401, 403, 404, 429, 503),
        (Parameter("submission_id", "path", {"type": "string", "format": "uuid"}, required=True), _CLAIM),
    ),
    Operation(
        "scores",
        "GET",
        "/scores",
        "The scores of the latest round with results, or of another",
        {200: Scores},
        (400, 401, 403, 404, 429, 503),
        (
            Parameter(
                "round", "query", {"type": "integer", "minimum": 0}, text="First block of the round's submit phase"
            ),
            _CLAIM,
        ),
    ),
    Operation("health", "GET", "/health", "Whether the node is well", {200: Health}, public=True),
    Operation("openapi", "GET", "/openapi.json", "This document", {200: "application/json"}, public=True),
)
