"""Who is asking: the bearer token, the hotkey that is claimed, or the key that proves it.

A proof (`btauth/1`) names the node that it is for, so that a node cannot pass it on to another; and each is good once,
so that every request, ranges and retries too, gets a fresh one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from bzstream.chain.keys import Key
from bzstream.chain.proofs import sign_request

__all__ = ["Credentials"]

AGENT = "bzstream"


@dataclass(slots=True)
class Credentials:
    """`receiver`: SS58 hotkey of the node, which proofs name; without it a key only gives the hotkey to claim."""

    token: str | None = None
    hotkey: str | None = None
    key: Key | None = None
    receiver: str | None = None
    _last_nonce: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def headers(
        self, method: str, target: str, body: bytes = b"", *, receiver: str | None = None
    ) -> list[tuple[str, str]]:
        """The headers of one request for `target` (path and query as the node sees them).

        `receiver`: whom the proof names, if `self.receiver` does not say.
        """
        receiver = self.receiver or receiver
        found = [("User-Agent", AGENT), ("Accept-Encoding", "identity")]
        if self.token is not None:
            found.append(("Authorization", f"Bearer {self.token}"))
        hotkey = self.key.ss58_address if self.key is not None else self.hotkey
        if hotkey is not None:
            found.append(("X-Hotkey", hotkey))
        if self.key is not None and receiver is not None and method in ("GET", "HEAD"):
            proof = sign_request(self.key, method, target, receiver, body=body, nonce=self._nonce())
            found += proof.items()
        return found

    def _nonce(self) -> int:
        """The time in nanoseconds, but never the same twice: many connections sign in the same instant."""
        with self._lock:
            self._last_nonce = max(time.time_ns(), self._last_nonce + 1)
            return self._last_nonce
