"""GET /model/snapshot: what another validator needs, beside the units' bytes, to hold the same snapshot.

The request is answered on the worker's event loop. The body, up to 22 MB, is made on a thread and kept for as long as
the same snapshot is asked for.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib

import msgspec

from bzstream.api.schemas import SnapshotBody, SnapshotFile, SnapshotUnit
from bzstream.api.state import WorkerState, unavailable
from bzstream.chain.keys import KeyUnavailable, load_key
from bzstream.http import Endpoint, Request, Response
from bzstream.model import Snapshot
from bzstream.model.record import FILES
from bzstream.model.small_files import MAX_FILES
from bzstream.util.files import read_small_file

__all__ = ["Peers"]


class Peers:
    """The endpoint over one worker's state."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._making = asyncio.Lock()
        self._made: tuple[Snapshot, Response] | None = None

    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoint by its operation's name."""
        return {"snapshot": Endpoint(self._snapshot, _read_version)}

    async def _snapshot(self, version: str | None) -> Response:
        snapshot = self._state.snapshot(version)
        async with self._making:
            if self._made is None or self._made[0] is not snapshot:
                try:
                    response = await asyncio.to_thread(_describe, snapshot, self._state.settings.node.wallet)
                except (OSError, KeyUnavailable):
                    detail = "this version's files or the node's key cannot be read on the server; try again later"
                    raise unavailable("snapshot_unavailable", detail) from None
                self._made = (snapshot, response)
            return self._made[1]


def _read_version(request: Request) -> str | None:
    """The version that is asked for; None: the current one."""
    return request.query.get("version")


def _describe(snapshot: Snapshot, wallet: str | None) -> Response:
    """The response for a snapshot, signed if there is a wallet, whose key is kept no longer than that takes.

    Raises OSError when a small file is not what was published, KeyUnavailable when the key cannot be read.
    """
    signer = None if wallet is None else load_key(wallet)
    groups = [unit for unit in snapshot.units.values() if unit.group is not None]
    body = SnapshotBody(
        model_version=snapshot.version,
        block_number=snapshot.block,
        sequence=snapshot.sequence,
        units=[SnapshotUnit(unit.label, unit.size, unit.content_hash) for unit in snapshot.units.values()],
        expert_map={
            str(unit.group): {str(layer): list(indices) for layer, indices in unit.experts.items()} for unit in groups
        },
        files=[_read_file(snapshot, file.name, file.sha256) for file in snapshot.files],
        validator_hotkey=None if signer is None else signer.ss58_address,
        signature=None,
    )
    if signer is not None:
        fields = msgspec.to_builtins(body)
        del fields["signature"]
        body = msgspec.structs.replace(body, signature=signer.sign_fields(fields))
    return Response.json(body, headers=(("Cache-Control", "no-cache, no-transform"),))


def _read_file(snapshot: Snapshot, name: str, sha256: str) -> SnapshotFile:
    content = read_small_file(snapshot.folder / FILES / name, MAX_FILES)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{name} was changed after it was published")
    return SnapshotFile(name, len(content), sha256, base64.b64encode(content).decode("ascii"))
