"""A miner's checkpoint, from its URL into the spool, whatever the miner's server does.

One blocking function for one file, run in a thread of its own: a hostile server can make it wait, but only that thread,
only until a deadline, and only for a connection's worth of memory. What bounds it:

- size: the largest honest file of the group (`readers.largest_file`), known before the first byte; a larger
  Content-Length or range total is refused at once, an endless body at the limit;
- time: the whole fetch has a deadline; so has each head; and each `stall_s` must bring a fair share of the file, so
  that a byte now and then does not hold a place for a quarter of an hour;
- heads: at most 64 KiB before the final answer, parsed by h11 and no more lenient than it; bodies bypass h11 and go
  from the socket into one buffer and to the file.

The first request asks for the first part as a range. A server that answers 206 gets its remaining bytes asked for over
several connections to the same, already checked address; one that answers 200 is read in a single stream. Anything
that may be a passing fault is tried again from the start, within the same deadline.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import h11

from bzstream.evaluation.codes import Failure, Refusal
from bzstream.evaluation.dial import Dialer, Target

__all__ = ["CancelledFetch", "Fetched", "Limits", "fetch", "hash_file"]

_BUFFER = 1024 * 1024
_MAX_HEAD = 64 * 1024
"""Bytes before the final answer's body, interim answers included."""
_SLICE_S = 0.25
"""How long one wait for the socket lasts before cancellation and deadlines are looked at again."""
_PASSING = frozenset({"unreachable", "truncated", "stalled", "bad_response"})
"""Faults that may be gone at the next attempt; so may any 5xx or 429."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
"""RFC 9110 14.4, with a known total."""


class _WaitedForRoom(Exception):
    """The room is there now, after so many seconds; make the request again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Limits(NamedTuple):
    """What one fetch may take."""

    max_bytes: int
    timeout_s: float
    stall_s: float
    max_redirects: int
    connections: int = 4
    part_bytes: int = 16 * 1024 * 1024
    """The first range asked for; a file that is not larger is not worth a second connection."""
    attempts: int = 3


class Fetched(NamedTuple):
    """A whole file in the spool."""

    size: int
    sha256: str
    """64 hex digits over the file as it lies in the spool."""
    seconds: float
    connections: int


class CancelledFetch(Exception):
    """The caller set the event; the partial file is removed."""


