"""The endpoints that hand out the model: units, their coded forms, their manifests, and the index of versions.

Checks are made in the contract's order. `check` refuses with 400 for headers or query; `app.py` adds what every
endpoint with a token refuses (400, 403). `handle` refuses with 503 while nothing is published, 404 for an unknown
group, version or coding, and 503 for a unit whose file was damaged on disk. Conditions and ranges are left to the HTTP
core. All of it runs on the worker's event loop and answers from memory.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from functools import partial

from bzstream.api.schemas import ModelBody, UnitEntry, VersionEntry
from bzstream.api.state import WorkerState, unavailable
from bzstream.http import Endpoint, HttpError, Representation, Request, Response
from bzstream.model import Snapshot, Unit
from bzstream.payload import Payload

__all__ = ["UNITS", "Downloads"]

UNITS = ("partial", "shared", "ungrouped", "full")
"""Kinds of units that have endpoints: `/model/<kind>` and `/model/<kind>/manifest`."""

CODED = ("partial", "shared", "ungrouped")
"""Kinds that have `/model/<kind>/coded` too."""

# X-Expert-Group = "0" / ( %x31-39 *8DIGIT ), ASCII digits only (the contract).
_GROUP = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)

_CONTENT_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)

_CACHE_CONTROL = ("Cache-Control", "no-cache, no-transform")
"""A cache must ask before it answers from a copy, and nothing on the way may re-encode tensors."""
_VARY = (("Vary", "X-Expert-Group"),)
"""One URL stands for every group's slice: a cache must keep them apart by the header that chooses (RFC 9110 12.5.5)."""


@dataclass(frozen=True, slots=True)
class _UnitRequest:
    """What a request for a unit or its manifest asks for."""

    kind: str
    group: int | None
    """Of kind "partial"."""
    version: str | None
    """None: the current one."""
    bare: bool
    """The payload alone, without the envelope."""
    coding: str = ""
    """The name of the coding that is asked for, if one is."""
    base: str | None = None
    """The content hash that it is a difference to; None: it stands alone."""


class Downloads:
    """The endpoints over one worker's state."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state

    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints by their operation's name."""
        found = {"index": Endpoint(self._index)}
        for kind in UNITS:
            check = partial(_read_unit_request, kind)
            found |= {kind: Endpoint(self._unit, check), f"{kind}_manifest": Endpoint(self._manifest, check)}
        for kind in CODED:
            found[f"{kind}_coded"] = Endpoint(self._coded, partial(_read_coded_request, kind))
        return found

    def _index(self, _: Request) -> Response:
        """Current and retained versions with every unit's size and hashes."""
        current = self._state.snapshot(None)
        versions = [_describe(snapshot) for snapshot in self._state.snapshots.versions()]
        body = ModelBody(self._state.settings.node.hotkey, current.version, versions)
        return Response.json(body, headers=(_CACHE_CONTROL,))

    def _unit(self, wanted: _UnitRequest) -> Representation:
        snapshot, unit = self._select(wanted)
        if wanted.bare:
            return _represent(snapshot, unit, unit.payload, unit.etag)
        return _represent(snapshot, unit, unit.enveloped, unit.etag_enveloped)

    def _coded(self, wanted: _UnitRequest) -> Representation:
        snapshot, unit = self._select(wanted)
        coded = unit.codings.get((wanted.coding, wanted.base))
        if coded is None:
            raise HttpError(404, "unknown_coding", "this unit has no such coding; its manifest lists those that it has")
        if not coded.payload.intact():
            raise unavailable("coding_damaged", "the coded file was damaged on the server; take the unit as it is")
        return _represent(snapshot, unit, coded.payload, coded.etag)

    def _manifest(self, wanted: _UnitRequest) -> Response:
        _, unit = self._select(wanted)
        vary = () if unit.group is None else _VARY
        return Response(200, (("Content-Type", "application/json"), _CACHE_CONTROL, *vary), unit.manifest)

    def _select(self, wanted: _UnitRequest) -> tuple[Snapshot, Unit]:
        """The unit that is wanted and its version. Raises HttpError 503 and 404."""
        snapshot = self._state.snapshot(wanted.version)
        unit = snapshot.units.get(wanted.kind if wanted.group is None else f"{wanted.kind}/{wanted.group}")
        if unit is None and wanted.group is None:
            raise HttpError(404, "unknown_unit", "every expert of this model is in a group; there is no such unit")
        if unit is None:
            raise HttpError(
                404, "unknown_group", f"there is no expert group {wanted.group}; see GET /model for those that are"
            )
        if not unit.intact():
            raise unavailable("unit_damaged", "this unit's file was damaged on the server; try again later")
        return snapshot, unit


def _read_unit_request(kind: str, request: Request) -> _UnitRequest:
    """What the head of a request asks for. Raises HttpError 400."""
    group = _group(request) if kind == "partial" else None
    if kind in ("partial", "shared") and "x-hotkey" not in request.headers:
        raise HttpError(400, "invalid_hotkey", "X-Hotkey is missing; send the SS58 address of your hotkey")
    form = request.query.get("format")
    if form not in (None, "safetensors"):
        raise HttpError(400, "invalid_format", "format can be safetensors, or left out for the enveloped slice")
    return _UnitRequest(kind, group, request.query.get("version"), bare=form is not None or kind == "full")


def _group(request: Request) -> int:
    values = request.headers.all("x-expert-group")
    if len(values) != 1 or not _GROUP.fullmatch(values[0]):
        what = "is missing" if not values else "is repeated" if len(values) > 1 else "is not a group number"
        raise HttpError(400, "invalid_expert_group", f"X-Expert-Group {what}; send one whole number such as 0")
    return int(values[0])


def _read_coded_request(kind: str, request: Request) -> _UnitRequest:
    """As `_read_unit_request`, and which coding. Raises HttpError 400."""
    wanted = _read_unit_request(kind, request)
    coding, base = request.query.get("coding"), request.query.get("base")
    if not coding:
        raise HttpError(400, "invalid_coding", "the query lacks `coding`; name one that the unit's manifest lists")
    if base and not _CONTENT_HASH.fullmatch(base):
        raise HttpError(400, "invalid_base", "base is the content hash of another version of the unit: sha256:<64 hex>")
    return replace(wanted, coding=coding, base=base or None)


def _represent(snapshot: Snapshot, unit: Unit, payload: Payload, etag: str) -> Representation:
    return Representation(
        payload=payload,
        etag=etag,
        last_modified=snapshot.activated_at,
        headers=(
            *(() if unit.group is None else (("X-Expert-Group", str(unit.group)), *_VARY)),
            ("X-Block-Number", str(snapshot.block)),
            ("X-Model-Version", snapshot.version),
            ("X-Content-Hash", unit.content_hash),
            _CACHE_CONTROL,
        ),
        label=unit.label,
    )


def _describe(snapshot: Snapshot) -> VersionEntry:
    units = [
        UnitEntry(unit.kind, unit.group, unit.size, unit.content_hash, unit.etag, unit.etag_enveloped)
        for unit in snapshot.units.values()
    ]
    published = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(snapshot.published_at))
    return VersionEntry(snapshot.version, snapshot.block, published, snapshot.signed, units)
