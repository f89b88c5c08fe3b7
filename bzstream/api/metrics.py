"""What the node tells Prometheus and the log about itself.

Several processes count: each worker writes into files of PROMETHEUS_MULTIPROC_DIR, and the supervisor, whose listener
answers /metrics, adds them up. (prometheus_client reads that variable when it is first imported, so this module is
imported only in processes that the supervisor has prepared.)

Labels are bounded: routes are patterns, units those of the store, methods the ones that HTTP names.
"""

from __future__ import annotations

import logging
import socket
import traceback
from pathlib import Path

import structlog
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from bzstream.config import HttpSettings, MetricsSettings
from bzstream.errors import BzstreamError
from bzstream.http import Endpoint, Observer, Request, RequestRecord, Response, Router, Server

__all__ = [
    "CHAIN_AGE",
    "DOWNLOADS",
    "RESTARTS",
    "SNAPSHOT_BLOCK",
    "SNAPSHOT_TIME",
    "WEIGHTS_ROUND",
    "Telemetry",
    "serve_metrics",
]

REQUESTS = Counter("bzstream_http_requests", "Answered requests", ["method", "route", "status"])
SENT = Counter("bzstream_http_sent_bytes", "Body bytes handed to the kernel", ["route"])
UNITS = Counter("bzstream_unit_downloads", "Downloads of a unit, whole or in ranges", ["unit", "outcome"])
UNIT_BYTES = Counter("bzstream_unit_sent_bytes", "Bytes of a unit handed to the kernel", ["unit"])
SECONDS = Histogram(
    "bzstream_http_request_seconds",
    "From the first byte of a request to the last byte of its response",
    ["route"],
    buckets=(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 15, 60, 240, 900),
)
QUEUED = Histogram(
    "bzstream_send_queue_seconds",
    "How long a response waited for its first turn in the run queue",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
)
STALLS = Histogram(
    "bzstream_loop_stall_seconds",
    "How late the event loop was, from 10 ms up",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.25, 1),
)
DOWNLOADS = Gauge("bzstream_downloads_in_progress", "Downloads under way", multiprocess_mode="livesum")
CONNECTIONS = Gauge("bzstream_connections", "Open connections", multiprocess_mode="livesum")
SNAPSHOT_BLOCK = Gauge("bzstream_snapshot_block", "Block of the current snapshot", multiprocess_mode="livemostrecent")
SNAPSHOT_TIME = Gauge(
    "bzstream_snapshot_published_seconds", "When the current snapshot was published", multiprocess_mode="livemostrecent"
)
CHAIN_AGE = Gauge("bzstream_chain_age_seconds", "Since the chain was last heard of", multiprocess_mode="livemostrecent")
WEIGHTS_ROUND = Gauge(
    "bzstream_weights_round",
    "Newest round whose weights had this outcome on the chain (due, sent, set, refused, missed)",
    ["outcome"],
    multiprocess_mode="livemostrecent",
)
RESTARTS = Counter("bzstream_child_restarts", "Children that died and were started again", ["role"])
DAMAGED = Counter("bzstream_damaged_files", "Files found shorter or changed while they were served")

_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})


class _Exposition:
    """`bzstream.http.Application` with one endpoint: all processes' figures as Prometheus text."""

    def __init__(self) -> None:
        self._router = Router()
        self._router.add("GET", "/metrics", Endpoint(self._metrics))

    def admit(self, request: Request) -> Endpoint:
        return self._router.match(request)

    def _metrics(self, _: Request) -> Response:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(200, (("Content-Type", CONTENT_TYPE_LATEST),), generate_latest(registry))


def serve_metrics(settings: MetricsSettings) -> tuple[Server, int]:
    """Answer /metrics on the running loop: (the server, to be closed; its port). Raises BzstreamError for a busy port.

    The listener has no token: it shows figures alone, and by default only to this machine.
    """
    assert settings.port is not None
    try:
        listener = socket.create_server((settings.host, settings.port))
    except OSError as error:
        raise BzstreamError(
            f"cannot serve metrics on {settings.host} port {settings.port}: {error.strerror}; set metrics.port"
        ) from None
    listener.setblocking(False)
    server = Server(HttpSettings(), _Exposition(), Observer())
    port: int = listener.getsockname()[1]
    server.start([listener])
    return server, port


class Telemetry(Observer):
    """`bzstream.http.Observer`: a log line and the figures for each request."""

    def __init__(self) -> None:
        # Finding a metric's child by its labels costs more than counting. There are few: labels are bounded.
        self._children: dict[tuple[str, str, int], tuple[Counter, Counter, Histogram]] = {}
        self.refresh()

    def refresh(self) -> None:
        """The settings of the log have changed."""
        self._log = structlog.get_logger("http").bind()
        self._tells_health = self._log.is_enabled_for(logging.DEBUG)

    def on_request(self, record: RequestRecord) -> None:
        """Count and log one request: unit, bytes, seconds, caller; never a token, a signature or a raw target."""
        method = record.method if record.method in _METHODS else "other"
        route = record.route or "none"
        children = self._children.get((method, route, record.status))
        if children is None:
            children = self._children[method, route, record.status] = (
                REQUESTS.labels(method, route, str(record.status)),
                SENT.labels(route),
                SECONDS.labels(route),
            )
        requests, sent, seconds = children
        requests.inc()
        sent.inc(record.sent)
        seconds.observe(record.seconds)
        if record.label:
            UNITS.labels(record.label, "complete" if record.complete else "broken_off").inc()
            UNIT_BYTES.labels(record.label).inc(record.sent)
            QUEUED.observe(record.queued)
        # Health checks come every second from every side; the level "debug" shows them.
        healthy = record.route in ("/health", "/ready") and record.status == 200
        if healthy and not self._tells_health:
            return
        log = self._log.debug if healthy else self._log.info
        log(
            "request",
            method=method,
            route=route,
            unit=record.label or None,
            status=record.status,
            bytes=record.sent,
            seconds=round(record.seconds, 6),
            caller=record.caller,
        )

    def on_stall(self, seconds: float) -> None:
        STALLS.observe(seconds)

    def on_warning(self, text: str) -> None:
        self._log.warning(text)

    def on_error(self, error: BaseException, request: Request | None) -> None:
        """A bug: the log gets the traceback, the client never does."""
        route = request.route if request is not None else ""
        self._log.error("bug", route=route, error="".join(traceback.format_exception(error)))

    def on_damage(self, path: Path) -> None:
        DAMAGED.inc()
        self._log.error("damaged file, no longer served", file=str(path))
