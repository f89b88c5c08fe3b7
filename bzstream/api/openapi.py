"""GET /openapi.json: OpenAPI 3.1, made from the table of operations and the types that responses are encoded from."""

from __future__ import annotations

from typing import Any

import msgspec

from bzstream.api.operations import OPERATIONS, Operation, Parameter
from bzstream.api.schemas import ErrorBody
from bzstream.http import PHRASES

__all__ = ["document"]

_REF = "#/components/schemas/{name}"
_DESCRIPTION = """\
Every response of status 400 and above is JSON `{"detail", "code"}` (but of /ready); validation failures are 400.
Without a good token every path but the public ones answers 401, unknown paths too; then come 404, and 405 with `Allow`.
"""

_FRAMING = (400, 408, 413, 417, 431, 505)
"""Any request can be refused with these before an endpoint sees it."""
_IDENTITY = (401, 403)
"""Any request that needs a token can be refused with these, too."""
_LOAD = (429, 503)
"""And any limited one with these: its caller has too many connections, or the worker is full, draining or empty."""

_TEXT = {"type": "string"}
_ERROR_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"const": "Bearer"}},
    416: {"Content-Range": {"type": "string", "pattern": "^bytes \\*/[0-9]+$"}},
    429: {"Retry-After": {"type": "integer", "minimum": 1}},
    503: {"Retry-After": {"type": "integer", "minimum": 1}},
}
"""Status -> the header fields that its responses always have, beside those of every response."""


def document(version: str) -> dict[str, Any]:
    """The OpenAPI document; `version` is the package's."""
    used: set[type] = {ErrorBody}
    for op in OPERATIONS:
        used |= {t for t in (*op.answers.values(), *op.errors.values(), op.body) if isinstance(t, type)}
    ordered = sorted(used, key=lambda t: t.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    paths: dict[str, Any] = {}
    refusals: dict[str, Any] = {}
    for operation in OPERATIONS:
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _describe(operation, operation.name, refusals)
        if operation.method == "GET":
            item["head"] = _describe(operation, f"{operation.name}_head", refusals, head=True)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bzstream",
            "version": version,
            "summary": "The validator's node: model distribution, checkpoint submission, health",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": refusals,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _describe(operation: Operation, name: str, refusals: dict[str, Any], *, head: bool = False) -> dict[str, Any]:
    """One operation. Responses that many have in common go into `refusals`, by name, and are referred to."""
    responses: dict[int, Any] = {}
    headers = dict.fromkeys(operation.response_headers, _TEXT)
    for status, answer in operation.answers.items():
        responses[status] = _answer(status, answer, headers, head=head)
    if operation.ranges:
        responses[304] = {"description": PHRASES[304], "headers": _headers({"ETag": _TEXT, "Cache-Control": _TEXT})}
        if not head:
            responses[206] = _answer(206, "application/octet-stream", headers)
            responses[206]["headers"]["Content-Range"] = {"schema": _TEXT, "description": "Of a single range"}
            responses[206]["content"]["multipart/byteranges"] = {}
    for status, error in _errors(operation, head=head).items():
        shared = f"{error.__name__}{status}{'Head' if head else ''}"
        refusals[shared] = _answer(status, error, _ERROR_HEADERS.get(status, {}), head=head)
        responses[status] = {"$ref": f"#/components/responses/{shared}"}
    described: dict[str, Any] = {
        "operationId": name,
        "summary": operation.summary,
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    parameters = [p for p in operation.parameters if not (head and p.name in ("Range", "If-Range"))]
    if parameters:
        described["parameters"] = [_parameter(p) for p in parameters]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(operation.body)}}}
    if operation.public:
        described["security"] = []
    return described


def _errors(operation: Operation, *, head: bool) -> dict[int, type]:
    """Every status from 400 on that the operation can answer with, and the type of its body."""
    statuses = [*_FRAMING]
    if not operation.public:
        statuses += _IDENTITY
    if operation.limited:
        statuses += _LOAD
    if operation.ranges:
        statuses += [412] if head else [412, 416]
    common: dict[int, type] = dict.fromkeys(statuses, ErrorBody)
    return common | dict(operation.errors)


def _answer(status: int, answer: type | str, headers: dict[str, Any], *, head: bool = False) -> dict[str, Any]:
    described: dict[str, Any] = {"description": PHRASES[status]}
    if headers:
        described["headers"] = _headers(headers)
    if not head:
        described["content"] = (
            {answer: {}} if isinstance(answer, str) else {"application/json": {"schema": _ref(answer)}}
        )
    return described


def _headers(schemas: dict[str, Any]) -> dict[str, Any]:
    return {name: {"required": True, "schema": schema} for name, schema in schemas.items()}


def _ref(type_: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=type_.__name__)}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "schema": parameter.schema,
    }
    if parameter.text:
        described["description"] = parameter.text
    return described
