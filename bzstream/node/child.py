"""A child process of the supervisor, which runs one role.

Its standard input is a pipe from the supervisor. The pipe carries the settings: a JSON line with a `ChildSpec` at the
start, and a line with the `Settings` after each SIGHUP. Settings hold tokens, so they travel neither in arguments nor
in the environment. When the supervisor is gone, however it ended, the pipe closes and the child exits at once.
(PR_SET_PDEATHSIG does the same for a child that is stuck.)
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
from functools import partial
from typing import Literal

import msgspec
import structlog
import uvloop

from bzstream import logs
from bzstream.config import Settings
from bzstream.errors import BzstreamError

__all__ = ["ChildSpec", "Role", "main"]

Role = Literal["http", "chain", "evaluator", "coding"]

_PR_SET_PDEATHSIG = 1
_CODING_NICE = 19
"""Coded files are made of what is left over: nobody waits for them."""
_EVALUATOR_NICE = 5
"""On busy cores the evaluator gives way to requests; the threads that send have the same nice value."""


class ChildSpec(msgspec.Struct, frozen=True):
    """What the supervisor tells a child on its first line."""

    role: Role
    index: int
    settings: Settings
    listen_fds: tuple[int, ...] = ()
    """For an HTTP worker: the inherited descriptors of its listening sockets."""
    ready_fd: int | None = None
    """For an HTTP worker: a pipe into which it writes its index when it serves."""
    device: str | None = None
    """For an evaluator: the torch device."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


def main() -> None:
    """Run one role as a child of the supervisor. Exit status 1 when the role cannot run."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor alone decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:  # the supervisor ended before it wrote anything
        return
    spec = msgspec.json.decode(line, type=ChildSpec)
    logs.configure(spec.settings.log, role=spec.role, worker=spec.index)
    run = asyncio.run if spec.role == "evaluator" else uvloop.run
    try:
        run(_live(spec))
    except BzstreamError as error:
        structlog.get_logger(spec.role).error("cannot run", reason=str(error))
        sys.exit(1)


async def _live(spec: ChildSpec) -> None:
    """Run the role until SIGTERM, or SIGUSR1 when others serve on the same sockets from then on.

    Ends the process at once when the supervisor's end of the pipe closes.
    """
    stop, outlived = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    def stop_outlived() -> None:
        outlived.set()
        stop.set()

    loop.add_signal_handler(signal.SIGUSR1, stop_outlived)
    parent_pipe = asyncio.StreamReader(limit=1024 * 1024)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent_pipe), sys.stdin)
    changes: asyncio.Queue[Settings] = asyncio.Queue()
    reading = asyncio.create_task(_read_parent_pipe(parent_pipe, changes, spec))
    try:
        await _run_role(spec, stop, outlived, changes)
    finally:
        reading.cancel()


async def _read_parent_pipe(pipe: asyncio.StreamReader, changes: asyncio.Queue[Settings], spec: ChildSpec) -> None:
    while line := await pipe.readline():
        settings = msgspec.json.decode(line, type=Settings)
        logs.configure(settings.log, role=spec.role, worker=spec.index)
        changes.put_nowait(settings)
    os._exit(0)  # draining would serve nobody: the supervisor is gone, and its successor has the port


def _tell_ready(spec: ChildSpec) -> None:
    if spec.ready_fd is not None:
        os.write(spec.ready_fd, bytes([spec.index % 256]))
        os.close(spec.ready_fd)


async def _run_role(
    spec: ChildSpec, stop: asyncio.Event, outlived: asyncio.Event, changes: asyncio.Queue[Settings]
) -> None:
    settings = spec.settings
    if spec.role == "http":
        from bzstream.api import worker

        listeners = [socket.socket(fileno=fd) for fd in spec.listen_fds]
        await worker.run(settings, listeners, stop, changes, ready=partial(_tell_ready, spec), outlived=outlived)
    elif spec.role == "chain":
        from bzstream.chain import role as chain_role
        from bzstream.model.store import Store
        from bzstream.submissions.ledger import AsyncLedger

        ledger = await asyncio.to_thread(AsyncLedger.open, settings.ledger_location())
        try:
            await chain_role.run(
                settings.chain,
                ledger.write_chain_state,
                stop,
                ledger=ledger,
                store=Store(settings.store_path()),
                wallet=settings.node.wallet,
                certificate=settings.http.tls_cert,
            )
        finally:
            await asyncio.to_thread(ledger.close)
    elif spec.role == "coding":
        from bzstream.node import coding_role

        os.nice(_CODING_NICE)
        await coding_role.run(settings, stop)
    else:
        from bzstream.evaluation import role as evaluation_role

        os.nice(_EVALUATOR_NICE)
        await evaluation_role.run(settings, settings.store_path(), device=spec.device, stop=stop)
