"""A miner's checkpoint, from its URL into the spool, whatever the miner's server does.

One blocking function for one file, run in a thread of its own: a hostile server can make it wait, but only that thread,
only until a deadline, and only for a connection's worth of memory. What bounds it:

- size: the largest honest file of the group (`readers.largest_file`), known before the first byte; a larger
  Content-Length or range total is refused at once, an endless body at the limit;
- time: `FetchBudget`, and a time of its own for each head;
- heads and chunks: `httpclient`; bodies go from the socket into one buffer and to the file.

The first request asks for the first part as a range. A server that answers 206 gets its remaining bytes asked for over
several connections to the same, already checked address; one that answers 200 is read in a single stream. Anything
that may be a passing fault is tried again from the start, within the same deadline.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bzstream.evaluation.fetching.budget import CancelledFetch, FetchBudget, Limits, OtherConnectionFailed
from bzstream.evaluation.fetching.safe_connect import SafeConnector, Target
from bzstream.evaluation.rejection_codes import Failure, Refusal
from bzstream.httpclient import (
    Connection,
    ConnectionLost,
    ProtocolViolation,
    ResponseHead,
    SocketAddress,
    Stalled,
    parse_content_range,
)
from bzstream.util.files import hash_file, write_fully

__all__ = ["Fetched", "fetch"]

_BUFFER = 1024 * 1024
_TRANSIENT = frozenset({"unreachable", "truncated", "stalled", "bad_response"})
"""Faults that may be gone at the next attempt; so may the statuses of `_TransientStatus`."""
_CODES: dict[type[Exception], str] = {
    ConnectionLost: "truncated",
    Stalled: "stalled",
    ProtocolViolation: "bad_response",
}


class _TransientStatus(Refusal):
    """A 5xx or 429, which may be gone at the next attempt."""


class _WaitedForRoom(Exception):
    """The room is there now, after so many seconds; make the request again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Fetched(NamedTuple):
    """A whole file in the spool."""

    size: int
    sha256: str
    """64 hex digits over the file as it lies in the spool."""
    seconds: float
    connections: int


