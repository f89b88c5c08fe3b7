"""The endpoints that hand out the model: units, their manifests, and the index of versions.

Checks are made in the contract's order. `check` refuses with 400 for headers or query and with 403. `handle` refuses
with 503 while the chain is not known or nothing is published, 404 for an unknown group or version, and 503 for a unit
whose file was damaged on disk. Conditions and ranges are left to the HTTP core.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from bzstream.api.documents import ModelIndex, UnitEntry, VersionEntry
from bzstream.api.identity import Identity, authorise
from bzstream.api.view import RETRY_SOON, View
from bzstream.http import Endpoint, HttpError, Representation, Request, Response
from bzstream.model import Snapshot, Unit

__all__ = ["Downloads"]

Kind = Literal["partial", "shared", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# X-Expert-Group = "0" / ( %x31-39 *8DIGIT ), ASCII digits only (the contract).
_GROUP = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)

CACHE_CONTROL = ("Cache-Control", "no-cache, no-transform")
"""A cache must ask before it answers from a copy, and nothing on the way may re-encode tensors."""


@dataclass(frozen=True, slots=True)
class _UnitRequest:
    """A request for a unit that may be answered, as far as its head tells."""

    kind: Kind
    group: int | None
    """Of kind "partial"."""
    version: str | None
    """None: the current one."""
    bare: bool
    """The payload alone, without the envelope."""
    undecided: bool
    """Only validators may have it, and the chain that would list them is not known."""


class Downloads:
    """The endpoints over one worker's view."""

    def __init__(self, view: View) -> None:
        self._view = view

    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints by their operation's name."""
        found = {"index": Endpoint(self._index, self._check_index)}
        for kind in KINDS:
            check = partial(self._check_unit, kind)
            found |= {kind: Endpoint(self._unit, check), f"{kind}_manifest": Endpoint(self._manifest, check)}
        return found

    def _check_index(self, request: Request) -> None:
        authorise(request, self._view.settings.auth, loopback=self._view.loopback)

    def _check_unit(self, kind: Kind, request: Request) -> _UnitRequest:
        """What a request for a unit or its manifest asks for. Raises HttpError 400 and 403."""
        group = _group(request) if kind == "partial" else None
        if kind != "full" and "x-hotkey" not in request.headers:
            raise HttpError(400, "invalid_hotkey", "X-Hotkey is missing; send the SS58 address of your hotkey")
        bare = _bare(request) or kind == "full"
        version = request.query.get("version")
        identity = authorise(request, self._view.settings.auth, loopback=self._view.loopback)
        undecided = kind == "full" and not self._is_validator(identity)
        return _UnitRequest(kind, group, version, bare, undecided)

    def _index(self, _: None) -> Response:
        """Current and retained versions with every unit's size and hashes."""
        current = self._current()
        versions = [_entry(snapshot) for snapshot in self._view.library.versions()]
        return Response.json(ModelIndex(current.version, versions), headers=(CACHE_CONTROL,))

    def _unit(self, wanted: _UnitRequest) -> Representation:
        snapshot, unit = self._select(wanted)
        group = (("X-Expert-Group", str(unit.group)),) if unit.group is not None else ()
        return Representation(
            payload=unit.payload if wanted.bare else unit.enveloped,
            etag=unit.etag if wanted.bare else unit.etag_enveloped,
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

    def _manifest(self, wanted: _UnitRequest) -> Response:
        _, unit = self._select(wanted)
        return Response(200, (("Content-Type", "application/json"), CACHE_CONTROL), unit.manifest)

    def _select(self, wanted: _UnitRequest) -> tuple[Snapshot, Unit]:
        """The unit that is wanted and its version. Raises HttpError 503 and 404."""
        if wanted.undecided:
            raise HttpError(503, "chain_unknown", "the chain is not known yet; try again later", RETRY_SOON)
        snapshot = self._current()
        if wanted.version is not None:
            found = self._view.library.get(wanted.version)
            if found is None:
                raise HttpError(
                    404, "unknown_version", "this version is not kept here; see GET /model for those that are"
                )
            snapshot = found
        group = wanted.group
        unit = snapshot.full if wanted.kind == "full" else snapshot.shared if group is None else snapshot.partial(group)
        if unit is None:
            raise HttpError(
                404, "unknown_group", f"there is no expert group {group}; see GET /model for those that are"
            )
        if not unit.intact():
            raise HttpError(
                503, "unit_damaged", "this unit's file was damaged on the server; try again later", RETRY_SOON
            )
        return snapshot, unit

    def _current(self) -> Snapshot:
        snapshot = self._view.library.current
        if snapshot is None:
            raise HttpError(503, "model_not_loaded", "no model is published yet; try again later", RETRY_SOON)
        return snapshot

    def _is_validator(self, identity: Identity) -> bool:
        """True: the chain lists the caller as a validator. False: the chain is not known. Raises HttpError 403."""
        hotkey = identity.hotkey
        if hotkey is None and self._view.settings.auth.trust_claimed_hotkey:
            hotkey = identity.claimed
        if hotkey is None:
            raise HttpError(
                403, "validators_only", "the full model is for validators; use a token bound to your hotkey or sign"
            )
        if self._view.chain is None:
            return False
        if not self._view.chain.is_validator(hotkey):
            raise HttpError(403, "validators_only", "the chain does not list this hotkey as a validator")
        return True


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
