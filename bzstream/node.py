"""Puts the roles together into processes: the supervisor of `bzstream serve`, and the entry of each of its children.

The supervisor opens the listening sockets and hands one to each HTTP worker, so that a worker that died and was
started again inherits the connections which the kernel queued meanwhile. It serves nothing itself but /metrics.

A child is `python -m bzstream.node <role>` with a pipe for its standard input. The pipe carries the settings, a JSON
line at the start and another one after each SIGHUP, and it is the child's leash: when the supervisor is gone, however
it went, the pipe closes and the child ends. (PR_SET_PDEATHSIG does the same for a child that is stuck.) Settings hold
tokens, so they travel neither in arguments nor in the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog
import uvloop

from bzstream import logs
from bzstream.config import Settings
from bzstream.errors import BzstreamError
from bzstream.http import Server
from bzstream.http.tls import Certificate

__all__ = ["NodeError", "Role", "serve"]

Role = Literal["http", "chain", "evaluator"]

RESTART_FIRST_S, RESTART_MAX_S, RESTART_FORGET_S = 0.25, 30.0, 60.0
"""A child that died starts again after 0.25 s, twice as long each time up to 30 s; a minute of life forgets it all."""

KILL_GRACE_S = 5.0
"""Beyond `http.drain_s`, how long a child may take to end before it is killed."""

_PR_SET_PDEATHSIG = 1
_SCORING_NICE = 5
"""On full cores an evaluator stands back behind requests, as the threads that send do, and shares with those evenly."""


class NodeError(BzstreamError):
    """The node cannot start: a busy port, a missing store."""


class Child(msgspec.Struct, frozen=True):
    """What a child is told on its first line: its settings, and what only the supervisor knows."""

    role: Role
    index: int
    settings: Settings
    listen_fd: int | None = None
    device: str | None = None


# ---------------------------------------------------------------------------------------------------- the supervisor


def serve(settings: Settings, roles: frozenset[Role], reload: Callable[[], Settings]) -> int:
    """Run the roles until SIGTERM or SIGINT; the exit status for the shell.

    `reload` makes the settings afresh, for SIGHUP. Raises NodeError before anything was started.
    """
    logs.configure(settings.log)
    roles = check(settings, roles)
    sockets = listen(settings) if "http" in roles else []
    with metrics_folder():
        return asyncio.run(_Supervisor(settings, roles, reload, sockets).run())


def check(settings: Settings, roles: frozenset[Role]) -> frozenset[Role]:
    """Find now what would make a child fail later, again and again; the roles that will run. Raises BzstreamError."""
    settings.store_path().mkdir(parents=True, exist_ok=True)
    if "http" in roles:
        from bzstream.api.tokens import open_tokens

        open_tokens(settings.auth)
        cert, key = settings.http.tls_cert, settings.http.tls_key
        if (cert is None) != (key is None):
            raise NodeError("a certificate and its key go together; give both --tls-cert and --tls-key")
        if cert is not None and key is not None:
            Certificate(cert, key)
        for network in settings.http.trusted_proxies:
            try:
                ip_network(network)
            except ValueError as error:
                raise NodeError(f"http.trusted_proxies: {error}; name networks such as 10.0.0.0/8") from None
    if "evaluator" not in roles or not settings.evaluation.enabled:
        return roles - {"evaluator"}
    if settings.evaluation.data is None:
        structlog.get_logger("supervisor").warning(
            "nothing will be scored: set evaluation.data, or say --no-evaluator to mean it"
        )
        return roles - {"evaluator"}
    from bzstream.evaluation.data import require_data

    require_data(settings.evaluation.data)
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise NodeError(f"scoring needs {' and '.join(missing)}; install bzstream[validator], or say --no-evaluator")
    return roles


def listen(settings: Settings) -> list[socket.socket]:
    """One SO_REUSEPORT socket a worker, bound and listening. Raises NodeError when the address cannot be had.

    SO_REUSEPORT lets a second process of the same user take half of the connections without a word, so a plain bind
    goes first: it fails when anybody else listens.
    """
    host, port = settings.http.host, settings.http.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            address = probe.getsockname()
        sockets = []
        for _ in range(settings.http.workers):
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(settings.http.backlog)
            listener.setblocking(False)
            sockets.append(listener)
    except OSError as error:
        raise NodeError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return sockets


@contextlib.contextmanager
def metrics_folder() -> Any:
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
        reload: Callable[[], Settings],
        sockets: list[socket.socket],
    ) -> None:
        self.settings = settings
        self.roles = roles
        self.reload = reload
        self.sockets = sockets
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.stopping = asyncio.Event()
        self.impatient = asyncio.Event()
        self.log = structlog.get_logger("supervisor")

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        metrics = self._serve_metrics()
        keepers = [asyncio.create_task(self._keep(child)) for child in self._children()]
        if self.sockets:
            host, port = self.sockets[0].getsockname()[:2]
            self.log.info("serving", host=host, port=port, workers=len(self.sockets), pid=os.getpid())
        await self.stopping.wait()
        for listener in self.sockets:  # with the workers' own copies closed too, new connections are refused
            listener.close()
        self._signal(signal.SIGTERM)
        await self._end(keepers)
        if metrics is not None:
            await metrics.close()
        return 0

    def _children(self) -> list[Child]:
        children: list[Child] = []
        if "chain" in self.roles:
            children.append(Child("chain", 0, self.settings))
        if "http" in self.roles:
            children += [Child("http", i, self.settings, listen_fd=s.fileno()) for i, s in enumerate(self.sockets)]
        if "evaluator" in self.roles:
            devices = [self.settings.evaluation.device] if self.settings.evaluation.device else gpus() or ["cpu"]
            children += [Child("evaluator", i, self.settings, device=d) for i, d in enumerate(devices)]
        return children

    async def _keep(self, child: Child) -> None:
        """Start a child, and start it again whenever it dies, until the node stops."""
        name, pause = f"{child.role}-{child.index}", RESTART_FIRST_S
        while not self.stopping.is_set():
            started = time.monotonic()
            process = await self._spawn(child)
            self.processes[name] = process
            status = await process.wait()
            del self.processes[name]
            metrics_of_dead(process.pid)
            if self.stopping.is_set():
                return
            if time.monotonic() - started > RESTART_FORGET_S:
                pause = RESTART_FIRST_S
            self.log.error("child died", child=name, status=status, restart_in_s=pause)
            count_restart(child.role)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), pause)
            pause = min(2 * pause, RESTART_MAX_S)

    async def _spawn(self, child: Child) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bzstream.node",
            child.role,
            stdin=asyncio.subprocess.PIPE,
            pass_fds=() if child.listen_fd is None else (child.listen_fd,),
        )
        self._tell(process, msgspec.structs.replace(child, settings=self.settings))
        return process

    def _tell(self, process: asyncio.subprocess.Process, message: msgspec.Struct) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.json.encode(message) + b"\n")

    def _stop(self) -> None:
        if self.stopping.is_set():
            self.impatient.set()
        self.stopping.set()

    def _reload(self) -> None:
        try:
            self.settings = self.reload()
        except BzstreamError as error:
            self.log.warning("settings not reloaded", reason=str(error))
            return
        logs.configure(self.settings.log)
        for process in self.processes.values():
            self._tell(process, self.settings)
        self.log.info("settings reloaded")

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    async def _end(self, keepers: list[asyncio.Task[None]]) -> None:
        """Wait for the children to drain; kill what is left at the deadline, or at a second signal."""
        everybody = asyncio.ensure_future(asyncio.wait(keepers))
        impatient = asyncio.ensure_future(self.impatient.wait())
        grace = self.settings.http.drain_s + KILL_GRACE_S
        await asyncio.wait([everybody, impatient], timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        if not everybody.done():
            self._signal(signal.SIGKILL)
        await everybody

    def _serve_metrics(self) -> Server | None:
        if self.settings.metrics.port is None:
            return None
        from bzstream.api.metrics import serve_metrics

        server, port = serve_metrics(self.settings.metrics)
        self.log.info("serving metrics", host=self.settings.metrics.host, port=port)
        return server


def metrics_of_dead(pid: int) -> None:
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def count_restart(role: str) -> None:
    from bzstream.api.metrics import RESTARTS

    RESTARTS.labels(role).inc()


def gpus() -> list[str]:
    """`cuda:<n>` for each NVIDIA GPU of the machine, found without torch: the supervisor stays light."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [f"cuda:{i}" for i, name in enumerate(visible.split(",")) if name.strip() not in ("", "-1")]
    return [f"cuda:{i}" for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


# --------------------------------------------------------------------------------------------------------- the child


def child_main() -> None:
    """Run one role as a child of the supervisor."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor alone decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:  # the supervisor died before it said anything
        return
    child = msgspec.json.decode(line, type=Child)
    logs.configure(child.settings.log, role=child.role, worker=child.index)
    try:
        if child.role == "evaluator":
            asyncio.run(_live(child))
        else:
            uvloop.run(_live(child))
    except BzstreamError as error:
        structlog.get_logger(child.role).error("cannot run", reason=str(error))
        sys.exit(1)


async def _live(child: Child) -> None:
    """Run the role until it is told to stop (SIGTERM) or the supervisor is gone (end of the pipe: at once)."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    reader = asyncio.StreamReader(limit=1024 * 1024)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    changes: asyncio.Queue[Settings] = asyncio.Queue()
    leash = asyncio.create_task(_hold_leash(reader, changes, child))
    try:
        await _run(child, stop, changes)
    finally:
        leash.cancel()


async def _hold_leash(reader: asyncio.StreamReader, changes: asyncio.Queue[Settings], child: Child) -> None:
    while line := await reader.readline():
        settings = msgspec.json.decode(line, type=Settings)
        logs.configure(settings.log, role=child.role, worker=child.index)
        changes.put_nowait(settings)
    os._exit(0)  # nobody is left to drain for


async def _run(child: Child, stop: asyncio.Event, changes: asyncio.Queue[Settings]) -> None:
    if child.role == "http":
        from bzstream.api import worker

        assert child.listen_fd is not None
        await worker.run(child.settings, socket.socket(fileno=child.listen_fd), stop, changes)
    elif child.role == "chain":
        from bzstream.chain import role as chain_role
        from bzstream.submissions.ledger import AsyncLedger

        ledger = await asyncio.to_thread(AsyncLedger.open, child.settings.ledger_location())
        try:
            await chain_role.run(
                child.settings.chain,
                ledger.write_chain_state,
                stop,
                book=ledger,
                wallet=child.settings.node.wallet,
            )
        finally:
            await asyncio.to_thread(ledger.close)
    else:
        from bzstream.evaluation import role as evaluation_role

        os.nice(_SCORING_NICE)
        await evaluation_role.run(child.settings, child.settings.store_path(), device=child.device, stop=stop)


if __name__ == "__main__":
    child_main()