def fetch(
    url: str,
    destination: Path,
    limits: Limits,
    connector: SafeConnector,
    *,
    cancelled: threading.Event,
    reserve: Callable[[int], float] = lambda size: 0.0,
) -> Fetched:
    """Fetch `url` into the new file `destination`; blocking. `reserve(bytes)` may wait for room before the body and
    gives the seconds waited. They do not count against the deadline, and the request is made again after them: the
    server may have closed the connection meanwhile, and that is not its fault.

    Raises Refusal with a fetching code, Failure `spool_error`, CancelledFetch. Nothing is left on disk then.
    """
    began = time.monotonic()
    deadline = began + limits.timeout_s
    attempt = 0
    while True:
        attempt += 1
        try:
            size, connections = _attempt(url, destination, FetchBudget(limits, deadline, cancelled), connector, reserve)
            return Fetched(size, hash_file(destination), time.monotonic() - began, connections)
        except _WaitedForRoom as wait:
            deadline += wait.seconds
            attempt -= 1
        except Refusal as refusal:
            _remove(destination)
            transient = refusal.code in _TRANSIENT or isinstance(refusal, _TransientStatus)
            pause = 2.0 ** (attempt - 1)
            if not transient or attempt >= limits.attempts or time.monotonic() + pause >= deadline:
                raise
            if cancelled.wait(pause):
                raise CancelledFetch from None
        except OSError as error:
            _remove(destination)
            raise Failure("spool_error", f"the spool cannot be written: {error.strerror}") from None
        except BaseException:
            _remove(destination)
            raise


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _attempt(
    url: str, destination: Path, budget: FetchBudget, connector: SafeConnector, reserve: Callable[[int], float]
) -> tuple[int, int]:
    """One try: (bytes, connections used)."""
    budget.check()
    limits = budget.limits
    response, target, address = _first_response(url, connector, budget)
    with response:
        total = response.total
        if total is not None and total > limits.max_bytes:
            raise Refusal("too_large", f"the file has {total} bytes; this group's has at most {limits.max_bytes}")
        waited = reserve(limits.max_bytes if total is None else total)
        if waited:
            raise _WaitedForRoom(waited)
        budget.expect(limits.max_bytes // 4 if total is None else total)
        descriptor = os.open(destination, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            received = response.save(descriptor, 0, budget)
            if response.range is None or total is None or received >= total:
                return received, 1
            response.close()
            return total, 1 + _fetch_rest(descriptor, received, response, target, address, connector, budget)
        finally:
            os.close(descriptor)


def _first_response(url: str, connector: SafeConnector, budget: FetchBudget) -> tuple[_Response, Target, SocketAddress]:
    """The response that carries the file, after at most `max_redirects` redirects, each checked like the first URL."""
    target = connector.parse(url)
    for _ in range(budget.limits.max_redirects + 1):
        connection, address = connector.connect(target, connector.resolve(target), budget)
        try:
            response = _Response(connection, target, 0, budget.limits.part_bytes)
        except BaseException:
            connection.close()
            raise
        if response.location is None:
            return response, target, address
        response.close()
        target = connector.follow(target, response.location)
    raise Refusal("too_many_redirects", f"the server redirects more than {budget.limits.max_redirects} times")


def _fetch_rest(
    descriptor: int,
    done: int,
    first: _Response,
    target: Target,
    address: SocketAddress,
    connector: SafeConnector,
    budget: FetchBudget,
) -> int:
    """Fetch the bytes from `done` on over several connections at once; how many were used."""
    assert first.total is not None
    total = first.total
    count = max(1, min(budget.limits.connections, (total - done) // budget.limits.part_bytes))
    edges = [done + (total - done) * i // count for i in range(count + 1)]

    def fetch_part(begin: int, end: int) -> None:
        try:
            connection, _ = connector.connect(target, [address], budget)
            try:
                part = _Response(connection, target, begin, end, condition=first.validator)
                if part.range != (begin, end, total) or part.validator != first.validator:
                    raise Refusal("bad_response", "the file changed while it was fetched, or a range was not honoured")
                part.save(descriptor, begin, budget)
            finally:
                connection.close()
        except BaseException:
            budget.failed.set()
            raise

    with ThreadPoolExecutor(count, thread_name_prefix="fetch-part") as pool:
        futures = [pool.submit(fetch_part, begin, end) for begin, end in itertools.pairwise(edges)]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next(error for error in errors if not isinstance(error, OtherConnectionFailed))
    return count


class _Response:
    """One request for bytes [begin, end) on a connection of its own, and what came of it. Raises Refusal."""

    def __init__(
        self, connection: Connection, target: Target, begin: int, end: int, *, condition: str | None = None
    ) -> None:
        self._connection = connection
        fields = [
            ("User-Agent", "bzstream"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("Range", f"bytes={begin}-{end - 1}"),
            ("Connection", "close"),
        ]
        if condition is not None:
            fields.append(("If-Range", condition))
        self.location: str | None = None
        """Where the server redirects to; nothing else counts then."""
        self.total: int | None = None
        """Bytes of the whole file, when the server says so."""
        self.range: tuple[int, int, int] | None = None
        """What a 206 carries: first byte, one past the last, total."""
        self.validator: str | None = None
        """The strong ETag (RFC 9110 8.8.1), for If-Range."""
        with _refusals():
            head = connection.exchange("GET", target.path, fields)
            self._check_head(head, begin)

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def _check_head(self, head: ResponseHead, begin: int) -> None:
        status = head.status
        if status in (301, 302, 303, 307, 308):
            self.location = head.get("location")
            if self.location is None:
                raise Refusal("bad_response", "the server redirects without saying where")
            return
        if status not in (200, 206):
            kind = _TransientStatus if status >= 500 or status == 429 else Refusal
            raise kind("http_status", f"the server answered {status}")
        if head.encoded:
            raise Refusal("content_encoding", "the server compressed the file; serve it as it is")
        etag = head.get("etag") or ""
        self.validator = etag if etag.startswith('"') else None
        length = self._connection.remaining
        if status == 200:
            self.total = length
            return
        self.range = parse_content_range(head.get("content-range"))
        if self.range is None:
            raise Refusal("bad_response", "the server sent a 206 without a plain Content-Range")
        first, end, self.total = self.range
        if first != begin or length not in (None, end - first):
            raise Refusal("bad_response", "the server's Content-Range does not fit the request")

    def save(self, descriptor: int, offset: int, budget: FetchBudget) -> int:
        """Write the body to the file from `offset`; bytes written. Raises Refusal when it is short or too large."""
        length = self._connection.remaining if self.range is None else self.range[1] - self.range[0]
        limit = budget.limits.max_bytes if length is None else length
        buffer = memoryview(bytearray(min(_BUFFER, limit + 1)))
        written = 0
        while True:
            budget.check()
            with _refusals():
                received = self._connection.read_into(buffer)
            if received == 0:
                break
            budget.count(received)
            if written + received > limit:
                raise Refusal("too_large", f"the body goes on after {limit} bytes")
            write_fully(descriptor, buffer[:received], offset + written)
            written += received
        if length not in (None, written):
            raise Refusal("truncated", f"the body ended after {written} of {length} bytes")
        return written


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a connection raises into the refusal with its code."""
    try:
        yield
    except (ConnectionLost, Stalled, ProtocolViolation) as error:
        raise Refusal(_CODES[type(error)], str(error)) from None
