"""Requests to validators: connections kept for the next one, answers checked, refusals put into words.

A session lives as long as one call of the API; its connections are shared by the units that the call fetches, so that
the second unit starts with open congestion windows.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from bzstream.client.address import Address, Want
from bzstream.client.errors import (
    BadManifest,
    BadSignature,
    Busy,
    ClientError,
    Forbidden,
    Misbehaved,
    Moved,
    NotFound,
    Passing,
    Refused,
    Stopped,
    Unauthorized,
)
from bzstream.client.identity import Identity
from bzstream.client.manifest import Manifest, parse_manifest
from bzstream.client.mirror import Mirror
from bzstream.client.tuning import Tuning
from bzstream.client.wire import Connection, Reply, tls_context

if TYPE_CHECKING:
    import ssl

__all__ = ["Session", "refusal"]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)


class _Problem(msgspec.Struct):
    """The JSON of an error answer; anything else in it is ignored."""

    detail: str = ""
    code: str = ""
    submission_id: str = ""


class Session:
    """`notify(text)` is called, from any thread, with a line for a person. `stop()` ends everything that runs."""

    def __init__(
        self,
        addresses: Sequence[Address],
        identity: Identity,
        tuning: Tuning,
        *,
        ca_file: str | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.identity = identity
        self.tuning = tuning
        self.mirrors = [Mirror(number, address, tuning) for number, address in enumerate(addresses)]
        self.stopping = threading.Event()
        self.notify = notify or (lambda text: None)
        self._context: ssl.SSLContext | None = None
        if any(address.scheme == "https" for address in addresses):
            self._context = tls_context(ca_file)
        self._lock = threading.Lock()
        self._idle: dict[Address, list[Connection]] = {}
        self._live: set[Connection] = set()

    def connect(self, mirror: Mirror) -> Connection:
        """An idle connection to the mirror, else a new one. Raises Unreachable and Stopped."""
        with self._lock:
            idle = self._idle.get(mirror.address)
            if idle:
                return idle.pop()
        if self.stopping.is_set():
            raise Stopped("stopped")
        secure = mirror.address.scheme == "https"
        connection = Connection(mirror.address, self.tuning, self._context if secure else None)
        mirror.rtt = min(mirror.rtt, connection.rtt) if mirror.rtt else connection.rtt
        with self._lock:
            self._live.add(connection)
        if self.stopping.is_set():
            self.discard(connection)
            raise Stopped("stopped")
        return connection

    def keep(self, connection: Connection) -> None:
        """Give a connection back; it is closed unless another request can follow."""
        if connection.reusable:
            with self._lock:
                self._idle.setdefault(connection.address, []).append(connection)
        else:
            self.discard(connection)

    def discard(self, connection: Connection) -> None:
        with self._lock:
            self._live.discard(connection)
        connection.close()

    def stop(self) -> None:
        """Make every thread that waits for a server return at once."""
        self.stopping.set()
        with self._lock:
            live = list(self._live)
        for connection in live:
            connection.interrupt()

    def close(self) -> None:
        """Close the idle connections; those in use belong to whoever uses them."""
        with self._lock:
            idle = [connection for found in self._idle.values() for connection in found]
            self._idle.clear()
        for connection in idle:
            self.discard(connection)

    def forgive_moved(self) -> None:
        """Use mirrors again that were left out for having another version: another manifest is about to be read."""
        for mirror in self.mirrors:
            if isinstance(mirror.dropped, Moved):
                mirror.dropped = None

    def document(
        self,
        mirror: Mirror,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        limit: int | None = None,
    ) -> tuple[Reply, bytes]:
        """One request and its whole small answer, whatever its status. A kept connection that died is replaced once."""
        while True:
            connection = self.connect(mirror)
            used_before = connection.requests > 0
            try:
                signed = self.identity.headers(method, target, body)
                reply = connection.exchange(method, target, [*signed, *headers], body)
                data = connection.read_document(self.tuning.max_document if limit is None else limit)
            except Passing:
                self.discard(connection)
                if self.stopping.is_set():
                    raise Stopped("stopped") from None
                # A server may close an idle connection in the moment in which the request is sent (RFC 9112 9.3.1).
                if used_before and method in ("GET", "HEAD"):
                    continue
                raise
            except BaseException:
                self.discard(connection)
                raise
            self.keep(connection)
            return reply, data

    def manifest(self, want: Want, version: str | None, signer: str | None) -> Manifest:
        """The unit's manifest from the first mirror that gives one. Raises the first mirror's error when none does."""
        began = time.monotonic()
        failures = 0
        while True:
            first: ClientError | None = None
            for mirror in self.mirrors:
                if mirror.dropped is not None:
                    first = first or mirror.dropped
                    continue
                try:
                    return self._manifest_from(mirror, want, version, signer)
                except Stopped:
                    raise
                except ClientError as error:
                    final = isinstance(error, Refused | BadManifest | BadSignature | Misbehaved)
                    if final and len(self.mirrors) > 1:
                        mirror.dropped = error
                        self.notify(f"{mirror.address} is left out: {error}")
                    first = first or error
            assert first is not None, "a session has at least one mirror"
            if not isinstance(first, Passing):
                raise first
            wait = max(first.retry_after or 0.0, min(0.2 * 2**failures, 2.0))
            failures += 1
            patience = self.tuning.first_patience_s + (first.retry_after or 0.0)
            if wait > self.tuning.max_retry_after_s or time.monotonic() - began + wait > patience + 1.0:
                raise first
            if first.retry_after:
                self.notify(f"{first}; trying again in {wait:.0f} s")
            if self.stopping.wait(wait):
                raise Stopped("stopped")

    def _manifest_from(self, mirror: Mirror, want: Want, version: str | None, signer: str | None) -> Manifest:
        target = want.target(mirror.address.prefix, version, manifest=True)
        reply, data = self.document(mirror, "GET", target, want.headers, limit=self.tuning.max_manifest)
        if reply.status != 200:
            raise refusal(reply, data, mirror.address, want.label if version is None else f"{want.label} of {version}")
        return parse_manifest(data, want, version=version, signer=signer)

    def open_range(
        self, connection: Connection, mirror: Mirror, manifest: Manifest, version: str | None, begin: int, end: int
    ) -> None:
        """Ask for payload bytes [begin, end) of exactly this manifest's unit; the body is then ready to be read.

        Raises Moved when the server has another version, Misbehaved when the answer is not what was asked for.
        """
        want = manifest.want
        target = want.target(mirror.address.prefix, version)
        reply = connection.exchange(
            "GET",
            target,
            [
                *self.identity.headers("GET", target),
                *want.headers,
                ("Range", f"bytes={begin}-{end - 1}"),
                ("If-Match", manifest.etag),
            ],
        )
        if reply.status != 206:
            if reply.status == 200:
                raise Misbehaved(f"{mirror.address} sent the whole file where a range of it was asked for")
            if reply.status in (412, 416):
                raise Moved(f"{mirror.address} has another version of {want.label} now")
            if reply.status < 400:
                where = reply.get("location")
                raise Misbehaved(
                    f"{mirror.address} redirects elsewhere{f' ({where!r:.200})' if where else ''}, "
                    "which is not followed as the token would go there too; give the right URL"
                )
            document = connection.read_document(self.tuning.max_document)
            raise refusal(reply, document, mirror.address, want.label)
        form = _CONTENT_RANGE.fullmatch(reply.get("content-range") or "")
        if form is None or tuple(map(int, form.groups())) != (begin, end - 1, manifest.size):
            raise Misbehaved(f"{mirror.address} sent another range than the one that was asked for")
        if reply.length != end - begin:
            raise Misbehaved(f"{mirror.address} announced {reply.length} bytes for a range of {end - begin}")
        if reply.get("etag") != manifest.etag:
            raise Moved(f"{mirror.address} sent bytes of another version of {want.label}")
        connection.begin_body(end - begin)


def refusal(reply: Reply, document: bytes, address: Address, what: str) -> ClientError:
    """The error for a status that is no success: which kind, and a sentence that says what to do."""
    try:
        problem = msgspec.json.decode(document, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        problem = _Problem()
    # The server's own sentence is shown, but never control characters (a terminal would obey them) or pages of text.
    said = "".join(c for c in problem.detail[:300] if c.isprintable())
    status, code = reply.status, problem.code[:64]
    tail = f" (it says: {said})" if said else ""
    if status in (408, 429, 500, 502, 503, 504):
        what_to_do = "is busy or not ready" if status in (429, 503) else f"failed (status {status})"
        return Busy(f"{address} {what_to_do}{tail}", _retry_after(reply))
    if status == 401:
        text = f"{address} does not accept the token or the proof; check BZ_AUTH_TOKEN{tail}"
        return Unauthorized(text, status, code, said)
    if status == 403:
        return Forbidden(f"{address} does not allow {what} for this caller{tail}", status, code, said)
    if status == 404:
        return NotFound(f"{address} does not have {what}{tail}", status, code, said)
    if 300 <= status < 400:
        return Misbehaved(f"{address} redirects elsewhere, which is not followed as the token would go there too")
    text = f"{address} answered {status} for {what}{tail}"
    return Refused(text, status, code, said, problem.submission_id[:64])


def _retry_after(reply: Reply) -> float | None:
    """Seconds, from either form of Retry-After (RFC 9110 10.2.3)."""
    text = reply.get("retry-after")
    if text is None:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    from email.utils import parsedate_to_datetime  # 10 ms for what hardly any server sends

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
