"""One HTTP worker process: the server, the application, and the pollers that keep its view of the world fresh.

Nothing a poller waits for can hold up a download: snapshots and the ledger are read on threads, and what they found is
put in place on the event loop.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

import structlog

from bzstream.api.app import Api
from bzstream.api.metrics import CHAIN_AGE, CONNECTIONS, DOWNLOADS, SNAPSHOT_BLOCK, SNAPSHOT_TIME, Telemetry
from bzstream.api.tokens import open_tokens
from bzstream.api.view import View
from bzstream.config import Settings
from bzstream.errors import BzstreamError
from bzstream.http import Server
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import AsyncLedger

__all__ = ["run"]

log = structlog.get_logger("worker")


async def run(
    settings: Settings, listener: socket.socket, stop: asyncio.Event, changes: asyncio.Queue[Settings]
) -> None:
    """Serve `listener` until `stop`, then drain. `changes` brings settings that were read again.

    Raises BzstreamError when the worker cannot start.
    """
    view = View(
        settings=settings,
        library=SnapshotCache(settings.store_path(), warn=lambda text: log.warning(text)),
        tokens=open_tokens(settings.auth),
        ledger=None,
        loopback=ip_address(listener.getsockname()[0]).is_loopback,
    )
    telemetry = Telemetry()
    server = Server(settings.http, Api(view), telemetry)
    poll = settings.store.poll_s
    await _refresh_library(view)
    server.start([listener])
    gc.freeze()  # what has come so far stays to the end: full collections need not walk it
    pollers = [
        asyncio.create_task(_every(poll, lambda: _refresh_library(view))),
        asyncio.create_task(_every(poll, lambda: _refresh_files(view, server))),
        asyncio.create_task(_every(settings.ledger.poll_s, lambda: _refresh_chain(view))),
        asyncio.create_task(_apply(changes, view, server, telemetry)),
    ]
    log.info("ready")
    stopped: asyncio.Future[object] = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([stopped, server.failure], return_when=asyncio.FIRST_COMPLETED)
        if server.failure.done():
            raise BzstreamError("the worker can send no more; its supervisor starts another")
        view.draining = True
        await server.drain(settings.http.drain_s)
    finally:
        stopped.cancel()
        for poller in pollers:
            poller.cancel()
        await server.close()
        if view.ledger is not None:
            await asyncio.to_thread(view.ledger.close)


async def _every(seconds: float, step: Callable[[], Awaitable[None]]) -> None:
    """Run `step` again and again; a failure is logged once until the step works again."""
    failing = False
    while True:
        try:
            await step()
            failing = False
        except (BzstreamError, OSError) as error:
            if not failing:
                log.warning("cannot refresh, going on with what is known", reason=str(error))
            failing = True
        await asyncio.sleep(seconds)


async def _refresh_library(view: View) -> None:
    if view.library.apply(await asyncio.to_thread(view.library.scan)):
        current = view.library.current
        if current is not None:
            SNAPSHOT_BLOCK.set(current.block)
            SNAPSHOT_TIME.set(current.published_at)
            log.info("snapshot", version=current.version, block=current.block)
    view.damaged = view.library.damaged


async def _refresh_files(view: View, server: Server) -> None:
    DOWNLOADS.set(server.downloads)
    CONNECTIONS.set(server.connections)
    if view.tokens.refresh():
        log.info("tokens file read again")


async def _refresh_chain(view: View) -> None:
    if view.ledger is None:
        view.ledger = await asyncio.to_thread(AsyncLedger.open, view.settings.ledger_location())
    view.chain = await view.ledger.chain_state()
    if view.settings.evaluation.enabled:
        view.evaluator_age = await view.ledger.evaluator_age()
    if view.chain is not None:
        CHAIN_AGE.set(view.chain.age(time.time()))


async def _apply(changes: asyncio.Queue[Settings], view: View, server: Server, telemetry: Telemetry) -> None:
    """Put settings that were read again into force, as far as they can change while the worker runs."""
    while True:
        settings = await changes.get()
        view.settings = settings
        server.settings = settings.http
        telemetry.refresh()
        log.info("settings in force")
