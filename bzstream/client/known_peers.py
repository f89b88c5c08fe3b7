"""How new the last snapshot of each peer was: STORE/peers.json, so that an old one is never taken for a new one.

A peer is known by its hotkey, where it signs, and by its address: one that leaves its signature out is not a new one.
Written with the store locked.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from bzstream.client.errors import BadSnapshot, DiskError
from bzstream.client.peer_snapshot import PeerSnapshot
from bzstream.client.sinks import disk_error
from bzstream.util.durable import write_file
from bzstream.util.files import read_small_file

__all__ = ["KnownPeers"]

MAX_BYTES = 1 << 20


class _Seen(msgspec.Struct):
    sequence: int
    version: str


class KnownPeers:
    """The file in the store at `store`."""

    def __init__(self, store: Path) -> None:
        self.path = store / "peers.json"

    def check(self, found: PeerSnapshot, address: str) -> None:
        """Raise BadSnapshot when the peer showed a later snapshot before, DiskError when that cannot be known."""
        peers = self._read()
        for name in _names(found, address):
            seen = peers.get(name)
            if seen is None or found.sequence > seen.sequence:
                continue
            if found.sequence < seen.sequence or found.version != seen.version:
                raise BadSnapshot(
                    f"{address} offers {found.version} as activation {found.sequence}, after {seen.version} as "
                    f"{seen.sequence}: that is an old snapshot; if the peer's store was made anew, remove {self.path}"
                )

    def remember(self, found: PeerSnapshot, address: str) -> None:
        """Note what the peer showed, durably. Raises DiskError."""
        peers = self._read()
        seen = _Seen(found.sequence, found.version)
        changed = {n: seen for n in _names(found, address) if n not in peers or peers[n].sequence < found.sequence}
        if changed:
            try:
                write_file(self.path, msgspec.json.encode({**peers, **changed}))
            except OSError as error:
                raise disk_error(error, self.path) from None

    def _read(self) -> dict[str, _Seen]:
        try:
            return msgspec.json.decode(read_small_file(self.path, MAX_BYTES), type=dict[str, _Seen])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            raise DiskError(
                f"{self.path}, which says how new the peers' snapshots were, cannot be read; remove it to begin anew"
            ) from None


def _names(found: PeerSnapshot, address: str) -> list[str]:
    return [address] if found.hotkey is None else [address, found.hotkey]
