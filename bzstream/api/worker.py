"""One HTTP worker process: the server, the application, and the pollers that keep the worker's state fresh.

The supervisor's child calls `run` on its event loop. Nothing that a poller waits for holds up a download: files,
snapshots and the ledger are read on threads, and what they hold is put in place on the event loop.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path

import structlog

from bzstream.api.access import AccessFiles
from bzstream.api.app import Api
from bzstream.api.metrics import (
    CHAIN_AGE,
    CONNECTIONS,
    DOWNLOADS,
    SNAPSHOT_BLOCK,
    SNAPSHOT_TIME,
    WEIGHTS_ROUND,
    Telemetry,
)
from bzstream.api.state import WorkerState
from bzstream.config import Settings
from bzstream.errors import BzstreamError
from bzstream.http import Server
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import AsyncLedger
from bzstream.util.warn_once import WarnOnce

__all__ = ["run"]

LEDGER_NEEDS = 64 * 1024
"""Bytes: a commit appends some pages of 4 KiB to the write-ahead log."""

POLL_S = 0.25
"""How often a worker looks for a new snapshot, tokens file or TLS certificate. The contract: in force within 1 s."""
CHAIN_POLL_S = 0.2
"""How often a worker reads the chain's state from the ledger. The chain role looks at a chain file as often."""

log = structlog.get_logger("worker")


async def run(
    settings: Settings,
    listeners: list[socket.socket],
    stop: asyncio.Event,
    changes: asyncio.Queue[Settings],
    *,
    ready: Callable[[], object],
    outlived: asyncio.Event,
) -> None:
    """Serve `listeners` until `stop`, then drain. `changes` brings settings that were read again.

    `ready` is called when the worker serves. `outlived` is set when others accept connections on the same sockets after
    the stop: then nobody who is connected is refused. Raises BzstreamError when the worker cannot start.
    """
    state = WorkerState(
        settings=settings,
        snapshots=SnapshotCache(settings.store_path(), warn=_warn),
        access=AccessFiles(settings.auth, _warn),
        ledger=None,
        loopback=ip_address(listeners[0].getsockname()[0]).is_loopback,
    )
    telemetry = Telemetry()
    server = Server(settings.http, Api(state), telemetry)
    await _refresh_snapshots(state)
    server.start(listeners)
    gc.freeze()  # what has come so far stays to the end: full collections need not walk it
    pollers = [
        asyncio.create_task(_every(POLL_S, lambda: _refresh_snapshots(state))),
        asyncio.create_task(_every(POLL_S, lambda: _refresh_access(state))),
        asyncio.create_task(_every(CHAIN_POLL_S, lambda: _refresh_chain(state))),
        asyncio.create_task(_every(POLL_S, lambda: _update_gauges(server))),
        asyncio.create_task(_apply(changes, state, server, telemetry)),
    ]
    log.info("ready")
    ready()
    stopped: asyncio.Future[object] = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([stopped, server.failure], return_when=asyncio.FIRST_COMPLETED)
        if server.failure.done():
            raise BzstreamError("the worker can send no more; its supervisor starts another")
        state.draining = not outlived.is_set()
        await server.drain(settings.http.drain_s, outlived=outlived.is_set())
    finally:
        stopped.cancel()
        for poller in pollers:
            poller.cancel()
        await server.close()
        if state.ledger is not None:
            await asyncio.to_thread(state.ledger.close)


def _warn(text: str) -> None:
    log.warning(text)


async def _every(seconds: float, step: Callable[[], Awaitable[None]]) -> None:
    """Run `step` again and again; a failure is logged once until the step works again."""
    failures = WarnOnce(log.warning)
    while True:
        try:
            await step()
            failures.succeeded()
        except (BzstreamError, OSError) as error:
            failures.failed("cannot refresh, going on with what is known", reason=str(error))
        await asyncio.sleep(seconds)


async def _refresh_snapshots(state: WorkerState) -> None:
    if state.snapshots.apply(await asyncio.to_thread(state.snapshots.scan)):
        current = state.snapshots.current
        if current is not None:
            SNAPSHOT_BLOCK.set(current.block)
            SNAPSHOT_TIME.set(current.published_at)
            log.info("snapshot", version=current.version, block=current.block)
    state.damaged = state.snapshots.damaged


async def _refresh_access(state: WorkerState) -> None:
    if await asyncio.to_thread(state.access.refresh):
        log.info("tokens and denied callers read again")


async def _refresh_chain(state: WorkerState) -> None:
    try:
        if state.ledger is None:
            state.ledger = await asyncio.to_thread(AsyncLedger.open, state.settings.ledger_location())
        state.chain = await state.ledger.chain_state()
        if state.settings.evaluation.enabled:
            state.evaluator_age = await state.ledger.evaluator_age()
        if state.settings.chain.set_weights:
            state.weights = await state.ledger.round_weights()
            if state.weights is not None:
                WEIGHTS_ROUND.labels(state.weights.outcome).set(state.weights.round)
    except BzstreamError:
        state.ledger_problem = "the ledger cannot be read"
        raise
    state.ledger_problem = await asyncio.to_thread(_disk_problem, state.settings.ledger_location())
    if state.chain is not None:
        CHAIN_AGE.set(state.chain.age(time.time()))


def _disk_problem(ledger: str) -> str | None:
    """A full disk still lets everybody read, so that a ledger that nobody can write to only looks old."""
    if "://" in ledger:
        return None
    disk = os.statvfs(Path(ledger).parent)
    return "the disk that holds the ledger is full" if disk.f_bavail * disk.f_frsize < LEDGER_NEEDS else None


async def _update_gauges(server: Server) -> None:
    DOWNLOADS.set(server.downloads)
    CONNECTIONS.set(server.connections)


async def _apply(changes: asyncio.Queue[Settings], state: WorkerState, server: Server, telemetry: Telemetry) -> None:
    """Put settings that were read again into force, as far as they can change while the worker runs.

    Tokens and files that cannot be used leave those before them in force, and the other settings change.
    """
    while True:
        settings = await changes.get()
        try:
            state.access = await asyncio.to_thread(AccessFiles, settings.auth, _warn)
        except BzstreamError as error:
            log.warning("the tokens of the new settings cannot be used, those before stay in force", reason=str(error))
        state.settings = settings
        server.settings = settings.http
        telemetry.refresh()
        log.info("settings in force")
