"""The endpoints that hand out the model: units, their manifests, and the index of versions.

Each of them makes its checks in the contract's order: 400 for headers, 403, 503 while nothing is published, 404 for an
unknown group or version, 503 for a unit whose file was damaged on disk. What is left, conditions and ranges, is the
HTTP core's.
"""

from __future__ import annotations

import re
import time
from typing import Literal

from bzstream.api.documents import ModelIndex, UnitEntry, VersionEntry
from bzstream.api.identity import Identity, authorise
from bzstream.api.view import RETRY_SOON, View
from bzstream.http import HttpError, Representation, Request, Response
from bzstream.model import Snapshot, Unit

__all__ = ["Downloads"]

Kind = Literal["partial", "shared", "full"]

# X-Expert-Group = "0" / ( %x31-39 *8DIGIT ), ASCII digits only (the contract).
_GROUP = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)

CACHE_CONTROL = ("Cache-Control", "no-cache, no-transform")
"""A cache must ask before it answers from a copy, and nothing on the way may re-encode tensors."""


class Downloads:
    """The handlers, over one worker's view."""

    def __init__(self, view: View) -> None:
        self._view = view

    def partial(self, request: Request) -> Representation:
        """One expert group's slice: envelope and payload, or with `?format=safetensors` the payload alone."""
        return self._send(request, "partial")

    def shared(self, request: Request) -> Representation:
        """The tensors that belong to no expert, in the same form."""
        return self._send(request, "shared")

    def full(self, request: Request) -> Representation:
        """The whole model as one safetensors file, for validators."""
        return self._send(request, "full")

    def partial_manifest(self, request: Request) -> Response:
        """The chunk hashes of a group's slice."""
        return self._manifest(request, "partial")

    def shared_manifest(self, request: Request) -> Response:
        return self._manifest(request, "shared")

    def full_manifest(self, request: Request) -> Response:
        return self._manifest(request, "full")

    def index(self, request: Request) -> Response:
        """Current and retained versions with every unit's size and hashes."""
        authorise(request, self._view.settings.auth, loopback=self._view.loopback)
        current = self._current()
        versions = [_entry(snapshot) for snapshot in self._view.library.versions()]
        return Response.json(ModelIndex(current.version, versions), headers=(CACHE_CONTROL,))

    def _send(self, request: Request, kind: Kind) -> Representation:
        snapshot, unit, bare = self._select(request, kind)
        group = (("X-Expert-Group", str(unit.group)),) if unit.group is not None else ()
        return Representation(
            payload=unit.payload if bare else unit.enveloped,
            etag=unit.etag if bare else unit.etag_enveloped,
            last_modified=snapshot.published_at,
            headers=(
                *group,
                ("X-Block-Number", str(snapshot.block)),
                ("X-Model-Version", snapshot.version),
                ("X-Content-Hash", unit.content_hash),
                CACHE_CONTROL,
            ),
            label=unit.label,
        )

    def _manifest(self, request: Request, kind: Kind) -> Response:
        _, unit, _ = self._select(request, kind)
        return Response(200, (("Content-Type", "application/json"), CACHE_CONTROL), unit.manifest)

    def _select(self, request: Request, kind: Kind) -> tuple[Snapshot, Unit, bool]:
        """The unit that the request asks for, and whether it wants the payload alone."""
        group = _group(request) if kind == "partial" else None
        if kind != "full" and "x-hotkey" not in request.headers:
            raise HttpError(400, "invalid_hotkey", "X-Hotkey is missing; send the SS58 address of your hotkey")
        bare = _bare(request) or kind == "full"
        version = request.query.get("version")
        identity = authorise(request, self._view.settings.auth, loopback=self._view.loopback)
        if kind == "full":
            self._require_validator(identity)
        snapshot = self._current()
        if version is not None:
            found = self._view.library.get(version)
            if found is None:
                raise HttpError(
                    404, "unknown_version", "this version is not kept here; see GET /model for those that are"
                )
            snapshot = found
        unit = snapshot.full if kind == "full" else snapshot.shared if group is None else snapshot.partial(group)
        if unit is None:
            raise HttpError(
                404, "unknown_group", f"there is no expert group {group}; see GET /model for those that are"
            )
        if not unit.intact():
            raise HttpError(
                503, "unit_damaged", "this unit's file was damaged on the server; try again later", RETRY_SOON
            )
        return snapshot, unit, bare

    def _current(self) -> Snapshot:
        snapshot = self._view.library.current
        if snapshot is None:
            raise HttpError(503, "model_not_loaded", "no model is published yet; try again later", RETRY_SOON)
        return snapshot

    def _require_validator(self, identity: Identity) -> None:
        hotkey = identity.hotkey
        if hotkey is None and self._view.settings.auth.trust_claimed_hotkey:
            hotkey = identity.claimed
        if hotkey is None:
            raise HttpError(
                403, "validators_only", "the full model is for validators; use a token bound to your hotkey or sign"
            )
        if self._view.chain is None:
            raise HttpError(503, "chain_unknown", "the chain is not known yet; try again later", RETRY_SOON)
        if not self._view.chain.is_validator(hotkey):
            raise HttpError(403, "validators_only", "the chain does not list this hotkey as a validator")


def _group(request: Request) -> int:
    values = request.headers.all("x-expert-group")
    if len(values) != 1 or not _GROUP.fullmatch(values[0]):
        what = "is missing" if not values else "is repeated" if len(values) > 1 else "is not a group number"
        raise HttpError(400, "invalid_expert_group", f"X-Expert-Group {what}; send one whole number such as 0")
    return int(values[0])


def _bare(request: Request) -> bool:
    form = request.query.get("format")
    if form not in (None, "safetensors"):
        raise HttpError(400, "invalid_format", "format can be safetensors, or left out for the enveloped slice")
    return form is not None


def _entry(snapshot: Snapshot) -> VersionEntry:
    units = [
        UnitEntry(
            unit=unit.kind,
            expert_group=unit.group,
            size=unit.size,
            content_hash=unit.content_hash,
            etag=unit.etag,
            etag_enveloped=unit.etag_enveloped,
        )
        for unit in snapshot.units.values()
    ]
    published = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(snapshot.published_at))
    return VersionEntry(snapshot.version, snapshot.block, published, units)
