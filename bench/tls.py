"""Plain and TLS, bzstream and nginx: what encryption costs. `python -m bench.tls [--quick] [--json FILE]`

The whole node with and without `--tls-cert`, and nginx with and without `ssl`, serve the same warm slice over 8 and 64
connections, all in turns, one worker each, with one cipher (TLS 1.3, AES-256-GCM) and a self-signed P-256 certificate.
Two clients (tls.c): one that counts records without decrypting them, which is cheaper than any server here and so
shows the server; and one that decrypts, as a miner's does, on the same cores. To the plain servers goes the client of
`bench.serve` that copies, as both of these do. User time is what encryption takes in user space: the kernel's TLS
would move it to system time, and what this kernel offers is said in the notes. Where the client was busy nearly all the
time, it was the bottleneck and not the server.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.command import command
from bench.native import MissingPeer, compiled
from bench.peers.servers import NGINX_MODES, Target, cpu_split, ended_children_cpu, nginx, serving
from bench.peers.servers import compiled as compiled_peer
from bench.rows import row_of
from bench.serve import FILE_SIZE, QUICK_FILE_SIZE, warm_file, whole_node
from bzstream.util.statistics import quantile

__all__ = ["certificate", "measure"]

DRIVER = Path(__file__).with_name("tls.c")
CONNECTIONS = (8, 64)
RANGE = 256 << 20
"""Bytes that many connections ask for at a time, so that answers end, and are checked, within a window."""
NODE, PEER = "bzstream", "nginx"
NGINX_TLS = "sendfile off; output_buffers 2 256k; ssl_protocols TLSv1.3; ssl_buffer_size 16k;"
"""Whole records, read ahead in large pieces: without the kernel's TLS nginx cannot use sendfile for them."""
KINDS = {"plain": "copying client", "tls": "client that does not decrypt", "decrypted": "client that decrypts"}


@dataclass
class Taken:
    """One server, one kind of client, one number of connections: a value a round."""

    rates: list[float] = field(default_factory=list)
    user: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    """Share of the time in which the client computed."""


Key = tuple[str, str, int]
"""Server, kind of client, connections."""


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for loopback, and its key. Raises MissingPeer without openssl."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(
            [*command, "-days", "2", *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
        )
    except FileNotFoundError:
        raise MissingPeer("there is no openssl here to make a certificate with") from None
    return cert, key


def drive(target: Target, kind: str, connections: int, seconds: float, folder: Path) -> tuple[dict[str, Any], float]:
    """One window: what the client says, and which share of its time counts. Raises RuntimeError for a wrong answer."""
    program = compiled_peer("discard.c", folder) if kind == "plain" else compiled(DRIVER, "ssl", "crypto")
    option = "0" if kind == "tls" else "1"
    length = 0 if connections <= CONNECTIONS[0] else min(RANGE, target.size)
    done = subprocess.run(
        [
            str(program), target.host, str(target.port), target.path, str(target.size), str(connections), str(seconds),
            option, str(length), *target.headers,
        ],
        capture_output=True, text=True, check=False, timeout=seconds * 3 + 60,
    )  # fmt: skip
    if not done.stdout:
        raise RuntimeError(f"the client failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    if found["error"]:
        raise RuntimeError(f"the client saw: {found['error']}")
    return found, found["seconds"] / (found["seconds"] + seconds * 0.1)


def measure(quick: bool) -> dict[str, Any]:
    """Rows, notes, and what is missing."""
    seconds, rounds, counts = (0.3, 1, CONNECTIONS[:1]) if quick else (2.0, 3, CONNECTIONS)
    missing: list[str] = []
    taken: dict[Key, Taken] = {}
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        # Now, so that the compiler's time is not taken for a client's.
        compiled(DRIVER, "ssl", "crypto")
        compiled_peer("discard.c", folder)
        pair = certificate(folder)
        file = warm_file(folder, QUICK_FILE_SIZE if quick else FILE_SIZE)
        servers: dict[tuple[str, bool], Target] = {
            (NODE, secure): stack.enter_context(whole_node(file, tls=pair if secure else None))
            for secure in (False, True)
        }
        try:
            for secure in (False, True):
                command = nginx(NGINX_TLS, tls=pair) if secure else nginx(NGINX_MODES["nginx sendfile"])
                label = f"{PEER} TLS" if secure else PEER
                servers[PEER, secure] = stack.enter_context(serving(label, file, folder, command))
        except (OSError, RuntimeError) as error:
            missing.append(f"{PEER}: {error}")
        for turn in range(rounds):
            for server, secure in sorted(servers, reverse=bool(turn % 2)):
                target = servers[server, secure]
                for kind in ("tls", "decrypted") if secure else ("plain",):
                    for connections in counts:
                        before, clients = cpu_split(target.pid), ended_children_cpu()
                        found, share = drive(target, kind, connections, seconds, folder)
                        after = cpu_split(target.pid)
                        one = taken.setdefault((server, kind, connections), Taken())
                        one.busy.append((ended_children_cpu() - clients) / (found["seconds"] / share))
                        # The client's warm-up is in the CPU time but not in the count.
                        gigabytes = found["bytes"] / 1e9 / share
                        one.rates.append(found["bytes"] / found["seconds"] / 1e9)
                        one.user.append((after[0] - before[0]) / gigabytes)
                        one.system.append((after[1] - before[1]) / gigabytes)
    return {"rows": _rows(taken), "missing": missing, "notes": _kernel_tls()}


def _rows(taken: dict[Key, Taken]) -> list[dict[str, Any]]:
    rows = []
    for (server, kind, connections), one in sorted(taken.items(), key=lambda item: (item[0][2], item[0][1])):
        layer = "plain" if kind == "plain" else "TLS"
        name = f"{layer}, {connections} connections, {KINDS[kind]}"
        other = taken.get((PEER, kind, connections)) if server == NODE else None
        ratio = None if other is None else _ratio(one.rates, other.rates)
        peer = "" if other is None else PEER
        rows += [
            row_of(name, "GB/s", one.rates, subject=server, peer=peer, ratio=ratio),
            row_of(f"{name}: user CPU", "s/GB", one.user, subject=server),
            row_of(f"{name}: system CPU", "s/GB", one.system, subject=server),
            row_of(f"{name}: the client was busy", "share", one.busy, subject=server),
        ]
    for connections in CONNECTIONS:
        for server in (NODE, PEER):
            clear, secret = taken.get((server, "plain", connections)), taken.get((server, "tls", connections))
            if clear is not None and secret is not None:
                ratio = _ratio(secret.rates, clear.rates)
                label = f"TLS against plain, {connections} connections"
                rows.append(row_of(label, "GB/s", secret.rates, subject=server, peer="plain", ratio=ratio))
    return rows


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return quantile([one / other for one, other in zip(ours, theirs, strict=True)], 0.5)


def _kernel_tls() -> str:
    """Whether the kernel of this machine encrypts by itself."""
    try:
        offered = Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text(encoding="ascii").split()
    except OSError:
        offered = []
    if "tls" in offered:
        return "This kernel has TLS of its own: both servers may have used it."
    return "This kernel has no TLS of its own (or has not loaded it): both servers encrypted in user space."


def main() -> None:
    command("tls", __doc__, measure)


if __name__ == "__main__":
    main()
