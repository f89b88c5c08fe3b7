"""Bodies of responses that are not plain bytes. A body says which bytes, or which part of a file, are at a position.

A multipart/byteranges body is a run of boundary lines and windows over one payload. Joining them into one flat payload
would copy the list of extents (12,000 for the full Qwen3-VL-30B-A3B) for every such request, so a `Joined` only
remembers where each piece ends.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Protocol

from bzstream.http.protocol.ranges import Span
from bzstream.payload import Extent, Payload

__all__ = ["Body", "Joined", "byteranges"]


class Body(Protocol):
    """The sender's view of a body; `Payload` is one."""

    def __len__(self) -> int: ...

    def at(self, position: int) -> bytes | Extent:
        """The longest run of bytes or of one file from `position` on; IndexError outside [0, len)."""

    def retain(self) -> None:
        """Hold the files behind the body."""

    def release(self) -> None:
        """Let them go."""


class Joined:
    """Payloads one after the other."""

    __slots__ = ("_ends", "_payloads")

    def __init__(self, payloads: tuple[Payload, ...]) -> None:
        self._payloads = payloads
        self._ends = list(accumulate(len(payload) for payload in payloads))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, position: int) -> bytes | Extent:
        if not 0 <= position < len(self):
            raise IndexError("position is outside the body")
        index = bisect_right(self._ends, position)
        payload = self._payloads[index]
        return payload.at(position - (self._ends[index] - len(payload)))

    def retain(self) -> None:
        for payload in self._payloads:
            payload.retain()

    def release(self) -> None:
        for payload in self._payloads:
            payload.release()


def byteranges(payload: Payload, spans: list[Span], content_type: str, boundary: str) -> Joined:
    """The body of a multipart/byteranges response (RFC 9110 14.6): `spans` of `payload`, each with its own head."""
    size = len(payload)
    pieces: list[Payload] = []
    lead = ""
    for span in spans:
        head = (
            f"{lead}--{boundary}\r\nContent-Type: {content_type}\r\n"
            f"Content-Range: bytes {span.start}-{span.stop - 1}/{size}\r\n\r\n"
        )
        pieces += [Payload((head.encode("ascii"),)), payload[span.start : span.stop]]
        lead = "\r\n"
    pieces.append(Payload((f"\r\n--{boundary}--\r\n".encode("ascii"),)))
    return Joined(tuple(pieces))
