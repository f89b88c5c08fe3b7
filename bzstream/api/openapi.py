"""GET /openapi.json: OpenAPI 3.1, made from the table of operations and the types that the answers are encoded from."""

from __future__ import annotations

from typing import Any

import msgspec

from bzstream.api.documents import ErrorBody
from bzstream.api.operations import OPERATIONS, Operation, Parameter
from bzstream.http.messages import PHRASES

__all__ = ["document"]

_REF = "#/components/schemas/{name}"


def document(version: str) -> dict[str, Any]:
    """The OpenAPI document; `version` is the package's."""
    types = {t for op in OPERATIONS for t in (*op.answers.values(), op.body) if isinstance(t, type)} | {ErrorBody}
    ordered = sorted(types, key=lambda t: t.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _describe(operation, operation.name)
        if operation.method == "GET":
            item["head"] = _describe(operation, f"{operation.name}_head", head=True)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bzstream",
            "version": version,
            "summary": "The validator's node: model distribution, checkpoint submission, health",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _describe(operation: Operation, name: str, *, head: bool = False) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        responses[str(status)] = _answer(status, answer, operation.response_headers, head=head)
    if operation.ranges:
        if not head:
            responses["206"] = _answer(206, "application/octet-stream", operation.response_headers)
            responses["206"]["content"]["multipart/byteranges"] = {}
            responses["416"] = _answer(416, ErrorBody)
        responses["304"] = {"description": PHRASES[304]}
        responses["412"] = _answer(412, ErrorBody, head=head)
    for status in operation.errors:
        responses[str(status)] = _answer(status, ErrorBody, head=head)
    described: dict[str, Any] = {
        "operationId": name,
        "summary": operation.summary,
        "responses": dict(sorted(responses.items())),
    }
    if operation.parameters:
        described["parameters"] = [_parameter(p) for p in operation.parameters]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(operation.body)}}}
    if operation.public:
        described["security"] = []
    return described


def _answer(status: int, answer: type | str, headers: tuple[str, ...] = (), *, head: bool = False) -> dict[str, Any]:
    described: dict[str, Any] = {"description": PHRASES[status]}
    if headers:
        described["headers"] = {name: {"schema": {"type": "string"}} for name in headers}
    if not head:
        described["content"] = (
            {answer: {}} if isinstance(answer, str) else {"application/json": {"schema": _ref(answer)}}
        )
    return described


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
