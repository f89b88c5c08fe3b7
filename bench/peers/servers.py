"""Starts each server peer on a port of its own and reads what it costs from /proc."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Target:
    """A running server: where it serves `size` bytes, and the process (with its children) that does it."""

    host: str
    port: int
    path: str
    size: int
    pid: int
    headers: tuple[str, ...] = ()


def compiled(source: str, folder: Path) -> Path:
    """A C program of this folder, compiled on the spot. Raises CalledProcessError."""
    program = folder / Path(source).stem
    if not program.exists():
        subprocess.run(["cc", "-O2", "-pthread", "-o", program, HERE / source], check=True)
    return program


NGINX = """
{user}daemon off; worker_processes {workers}; error_log {folder}/error.log; pid {folder}/pid;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000000; {mode}
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{port} backlog=4096{tls};
        location = /file {{ alias {file}; }}
        location = /health {{
            default_type application/json;
            return 200 '{{"status":"healthy","model_loaded":true,"current_block":12345,"phase":"train"}}';
        }}
    }}
}}
"""

NGINX_MODES = {
    "nginx sendfile": "sendfile on; tcp_nopush on; sendfile_max_chunk 2m;",
    "nginx buffers": "sendfile off; output_buffers 2 1m;",
    "nginx aio": "sendfile on; tcp_nopush on; sendfile_max_chunk 2m; aio threads;",
}

Command = Callable[[Path, int, Path], list[str]]


def nginx(mode: str, *, workers: int = 1, tls: tuple[Path, Path] | None = None) -> Command:
    """nginx in one of `NGINX_MODES` or with other settings; `tls`: certificate and key."""

    def command(file: Path, port: int, folder: Path) -> list[str]:
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise FileNotFoundError("nginx is not installed")
        home = folder / f"nginx-{port}"
        home.mkdir()
        config = home / "nginx.conf"
        # Started by root it would drop to an account that may not read the scratch folder.
        user = "user root; " if os.geteuid() == 0 else ""
        more = f"{mode} ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};" if tls else mode
        parts = {"user": user, "workers": workers, "folder": home, "mode": more, "port": port, "file": file}
        config.write_text(NGINX.format(**parts, tls=" ssl" if tls else ""))
        return [program, "-c", str(config), "-e", str(home / "error.log")]

    return command


PEERS: dict[str, Command] = {
    "http core": lambda file, port, folder: [sys.executable, "-m", "bench.peers.tiny", str(port)],
    "C sendfile": lambda file, port, folder: [str(compiled("sendfile.c", folder)), str(file), str(port)],
    **{name: nginx(mode) for name, mode in NGINX_MODES.items()},
    "granian": lambda file, port, folder: [
        sys.executable, "-m", "granian", "--interface", "rsgi", "--port", str(port), "--workers", "1",
        "--no-access-log", "--log-level", "error", "--no-ws", "bench.peers.granian_app:app",
    ],
    "aiohttp": lambda file, port, folder: [sys.executable, "-m", "bench.peers.aiohttp_app", str(port)],
    "FastAPI": lambda file, port, folder: [
        sys.executable, "-m", "uvicorn", "--port", str(port), "--no-access-log", "--log-level", "error",
        "bench.peers.fastapi_app:app",
    ],
}  # fmt: skip
"""Name -> command line, from (file, port, scratch folder). Raises FileNotFoundError for what is not installed."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(name: str, file: Path, folder: Path, command: Command | None = None) -> Iterator[Target]:
    """A peer serving `file` at /file, ready for requests; ended afterwards, and gone. `command`: one not in `PEERS`."""
    port = free_port()
    environment = {**os.environ, "BENCH_FILE": str(file)}
    process = subprocess.Popen(
        (command or PEERS[name])(file, port, folder),
        env=environment,
        cwd=HERE.parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"{name.replace(' ', '-')}.log").open("wb"),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start; see {folder}") from None
                time.sleep(0.05)
        yield Target("127.0.0.1", port, "/file", file.stat().st_size, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        one = queue.pop()
        found.append(one)
        queue += children.get(one, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree, ended children included."""
    return sum(cpu_split(pid))


def cpu_split(pid: int) -> tuple[float, float]:
    """The same apart: user time and system time."""
    user = system = 0
    for one in family(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        user += int(fields[11]) + int(fields[13])
        system += int(fields[12]) + int(fields[14])
    return user / TICKS, system / TICKS


def ended_children_cpu() -> float:
    """CPU seconds of this process's children that have ended: the clients, while the servers still run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_memory(pid: int) -> int:
    """Bytes: the sum of the peak resident sizes of a process tree."""
    total = 0
    for one in family(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total
