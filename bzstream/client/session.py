"""Requests to validators: connections kept for the next one, and responses checked.

A session lives as long as one call of the API; its connections are shared by the units that the call fetches, so that
the second unit starts with open congestion windows. Any thread.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from bzstream.client.address import Address, UnitRef
from bzstream.client.credentials import Credentials
from bzstream.client.errors import (
    BadManifest,
    BadSignature,
    BadSnapshot,
    ClientError,
    ProtocolViolation,
    Refused,
    Stopped,
    TransientError,
    VersionChanged,
)
from bzstream.client.manifest import Coding, Manifest, parse_manifest
from bzstream.client.mirror import Mirror
from bzstream.client.responses import BUSY, redirect_error, refusal
from bzstream.client.tuning import Tuning
from bzstream.httpclient import (
    Connection,
    Connector,
    ProxyRules,
    ResponseHead,
    parse_content_range,
    pinned_tls_context,
    tls_context,
)
from bzstream.util.backoff import backoff

__all__ = ["Session"]

T = TypeVar("T")

CA_VARIABLES = ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
"""Certificates that other clients on the machine trust; OpenSSL itself honours SSL_CERT_FILE and SSL_CERT_DIR."""


class Session:
    """`notify(text)` is called, from any thread, with a line for a person. `stop()` ends everything that runs."""

    def __init__(
        self,
        addresses: Sequence[Address],
        credentials: Credentials,
        tuning: Tuning,
        *,
        ca_file: str | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.credentials = credentials
        self.tuning = tuning
        self.mirrors = [Mirror(number, address, tuning) for number, address in enumerate(addresses)]
        self.stopping = threading.Event()
        self.notify = notify or (lambda text: None)
        ca_file = ca_file or next(filter(None, map(os.environ.get, CA_VARIABLES)), None)
        context = functools.cache(lambda: tls_context(ca_file))
        if any(address.origin.secure and address.pin is None for address in addresses):
            context()
        rules = ProxyRules(os.environ)
        self._connectors = [
            Connector(
                rules,
                context if address.pin is None else functools.partial(pinned_tls_context, address.pin),
                connect_timeout_s=tuning.connect_timeout_s,
                stall_s=tuning.stall_s,
                on_wait=self.raise_if_stopped,
            )
            for address in addresses
        ]
        """By the number of the mirror."""
        self._lock = threading.Lock()
        self._idle: dict[int, list[Connection]] = {}
        self._live: dict[Connection, int] = {}
        """Connection -> number of the mirror that it leads to."""

    def connect(self, mirror: Mirror) -> Connection:
        """An idle connection to the mirror, else a new one. Raises Unreachable and Stopped."""
        with self._lock:
            idle = self._idle.get(mirror.number)
            if idle:
                return idle.pop()
        self.raise_if_stopped()
        connection = self._connectors[mirror.number].open(mirror.address.origin)
        mirror.rtt = min(mirror.rtt, connection.rtt) if mirror.rtt else connection.rtt
        with self._lock:
            self._live[connection] = mirror.number
        if self.stopping.is_set():
            self.discard(connection)
        self.raise_if_stopped()
        return connection

    def raise_if_stopped(self) -> None:
        if self.stopping.is_set():
            raise Stopped("stopped; the same call goes on from here")

    def keep(self, connection: Connection) -> None:
        """Give a connection back; it is closed unless another request can follow."""
        if connection.reusable:
            with self._lock:
                self._idle.setdefault(self._live[connection], []).append(connection)
        else:
            self.discard(connection)

    def discard(self, connection: Connection) -> None:
        with self._lock:
            self._live.pop(connection, None)
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

    def readmit_changed(self) -> None:
        """Use mirrors again that were left out for having another version: another manifest is about to be read."""
        for mirror in self.mirrors:
            if isinstance(mirror.dropped, VersionChanged):
                mirror.dropped = None

    def document(
        self,
        mirror: Mirror,
        method: str,
        target: str,
        fields: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        limit: int | None = None,
    ) -> tuple[ResponseHead, bytes]:
        """One request and its whole small response, whatever its status. A kept connection that died is replaced once.

        `target`: path and query as the node sees them.
        """
        while True:
            connection = self.connect(mirror)
            used_before = connection.requests > 0
            try:
                head = self._exchange(connection, mirror, method, target, fields, body)
                data = connection.read_document(self.tuning.max_document if limit is None else limit)
            except TransientError:
                self.discard(connection)
                self.raise_if_stopped()
                # A server may close an idle connection in the moment in which the request is sent (RFC 9112 9.3.1).
                if used_before and method in ("GET", "HEAD"):
                    continue
                raise
            except BaseException:
                self.discard(connection)
                raise
            self.keep(connection)
            return head, data

    def _exchange(
        self,
        connection: Connection,
        mirror: Mirror,
        method: str,
        target: str,
        fields: Sequence[tuple[str, str]],
        body: bytes = b"",
    ) -> ResponseHead:
        """Proofs are for what the node sees: a prefix of the URL is for the proxy before it, which takes it off."""
        credentials = self.credentials.headers(method, target, body, receiver=mirror.receiver)
        return connection.exchange(method, mirror.address.prefix + target, [*credentials, *fields], body)

    def request_with_retries(
        self, method: str, target: str, body: bytes = b"", *, patience_s: float, mirror: Mirror | None = None
    ) -> tuple[int, bytes]:
        """Status and document of a success; asked again while there is no answer or a request to come back later.

        `mirror`: default the first. Raises what `refusal` says, the last TransientError when it does not pass in
        `patience_s`, and Stopped.
        """
        mirror = mirror or self.mirrors[0]
        fields = [("Content-Type", "application/json")] if body else []
        # A submission's 429 is no busy server: this hotkey has had its share of the cycle.
        busy = BUSY - {429} if body else BUSY
        deadline = time.monotonic() + patience_s
        failures = 0
        while True:
            try:
                head, data = self.document(mirror, method, target, fields, body)
                if 200 <= head.status < 300:
                    return head.status, data
                raise refusal(head, data, mirror.address, f"{method} {target}", busy=busy)
            except TransientError as error:
                failures += 1
                wait = max(error.retry_after or 0.0, backoff(failures, first=0.2, most=5.0))
                if (error.retry_after or 0.0) > patience_s or time.monotonic() + wait > deadline:
                    raise
                self.notify(f"{error}; trying again")
            self.stopping.wait(wait)
            self.raise_if_stopped()

    def manifest(self, unit: UnitRef, version: str | None, signer: str | None) -> Manifest:
        """The unit's manifest from the first mirror that gives one. Raises the first mirror's error when none does."""
        return self.ask_mirrors(lambda mirror: self.manifest_from(mirror, unit, version, signer))

    def ask_mirrors(self, read: Callable[[Mirror], T]) -> T:
        """What `read` returns for the first mirror for which it raises nothing, tried again while errors may pass.

        Raises the first mirror's error when none is left. One whose answer cannot be used is left out from then on.
        """
        began = time.monotonic()
        failures = 0
        while True:
            first: ClientError | None = None
            for mirror in self.mirrors:
                if mirror.dropped is not None:
                    first = first or mirror.dropped
                    continue
                try:
                    return read(mirror)
                except Stopped:
                    raise
                except ClientError as error:
                    final = isinstance(error, Refused | BadManifest | BadSignature | BadSnapshot | ProtocolViolation)
                    if final and len(self.mirrors) > 1:
                        mirror.dropped = error
                        self.notify(f"{mirror.address} is left out: {error}")
                    first = first or error
            assert first is not None, "a session has at least one mirror"
            if not isinstance(first, TransientError):
                raise first
            failures += 1
            wait = max(first.retry_after or 0.0, backoff(failures, first=0.2, most=2.0, jitter=False))
            patience = self.tuning.first_patience_s + (first.retry_after or 0.0)
            if wait > self.tuning.max_retry_after_s or time.monotonic() - began + wait > patience + 1.0:
                raise first
            if first.retry_after:
                self.notify(f"{first}; trying again in {wait:.0f} s")
            self.stopping.wait(wait)
            self.raise_if_stopped()

    def manifest_from(self, mirror: Mirror, unit: UnitRef, version: str | None, signer: str | None) -> Manifest:
        """The unit's manifest as this mirror has it. Raises BadManifest, BadSignature and what `refusal` says."""
        target = unit.target(version, manifest=True)
        head, data = self.document(mirror, "GET", target, unit.headers, limit=self.tuning.max_manifest)
        if head.status != 200:
            raise refusal(head, data, mirror.address, unit.label if version is None else f"{unit.label} of {version}")
        return parse_manifest(data, unit, version=version, signer=signer)

    def open_range(
        self, connection: Connection, mirror: Mirror, manifest: Manifest, version: str | None, begin: int, end: int
    ) -> None:
        """Ask for payload bytes [begin, end) of exactly this manifest's unit; the body is then ready to be read.

        Raises VersionChanged when the server has another version, ProtocolViolation when the response is not what was
        asked for, and what `refusal` says.
        """
        self._open(
            connection, mirror, manifest, manifest.unit.target(version), manifest.etag, begin, end, manifest.size
        )

    def open_coded(
        self,
        connection: Connection,
        mirror: Mirror,
        manifest: Manifest,
        version: str | None,
        coding: Coding,
        begin: int,
        end: int,
    ) -> None:
        """As `open_range`, for bytes [begin, end) of a coded form. Raises VersionChanged and Refused, too, when this
        mirror does not have exactly that form."""
        target = manifest.unit.target(version, coding=coding.query)
        self._open(connection, mirror, manifest, target, coding.etag, begin, end, coding.size)

    def _open(
        self,
        connection: Connection,
        mirror: Mirror,
        manifest: Manifest,
        target: str,
        expected_etag: str,
        begin: int,
        end: int,
        size: int,
    ) -> None:
        unit, address = manifest.unit, mirror.address
        conditions = [("Range", f"bytes={begin}-{end - 1}"), ("If-Match", expected_etag)]
        head = self._exchange(connection, mirror, "GET", target, [*unit.headers, *conditions])
        if head.status != 206:
            if head.status == 200:
                raise ProtocolViolation(f"{address} sent the whole file where a range of it was asked for")
            if head.status in (412, 416):
                raise VersionChanged(f"{address} has another version of {unit.label} now")
            if head.status < 400:
                raise redirect_error(head, address)
            raise refusal(head, connection.read_document(self.tuning.max_document), address, unit.label)
        if parse_content_range(head.get("content-range")) != (begin, end, size):
            raise ProtocolViolation(f"{address} sent another range than the one that was asked for")
        if head.encoded or connection.remaining != end - begin:
            raise ProtocolViolation(
                f"{address} sent a range of {end - begin} bytes encoded, or without their number in Content-Length"
            )
        etag = head.get("etag")
        if etag == f"W/{expected_etag}":
            raise ProtocolViolation(
                f"a proxy on the way to {address} changes responses (it weakened the entity tag of {unit.label}); go "
                "round it, or have it leave responses alone"
            )
        if etag != expected_etag:
            raise VersionChanged(f"{address} sent bytes of another version of {unit.label}")
