"""A transport made of memory, so that a connection needs no socket."""

from __future__ import annotations

__all__ = ["MemoryTransport"]


class MemoryTransport:
    """Receives given pieces and keeps what is sent."""

    secure = False
    short_recv_means_empty = False
    short_send_means_full = True

    def __init__(self, pieces: list[bytes], *, eof: bool) -> None:
        self.pieces = pieces
        self.eof = eof
        self.sent = bytearray()
        self.closed = False

    def recv(self, size: int) -> bytes | None:
        if self.pieces:
            piece = self.pieces.pop(0)
            if len(piece) > size:
                self.pieces.insert(0, piece[size:])
            return piece[:size]
        return b"" if self.eof else None

    def send(self, data: bytes | memoryview, more: bool) -> int:
        self.sent += data
        return len(data)

    def sendfile(self, fd: int, offset: int, count: int) -> int | None:
        self.sent += bytes(count)
        return count

    def wait_for_room(self, wait: bool) -> None:
        pass

    def flush(self) -> bool:
        return True

    def unacknowledged(self) -> int:
        return 0

    def close_write(self) -> None:
        pass

    def close(self, *, reset: bool) -> None:
        self.closed = True
