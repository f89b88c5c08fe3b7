"""The supervisor: the process of `bzstream serve` that starts the roles as children and starts again what dies.

It runs on one thread with an asyncio loop of its own. It serves no client, only /metrics, whose counters come from all
processes through files in a shared folder. SIGTERM and SIGINT drain the node, a second one kills it, SIGHUP reads the
settings again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import structlog

from bzstream import logs
from bzstream.config import Settings
from bzstream.errors import BzstreamError
from bzstream.http import Server
from bzstream.node.checks import check
from bzstream.node.child import ChildSpec, Role
from bzstream.node.listeners import open_listeners

__all__ = ["serve"]

RESTART_FIRST_S, RESTART_MAX_S, RESTART_FORGET_S = 0.25, 30.0, 60.0
"""A child that died starts again after 0.25 s, and each time twice as late, up to 30 s. After a child has lived for a
minute the next pause is 0.25 s again."""

KILL_GRACE_S = 5.0
"""How long a child may take to end after `http.drain_s` has passed; then it is killed."""


def serve(roles: frozenset[Role], load_settings: Callable[[], Settings]) -> int:
    """Run the roles until SIGTERM or SIGINT; returns the exit status for the shell.

    `load_settings` is called now and at each SIGHUP. Raises BzstreamError before anything was started.
    """
    settings = load_settings()
    logs.configure(settings.log)
    roles = check(settings, roles)
    listeners = open_listeners(settings.http) if "http" in roles else []
    with metrics_folder():
        return asyncio.run(_Supervisor(settings, roles, load_settings, listeners).run())


@contextlib.contextmanager
def metrics_folder() -> Iterator[None]:
    """The folder through which processes share their Prometheus counters; those of dead supervisors are removed."""
    parent = Path(tempfile.gettempdir())
    for stale in parent.glob("bzstream-metrics-*-*"):
        owner = stale.name.split("-")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"bzstream-metrics-{os.getpid()}-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        roles: frozenset[Role],
        load_settings: Callable[[], Settings],
        listeners: list[socket.socket],
    ) -> None:
        self._settings = settings
        self._roles = roles
        self._load_settings = load_settings
        self._listeners = listeners
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._force_exit = asyncio.Event()
        self._log = structlog.get_logger("supervisor")

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        metrics = self._serve_metrics()
        monitors = [asyncio.create_task(self._monitor(spec)) for spec in self._children()]
        if self._listeners:
            host, port = self._listeners[0].getsockname()[:2]
            self._log.info("serving", host=host, port=port, workers=len(self._listeners), pid=os.getpid())
        await self._stopping.wait()
        for listener in self._listeners:  # with the workers' own copies closed too, new connections are refused
            listener.close()
        self._signal_children(signal.SIGTERM)
        await self._end(monitors)
        if metrics is not None:
            await metrics.close()
        return 0

    def _children(self) -> list[ChildSpec]:
        children: list[ChildSpec] = []
        if "chain" in self._roles:
            children.append(ChildSpec("chain", 0, self._settings))
        for index, listener in enumerate(self._listeners):
            children.append(ChildSpec("http", index, self._settings, listen_fd=listener.fileno()))
        if self._listeners and self._settings.coding.enabled:
            children.append(ChildSpec("coding", 0, self._settings))
        if "evaluator" in self._roles:
            devices = [self._settings.evaluation.device] if self._settings.evaluation.device else gpus() or ["cpu"]
            children += [ChildSpec("evaluator", i, self._settings, device=device) for i, device in enumerate(devices)]
        return children

    async def _monitor(self, spec: ChildSpec) -> None:
        """Start a child, and start it again whenever it dies, until the node stops."""
        pause = RESTART_FIRST_S
        while not self._stopping.is_set():
            started = time.monotonic()
            process = await self._spawn(spec)
            self._processes[spec.name] = process
            status = await process.wait()
            del self._processes[spec.name]
            forget_metrics_of(process.pid)
            if self._stopping.is_set():
                return
            if time.monotonic() - started > RESTART_FORGET_S:
                pause = RESTART_FIRST_S
            self._log.error("child died", child=spec.name, status=status, restart_in_s=pause)
            count_restart(spec.role)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(2 * pause, RESTART_MAX_S)

    async def _spawn(self, spec: ChildSpec) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bzstream.node", spec.role),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=() if spec.listen_fd is None else (spec.listen_fd,),
        )
        self._send(process, msgspec.structs.replace(spec, settings=self._settings))
        return process

    def _send(self, process: asyncio.subprocess.Process, message: msgspec.Struct) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.json.encode(message) + b"\n")

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._force_exit.set()
        self._stopping.set()

    def _reload(self) -> None:
        try:
            self._settings = self._load_settings()
        except BzstreamError as error:
            self._log.warning("settings not reloaded", reason=str(error))
            return
        logs.configure(self._settings.log)
        for process in self._processes.values():
            self._send(process, self._settings)
        self._log.info("settings reloaded")

    def _signal_children(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    async def _end(self, monitors: list[asyncio.Task[None]]) -> None:
        """Wait for the children to drain; kill what is left at the deadline, or at a second signal."""
        all_ended = asyncio.ensure_future(asyncio.wait(monitors))
        forced = asyncio.ensure_future(self._force_exit.wait())
        grace = self._settings.http.drain_s + KILL_GRACE_S
        await asyncio.wait([all_ended, forced], timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        if not all_ended.done():
            self._signal_children(signal.SIGKILL)
        await all_ended

    def _serve_metrics(self) -> Server | None:
        if self._settings.metrics.port is None:
            return None
        from bzstream.api.metrics import serve_metrics

        server, port = serve_metrics(self._settings.metrics)
        self._log.info("serving metrics", host=self._settings.metrics.host, port=port)
        return server


def forget_metrics_of(pid: int) -> None:
    """Remove the live gauges of a process that has ended."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def count_restart(role: Role) -> None:
    from bzstream.api.metrics import RESTARTS

    RESTARTS.labels(role).inc()


def gpus() -> list[str]:
    """`cuda:<n>` for each NVIDIA GPU of the machine, found without torch: the supervisor stays light."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [f"cuda:{i}" for i, name in enumerate(visible.split(",")) if name.strip() not in ("", "-1")]
    return [f"cuda:{i}" for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
