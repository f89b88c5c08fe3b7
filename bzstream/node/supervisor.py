"""The supervisor: the process of `bzstream serve` that starts the roles as children and starts again what dies.

It runs on one thread with an asyncio loop of its own. It serves no client, only /metrics, whose counters come from all
processes through files in a shared folder. SIGTERM and SIGINT drain the node, a second one kills it, SIGHUP reads the
settings again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import structlog

from bzstream import logs
from bzstream.config import Settings
from bzstream.errors import BzstreamError
from bzstream.http import Server
from bzstream.node import metrics_folder
from bzstream.node.checks import check
from bzstream.node.child import ChildSpec, Role
from bzstream.node.errors import NodeError
from bzstream.node.listeners import check_address, check_metrics_port, open_listeners
from bzstream.node.metrics_folder import MetricsFolder
from bzstream.node.succession import Predecessor, SuccessionSocket, inherited_from_systemd, predecessor_at
from bzstream.util.backoff import backoff

__all__ = ["serve"]

RESTART_FIRST_S, RESTART_MAX_S, RESTART_FORGET_S = 0.25, 30.0, 60.0
"""A child that died starts again after 0.25 s, and each time twice as late, up to 30 s. After a child has lived for a
minute the next pause is 0.25 s again."""

READY_S = 120.0
"""How long the HTTP workers of a successor may take until they serve; then it gives up."""

KILL_GRACE_S = 5.0
"""How long a child may take to end after `http.drain_s` has passed; then it is killed."""


def serve(
    roles: frozenset[Role],
    load_settings: Callable[[], Settings],
    *,
    take_over: Path | None = None,
    check_only: bool = False,
) -> int:
    """Run the roles until SIGTERM or SIGINT; returns the exit status for the shell.

    `load_settings` is called now and at each SIGHUP. `take_over`: the Unix socket at which this node succeeds the one
    that listens there and can be succeeded itself. `check_only`: find what would keep the node from running, and run
    nothing. Raises BzstreamError before anything was started.
    """
    settings = load_settings()
    logs.configure(settings.log)
    roles = check(settings, roles)
    os.environ.pop(metrics_folder.VARIABLE, None)
    with contextlib.ExitStack() as stack:
        predecessor = None if take_over is None else predecessor_at(take_over)
        listeners = inherited_from_systemd()
        outlived = bool(listeners)  # systemd goes on listening when this node ends
        if predecessor is not None:
            stack.callback(predecessor.close)
            listeners = predecessor.listeners
            check_address(listeners, settings.http)
        elif "http" in roles and not listeners:
            listeners = open_listeners(settings.http)
        for listener in listeners:
            stack.callback(listener.close)
        counters = None if settings.metrics.port is None else MetricsFolder()
        if counters is not None:
            stack.callback(counters.remove)
            counters.ensure()
            if predecessor is None:  # which holds the port until it has stepped down
                check_metrics_port(settings.metrics)
        if check_only:
            return 0
        supervisor = _Supervisor(settings, roles, load_settings, listeners, counters)
        succession = None if take_over is None else SuccessionSocket(take_over)
        return asyncio.run(supervisor.run(predecessor, succession, outlived=outlived))


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        roles: frozenset[Role],
        load_settings: Callable[[], Settings],
        listeners: list[socket.socket],
        counters: MetricsFolder | None,
    ) -> None:
        self._settings = settings
        self._roles = roles
        self._load_settings = load_settings
        self._listeners = listeners
        self._counters = counters
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._ready_workers: set[int] = set()
        self._ready_reader, self._ready_writer = os.pipe()
        self._all_ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._force_exit = asyncio.Event()
        self._log = structlog.get_logger("supervisor")

    async def run(self, predecessor: Predecessor | None, succession: SuccessionSocket | None, *, outlived: bool) -> int:
        """Run to the end. `outlived`: somebody else holds the listening sockets and goes on when this node ends."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_reader(self._ready_reader, self._note_ready)
        metrics = None if predecessor is not None else self._serve_metrics()
        workers = [asyncio.create_task(self._monitor(spec)) for spec in self._http_workers()]
        if predecessor is not None:
            await self._first(self._all_ready.wait(), self._stopping.wait(), seconds=READY_S)
            if not self._all_ready.is_set():
                self._log.error("the workers were not ready in time; the node before this one goes on", seconds=READY_S)
                self._stopping.set()
                self._signal_children(signal.SIGKILL)
                await asyncio.wait(workers)
                return 1
            await predecessor.step_down()
            with self._logged_errors():
                metrics = self._serve_metrics()
        others = [asyncio.create_task(self._monitor(spec)) for spec in self._other_roles()]
        if self._listeners:
            host, port = self._listeners[0].getsockname()[:2]
            self._log.info("serving", host=host, port=port, workers=len(workers), pid=os.getpid())
        successor = None
        if succession is not None:
            with self._logged_errors():
                succession.take_place()
            asking = asyncio.create_task(succession.successor(self._listeners))
            await self._first(asking, self._stopping.wait())
            successor = asking.result() if asking.done() else None
            succession.close(succeeded=successor is not None)
            self._stopping.set()
        await self._stopping.wait()
        for listener in self._listeners:  # once the workers' own copies are closed too, new connections are refused
            listener.close()
        if metrics is not None:
            await metrics.close()
        self._signal_children(signal.SIGTERM, "chain", "evaluator", "coding")
        self._signal_children(signal.SIGUSR1 if successor or outlived else signal.SIGTERM, "http")
        if successor is not None:
            self._log.info("succeeded by another node")
            await self._end(others, KILL_GRACE_S)
            await SuccessionSocket.report_end(successor)
        await self._end([*workers, *others], self._settings.http.drain_s + KILL_GRACE_S)
        return 0

    @contextlib.contextmanager
    def _logged_errors(self) -> Iterator[None]:
        """Once a predecessor has stepped down, nothing but the workers is worth ending for."""
        try:
            yield
        except BzstreamError as error:
            self._log.error("going on without", reason=str(error))

    @staticmethod
    async def _first(*waits: Awaitable[object], seconds: float | None = None) -> None:
        """Wait until one of them is done, or for so long; the others are cancelled."""
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        _, left = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()

    def _note_ready(self) -> None:
        self._ready_workers.update(os.read(self._ready_reader, 4096))
        if len(self._ready_workers) == self._settings.http.workers:
            self._all_ready.set()

    def _http_workers(self) -> list[ChildSpec]:
        """One for each listener that was opened here; of inherited listeners each worker has its share."""
        if not self._listeners:
            return []
        fds, count = [listener.fileno() for listener in self._listeners], self._settings.http.workers
        shares = [tuple(fds[i::count]) or (fds[i % len(fds)],) for i in range(count)]
        return [
            ChildSpec("http", i, self._settings, listen_fds=share, ready_fd=self._ready_writer)
            for i, share in enumerate(shares)
        ]

    def _other_roles(self) -> list[ChildSpec]:
        children: list[ChildSpec] = []
        if "chain" in self._roles:
            children.append(ChildSpec("chain", 0, self._settings))
        if "evaluator" in self._roles:
            devices = [self._settings.evaluation.device] if self._settings.evaluation.device else gpus() or ["cpu"]
            children += [ChildSpec("evaluator", i, self._settings, device=device) for i, device in enumerate(devices)]
        if self._listeners and self._settings.coding.enabled:
            children.append(ChildSpec("coding", 0, self._settings))
        return children

    async def _monitor(self, spec: ChildSpec) -> None:
        """Start a child, and start it again whenever it dies or cannot be started, until the node stops."""
        deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                status: int | str = await self._run_child(spec)
            except (OSError, NodeError) as error:  # no process, no descriptor, no room for its counters: it may pass
                status = str(error)
            if self._stopping.is_set():
                return
            deaths = 1 if time.monotonic() - started > RESTART_FORGET_S else deaths + 1
            pause = backoff(deaths, first=RESTART_FIRST_S, most=RESTART_MAX_S, jitter=False)
            self._log.error("child died", child=spec.name, status=status, restart_in_s=pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _run_child(self, spec: ChildSpec) -> int:
        """Run a child to its end; its exit status."""
        if self._counters is not None:
            self._counters.ensure()
        process = await self._spawn(spec)
        self._processes[spec.name] = process
        status = await process.wait()
        del self._processes[spec.name]
        if self._counters is not None and not self._stopping.is_set():
            count_restart(spec.role, process.pid)
        return status

    async def _spawn(self, spec: ChildSpec) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bzstream.node", spec.role),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(*spec.listen_fds, *(() if spec.ready_fd is None else (spec.ready_fd,))),
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

    def _signal_children(self, number: signal.Signals, *roles: Role) -> None:
        """Send a signal to the children of these roles, by default to all."""
        for name, process in self._processes.items():
            if not roles or name.startswith(roles):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    async def _end(self, monitors: list[asyncio.Task[None]], grace: float) -> None:
        """Wait for the children of these monitors; at the deadline, or at a second signal, kill what is left of all."""
        if not monitors:
            return
        all_ended = asyncio.ensure_future(asyncio.wait(monitors))
        await self._first(asyncio.shield(all_ended), self._force_exit.wait(), seconds=grace)
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


def count_restart(role: Role, pid: int) -> None:
    """Count the end of a child, and remove the live gauges that process `pid` has left."""
    from prometheus_client import multiprocess

    from bzstream.api.metrics import RESTARTS

    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
    RESTARTS.labels(role).inc()


def gpus() -> list[str]:
    """`cuda:<n>` for each NVIDIA GPU of the machine, found without torch: the supervisor stays light."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [f"cuda:{i}" for i, name in enumerate(visible.split(",")) if name.strip() not in ("", "-1")]
    return [f"cuda:{i}" for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