def fetch(
    url: str,
    destination: Path,
    limits: Limits,
    dialer: Dialer,
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
            size, connections = _attempt(url, destination, limits, dialer, deadline, cancelled, reserve)
            return Fetched(size, hash_file(destination), time.monotonic() - began, connections)
        except _WaitedForRoom as wait:
            deadline += wait.seconds
            attempt -= 1
        except Refusal as refusal:
            _remove(destination)
            passing = refusal.code in _PASSING or (refusal.code == "http_status" and "passing" in refusal.detail)
            pause = 2.0 ** (attempt - 1)
            if not passing or attempt >= limits.attempts or time.monotonic() + pause >= deadline:
                raise
            if cancelled.wait(pause):
                raise CancelledFetch from None
        except OSError as error:
            _remove(destination)
            raise Failure("spool_error", f"the spool cannot be written: {error.strerror}") from None
        except BaseException:
            _remove(destination)
            raise


def hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class _Watch:
    """Deadline, cancellation and the least speed of one attempt, over all its connections."""

    def __init__(self, limits: Limits, deadline: float, cancelled: threading.Event) -> None:
        self.limits = limits
        self.deadline = deadline
        self.cancelled = cancelled
        self.broken = threading.Event()
        """Set when one connection failed, so that the others end too."""
        self.expected = 0
        self._lock = threading.Lock()
        self._window_began = time.monotonic()
        self._window_bytes = 0

    def check(self) -> None:
        now = time.monotonic()
        if self.cancelled.is_set():
            raise CancelledFetch
        if now >= self.deadline:
            raise Refusal("fetch_timeout", f"the file did not arrive within {self.limits.timeout_s:g} s")
        if self.broken.is_set():
            raise Refusal("truncated", "another connection of this fetch failed")
        with self._lock:
            if now - self._window_began >= self.limits.stall_s:
                # An eighth of the speed that would just meet the deadline.
                fair = self.expected * self.limits.stall_s / self.limits.timeout_s / 8
                if self._window_bytes <= fair:
                    raise Refusal("stalled", f"{self._window_bytes} bytes arrived in {self.limits.stall_s:g} s")
                self._window_began, self._window_bytes = now, 0

    def count(self, received: int) -> None:
        with self._lock:
            self._window_bytes += received

    def left(self) -> float:
        return max(0.001, min(self.limits.stall_s, self.deadline - time.monotonic()))


def _attempt(
    url: str,
    destination: Path,
    limits: Limits,
    dialer: Dialer,
    deadline: float,
    cancelled: threading.Event,
    reserve: Callable[[int], float],
) -> tuple[int, int]:
    """One try: (bytes, connections used)."""
    watch = _Watch(limits, deadline, cancelled)
    watch.check()
    answer, target, address = _first_answer(url, dialer, watch)
    with answer:
        total = answer.total
        if total is not None and total > limits.max_bytes:
            raise Refusal("too_large", f"the file has {total} bytes; this group's has at most {limits.max_bytes}")
        waited = reserve(limits.max_bytes if total is None else total)
        if waited:
            raise _WaitedForRoom(waited)
        watch = _Watch(limits, deadline, cancelled)  # the body has its own time to stall in
        answer.watch = watch
        watch.expected = limits.max_bytes // 4 if total is None else total
        descriptor = os.open(destination, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            received = answer.save(descriptor, 0)
            if not answer.partial or total is None or received >= total:
                return received, 1
            answer.close()
            return total, 1 + _rest(descriptor, received, total, answer, target, address, dialer, watch)
        finally:
            os.close(descriptor)


def _first_answer(url: str, dialer: Dialer, watch: _Watch) -> tuple[_Answer, Target, str]:
    """The answer that carries the file, after at most `max_redirects` redirects, each checked like the first URL."""
    target = dialer.parse(url)
    for _ in range(watch.limits.max_redirects + 1):
        address = dialer.resolve(target)
        answer = _Answer(target, dialer.connect(target, address, timeout=watch.left()), watch)
        try:
            location = answer.open(f"bytes=0-{watch.limits.part_bytes - 1}", first=0)
        except BaseException:
            answer.close()
            raise
        if location is None:
            return answer, target, address
        answer.close()
        target = dialer.follow(target, location)
    raise Refusal("too_many_redirects", f"the server redirects more than {watch.limits.max_redirects} times")


def _rest(
    descriptor: int, done: int, total: int, first: _Answer, target: Target, address: str, dialer: Dialer, watch: _Watch
) -> int:
    """Fetch bytes [done, total) over several connections at once; how many were used."""
    count = max(1, min(watch.limits.connections, (total - done) // watch.limits.part_bytes))
    edges = [done + (total - done) * i // count for i in range(count + 1)]

    def part(index: int) -> None:
        begin, end = edges[index], edges[index + 1]
        try:
            with _Answer(target, dialer.connect(target, address, timeout=watch.left()), watch) as answer:
                redirect = answer.open(f"bytes={begin}-{end - 1}", first=begin, condition=first.validator)
                same = redirect is None and answer.partial and (answer.total, answer.length) == (total, end - begin)
                if not same or answer.validator != first.validator:
                    raise Refusal("bad_response", "the file changed while it was fetched, or a range was not honoured")
                if answer.save(descriptor, begin) != end - begin:
                    raise Refusal("truncated", "a range ended early")
        except BaseException:
            watch.broken.set()
            raise

    with ThreadPoolExecutor(count, thread_name_prefix="fetch-part") as pool:
        futures = [pool.submit(part, index) for index in range(count)]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        # The first real cause, not "another connection failed".
        raise next((e for e in errors if "another connection" not in str(e)), errors[0])
    return count


class _Answer:
    """One request on one connection, and its body."""

    def __init__(self, target: Target, connection: socket.socket, watch: _Watch) -> None:
        self._target = target
        self._socket = connection
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        self.watch = watch
        self.partial = False
        self.total: int | None = None
        """Bytes of the whole file, when the server says so."""
        self.length: int | None = None
        """Bytes of this body, None when it is chunked or ends with the connection."""
        self.validator: str | None = None
        """The strong ETag (RFC 9110 8.8.1), for If-Range."""
        self._chunked = False

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def open(self, range_: str, *, first: int, condition: str | None = None) -> str | None:
        """Send the request and read the head; the Location of a redirect, else None."""
        headers = [
            ("Host", self._target.authority),
            ("User-Agent", "bzstream"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("Range", range_),
            ("Connection", "close"),
        ]
        if condition is not None:
            headers.append(("If-Range", condition))
        request = h11.Request(method="GET", target=self._target.path, headers=headers)
        out = (self._h11.send(request) or b"") + (self._h11.send(h11.EndOfMessage()) or b"")
        self._socket.settimeout(self.watch.left())
        try:
            self._socket.sendall(out)
        except OSError as error:
            raise Refusal("unreachable", f"the connection broke: {type(error).__name__}") from None
        response = self._read_head()
        status = response.status_code
        fields = {bytes(name): value.decode("latin-1") for name, value in response.headers}
        if status in (301, 302, 303, 307, 308):
            if b"location" not in fields:
                raise Refusal("bad_response", "the server redirects without saying where")
            return fields[b"location"]
        if status not in (200, 206):
            passing = " (may be passing)" if status >= 500 or status == 429 else ""
            raise Refusal("http_status", f"the server answered {status}{passing}")
        self._take(status, fields, first)
        return None

    def _read_head(self) -> h11.Response:
        head_deadline = time.monotonic() + self.watch.limits.stall_s
        taken = 0
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                self._malformed(str(error))
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                if time.monotonic() >= head_deadline:
                    raise Refusal("stalled", "the head of the answer did not arrive")
                data = self._receive_some()
                if not data:
                    raise Refusal("truncated", "the connection ended before the answer")
                taken += len(data)
                if taken > _MAX_HEAD:
                    self._malformed("its head is too large")
                self._h11.receive_data(data)
            elif not isinstance(event, h11.InformationalResponse):
                self._malformed("it is no answer")

    def _take(self, status: int, fields: dict[bytes, str], first: int) -> None:
        coding = fields.get(b"content-encoding", "identity").strip().lower()
        if coding not in ("identity", ""):
            raise Refusal("content_encoding", "the server compressed the file; serve it as it is")
        self._chunked = b"transfer-encoding" in fields
        if b"content-length" in fields and not self._chunked:
            self.length = int(fields[b"content-length"])  # digits only: h11 has checked
        etag = fields.get(b"etag", "")
        self.validator = etag if etag.startswith('"') else None
        self.partial = status == 206
        if not self.partial:
            self.total = self.length
            return
        match = _CONTENT_RANGE.fullmatch(fields.get(b"content-range", ""))
        if match is None:
            self._malformed("a 206 without a plain Content-Range")
        begin, end, total = map(int, match.groups())
        if begin != first or not begin <= end < total or self.length not in (None, end - begin + 1):
            self._malformed("its Content-Range does not fit the request")
        self.length, self.total = end - begin + 1, total

    def _malformed(self, what: str) -> NoReturn:
        raise Refusal("bad_response", f"the server's answer is not valid HTTP/1.1: {what[:200]}")

    def save(self, descriptor: int, offset: int) -> int:
        """Write the body to the file from `offset`; bytes written. Raises Refusal when it is short or too large."""
        if self._chunked:
            return self._save_chunked(descriptor, offset)
        limit = self.watch.limits.max_bytes if self.length is None else self.length
        start, _ = self._h11.trailing_data
        written = _write(descriptor, memoryview(start)[:limit], offset)
        self.watch.count(written)
        buffer = memoryview(bytearray(min(_BUFFER, max(1, limit))))
        while self.length is None or written < self.length:
            received = self._receive_into(buffer[: max(1, min(len(buffer), limit - written))])
            if received == 0:
                if self.length is None:
                    return written
                raise Refusal("truncated", f"the connection ended after {written} of {self.length} bytes")
            if written + received > limit:
                raise Refusal("too_large", f"the body goes on after {limit} bytes")
            written += _write(descriptor, buffer[:received], offset + written)
        return written

    def _save_chunked(self, descriptor: int, offset: int) -> int:
        limit = self.watch.limits.max_bytes if self.length is None else self.length
        written = 0
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                if "complete message" in str(error):
                    raise Refusal("truncated", f"the connection ended after {written} bytes") from None
                self._malformed(str(error))
            if event is h11.NEED_DATA:
                self._h11.receive_data(self._receive_some())
            elif isinstance(event, h11.Data):
                if written + len(event.data) > limit:
                    raise Refusal("too_large", f"the body goes on after {limit} bytes")
                written += _write(descriptor, memoryview(event.data), offset + written)
            elif isinstance(event, h11.EndOfMessage):
                if self.length not in (None, written):
                    raise Refusal("truncated", f"the body ended after {written} bytes")
                return written

    def _receive_some(self) -> bytes:
        buffer = bytearray(16 * 1024)
        return bytes(buffer[: self._receive_into(memoryview(buffer))])

    def _receive_into(self, buffer: memoryview) -> int:
        """Bytes received, 0 at the end. Waits in short slices, so that deadlines and cancellation count at once."""
        while True:
            self.watch.check()
            self._socket.settimeout(_SLICE_S)
            try:
                received = self._socket.recv_into(buffer)
            except TimeoutError:
                continue
            except OSError as error:
                raise Refusal("truncated", f"the connection broke: {type(error).__name__}") from None
            self.watch.count(received)
            return received


def _write(descriptor: int, data: memoryview, offset: int) -> int:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
    return written
