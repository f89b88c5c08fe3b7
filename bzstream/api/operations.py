"""Every endpoint in one table. What is routed and what /openapi.json says are made from the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bzstream.api.schemas import (
    AcceptedBody,
    DuplicateBody,
    ErrorBody,
    HealthBody,
    InvalidSignatureBody,
    ManifestBody,
    ModelBody,
    ScoresBody,
    SnapshotBody,
    SubmissionBody,
    SubmissionStatusBody,
)

__all__ = ["OPERATIONS", "Operation", "Parameter"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One request parameter, as OpenAPI describes it."""

    name: str
    where: Literal["header", "query", "path"]
    schema: dict[str, Any]
    text: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One endpoint. `name` is the key of its `Endpoint` in the table that `app.py` makes."""

    name: str
    method: Literal["GET", "POST"] = "GET"
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
    validators: bool = False
    """For hotkeys that the chain lists as validators."""
    limited: bool = True
    """False: answered even when the worker is full, draining or the caller has too many connections."""
    ranges: bool = False
    """Honours conditions and ranges: answers 206, 304, 412 and 416 too."""
    response_headers: tuple[str, ...] = ()


_TEXT = {"type": "string"}
_SS58 = {"type": "string", "format": "ss58", "pattern": "^5[1-9A-HJ-NP-Za-km-z]{47}$"}
_CLAIM = Parameter("X-Hotkey", "header", _SS58, "SS58 address of the caller's hotkey: a claim")
_HOTKEY = Parameter("X-Hotkey", "header", _SS58, "SS58 address of the caller's hotkey: a claim", required=True)
_GROUP_SCHEMA = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})$"}
_ROUND_SCHEMA = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,15})$"}
_GROUP = Parameter("X-Expert-Group", "header", _GROUP_SCHEMA, "Expert group, a whole number", required=True)
_CHOICE = (
    Parameter(
        "format",
        "query",
        {"type": "string", "enum": ["safetensors"]},
        "Send the payload alone, without the envelope",
    ),
    Parameter("version", "query", _TEXT, "One of the retained versions; default: the current"),
)
_CONDITIONS = (
    Parameter("Range", "header", _TEXT, "`bytes=...`, RFC 9110 14.2; a malformed one is ignored"),
    Parameter("If-Range", "header", _TEXT, "ETag or date under which the range still holds"),
    Parameter("If-None-Match", "header", _TEXT, "ETags that the caller has"),
    Parameter("If-Modified-Since", "header", _TEXT, "HTTP date"),
)
_UNIT_HEADERS = (
    *("ETag", "Last-Modified", "Accept-Ranges", "Content-Length", "Cache-Control"),
    *("X-Block-Number", "X-Model-Version", "X-Content-Hash"),
)
_UNKNOWN = {404: ErrorBody}


_CODING = (
    Parameter("coding", "query", {**_TEXT, "minLength": 1}, "Name of a coding that the manifest lists", required=True),
    Parameter(
        "base",
        "query",
        {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        "Content hash of the version that the coding is a difference to; left out for one that stands alone",
    ),
)


def _get(name: str, path: str, summary: str, answer: type | str, *parameters: Parameter, **more: Any) -> Operation:
    return Operation(name=name, path=path, summary=summary, answers={200: answer}, parameters=parameters, **more)


def _unit(kind: str, text: str, *who: Parameter) -> tuple[Operation, Operation]:
    """A unit and its manifest. `who`: the parameters that say who asks, and for which group; validators need not."""
    group = ("X-Expert-Group", "Vary") if _GROUP in who else ()
    validators = _HOTKEY not in who
    download = _get(
        kind,
        f"/model/{kind}",
        text,
        "application/octet-stream",
        *(*who, *_CHOICE, *_CONDITIONS),
        errors=_UNKNOWN,
        validators=validators,
        ranges=True,
        response_headers=(*_UNIT_HEADERS, *group),
    )
    manifest = _get(
        f"{kind}_manifest",
        f"/model/{kind}/manifest",
        f"{text}: its chunk hashes",
        ManifestBody,
        *(*who, *_CHOICE),
        errors=_UNKNOWN,
        validators=validators,
    )
    return download, manifest


def _coded(kind: str, text: str, *who: Parameter) -> Operation:
    """The coded form of a unit, as `_unit`."""
    return replace(
        _unit(kind, text, *who)[0],
        name=f"{kind}_coded",
        path=f"/model/{kind}/coded",
        summary=f"{text}, coded: fewer bytes (docs/coding.md)",
        parameters=(*who, *_CODING, *_CHOICE[1:], *_CONDITIONS),
    )


OPERATIONS: tuple[Operation, ...] = (
    *_unit("partial", "One expert group's slice", _GROUP, _HOTKEY),
    *_unit("shared", "The tensors that belong to no expert", _HOTKEY),
    _coded("partial", "One expert group's slice", _GROUP, _HOTKEY),
    _coded("shared", "The tensors that belong to no expert", _HOTKEY),
    *_unit("ungrouped", "The experts of no group, for validators", _CLAIM),
    _coded("ungrouped", "The experts of no group, for validators", _CLAIM),
    *_unit("full", "The whole model as one safetensors file, for validators", _CLAIM),
    _get(
        "snapshot",
        "/model/snapshot",
        "What another validator needs, beside the units' bytes, to hold the same snapshot",
        SnapshotBody,
        *(_CLAIM, _CHOICE[1]),
        errors=_UNKNOWN,
        validators=True,
    ),
    _get("index", "/model", "Current and retained versions with every unit's size and hashes", ModelBody, _CLAIM),
    Operation(
        name="submit",
        method="POST",
        path="/submit",
        summary="Submit a trained checkpoint, in the submit phase",
        answers={202: AcceptedBody},
        errors={400: InvalidSignatureBody, 409: DuplicateBody, 423: ErrorBody},
        parameters=(_CLAIM,),
        body=SubmissionBody,
    ),
    _get(
        "submission",
        "/submissions/{submission_id}",
        "What became of a submission",
        SubmissionStatusBody,
        Parameter("submission_id", "path", {"type": "string", "format": "uuid"}, required=True),
        _CLAIM,
        errors=_UNKNOWN,
    ),
    _get(
        "scores",
        "/scores",
        "The scores of the latest round with results, or of another",
        ScoresBody,
        Parameter("round", "query", _ROUND_SCHEMA, "First block of the round's submit phase"),
        _CLAIM,
        errors=_UNKNOWN,
    ),
    _get("health", "/health", "How the node is", HealthBody, public=True, limited=False),
    _get(
        "ready",
        "/ready",
        "Whether this worker can serve downloads and take submissions in their phase",
        HealthBody,
        errors={503: HealthBody},
        public=True,
        limited=False,
    ),
    _get("openapi", "/openapi.json", "This document", "application/json", public=True),
)
