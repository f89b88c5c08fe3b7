"""Restarts that no client notices: `serve --take-over SOCKET`, and the listening sockets of systemd."""

from __future__ import annotations

import dataclasses
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bzstream.model import publish
from bzstream.node import NodeError
from bzstream.node.succession import SuccessionSocket, predecessor_at
from tests.nodes import BLOCK, GROUPS, VERSION, Node, child_processes, eventually, free_port, running_node
from tests.seeds import seeds

DOWNLOADS, RESTARTS = seeds(4, 64), seeds(2, 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder with a published store."""
    folder = tmp_path_factory.mktemp("succession")
    publish(checkpoint, folder / "store", block=BLOCK, version=VERSION, groups=GROUPS)
    return folder


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """A path for --take-over."""
    tmp_path.chmod(0o700)
    return tmp_path / "control"


class Traffic:
    """Clients of a node: one that connects anew for each request, one that keeps its connection, slow downloads."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.wrong: list[str] = []
        self.answered = [0, 0]
        self._stopping, self._go_on = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(kept,)) for kept in (0, 1)]
        for thread in self._threads:
            thread.start()

    def _ask(self, keep: int) -> None:
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n" + (b"" if keep else b"Connection: close\r\n") + b"\r\n"
        while not self._stopping.is_set():
            try:
                with self.node.connect() as connection:
                    last = False
                    while not last and not self._stopping.is_set():
                        connection.sendall(request)
                        answer = b""
                        while b"}" not in answer:
                            received = connection.recv(65536)
                            assert received, f"closed after {answer!r}"
                            answer += received
                        assert answer.startswith(b"HTTP/1.1 200"), answer
                        self.answered[keep] += 1
                        last = b"connection: close" in answer.lower()
            except (OSError, AssertionError) as error:
                self.wrong.append(repr(error))

    def begin_downloads(self, count: int) -> None:
        """Downloads of the full model; each has its head, and takes the rest when the traffic ends."""
        for _ in range(count):
            begun = threading.Event()
            self._threads.append(threading.Thread(target=self._download, args=(begun,)))
            self._threads[-1].start()
            begun.wait()

    def _download(self, begun: threading.Event) -> None:
        try:
            with self.node.connect() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                connection.sendall(
                    b"GET /model/full HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    b"Authorization: Bearer " + self.node.validator_token.encode() + b"\r\n\r\n"
                )
                data = connection.recv(4096)
                begun.set()
                self._go_on.wait()
                head, _, body = data.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                received = len(body)
                while chunk := connection.recv(1 << 20):
                    received += len(chunk)
                assert received == length, f"a download ended after {received} of {length} bytes"
        except (OSError, AssertionError) as error:
            self.wrong.append(repr(error))
        finally:
            begun.set()

    def wait_for_more(self) -> None:
        """Until each of the two asking clients was answered some more times."""
        before = list(self.answered)
        eventually(lambda: all(now > then + 20 for now, then in zip(self.answered, before, strict=True)), "answers")

    def end(self) -> None:
        self._go_on.set()
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        assert self.wrong == []


@contextmanager
def traffic(node: Node) -> Iterator[Traffic]:
    clients = Traffic(node)
    try:
        yield clients
    finally:
        clients.end()


def roles(node: subprocess.Popen[bytes]) -> dict[str, int]:
    """Living children by role."""
    return {role: len(child_processes(node.pid, role)) for role in ("http", "chain")}


def test_a_successor_takes_over_and_no_client_notices(place: Path, control: Path) -> None:
    metrics = free_port()
    options = ("--workers", "2", "--take-over", str(control), "--metrics-port", str(metrics))
    with running_node(place, *options) as node, traffic(node) as clients:
        predecessors = []
        for _ in range(RESTARTS):
            clients.begin_downloads(DOWNLOADS)
            clients.wait_for_more()
            before = node.process
            predecessors.append(before)
            successor = node.start()
            # Never two chain roles beside each other: the old one's has ended before the new one's begins.
            while not roles(successor)["chain"]:
                together = roles(before)["chain"] + roles(successor)["chain"]
                assert together <= 1 or not roles(before)["chain"]
                assert successor.poll() is None, node.log()
            assert not roles(before)["chain"]
            clients.wait_for_more()
            eventually(lambda now=successor: roles(now)["http"] == 2, "both workers")  # type: ignore[misc]
            assert before.poll() is None, "it stays for its downloads"
            node.wait_until_healthy()
            assert dataclasses.replace(node, port=metrics).get("/metrics").status == 200
        clients.end()
        for predecessor in predecessors:
            assert predecessor.wait(timeout=120) == 0
    assert not control.exists()


def test_a_successor_that_cannot_start_changes_nothing(place: Path, control: Path) -> None:
    with running_node(place, "--take-over", str(control)) as node:
        command = [*node.command, "--store", str(place / "none")]
        failed = subprocess.run(command, env=dict(node.environment), capture_output=True, text=True, check=False)
        assert failed.returncode == 1
        assert "no store" in failed.stderr
        other_port = [*node.command, "--port", str(free_port())]
        failed = subprocess.run(other_port, env=dict(node.environment), capture_output=True, text=True, check=False)
        assert failed.returncode == 1
        assert f"listens on port {node.port}" in failed.stderr
        checked = subprocess.run(
            [*node.command, "--check"], env=dict(node.environment), capture_output=True, check=False
        )
        assert checked.returncode == 0
        assert node.process.poll() is None
        assert node.health()["status"] == "healthy"
        predecessor = predecessor_at(control)
        assert predecessor is not None, "it can still be succeeded"
        assert [listener.getsockname()[1] for listener in predecessor.listeners] == [node.port]
        predecessor.close()
        for listener in predecessor.listeners:
            listener.close()


def test_the_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(NodeError, match="mode 0700"):
        predecessor_at(folder / "control")
    with pytest.raises(NodeError, match="mode 0700"):
        SuccessionSocket(folder / "control").take_place()
    with pytest.raises(NodeError, match="make its folder"):
        predecessor_at(tmp_path / "none" / "control")
    folder.chmod(0o700)
    assert predecessor_at(folder / "control") is None
    with socket.socket(socket.AF_UNIX) as left:  # by a node that was killed
        left.bind(str(folder / "control"))
    assert predecessor_at(folder / "control") is None


def test_the_sockets_of_systemd_outlive_the_node(place: Path) -> None:
    """As `systemctl restart` does with a socket unit: the next node is started when the one before it has ended."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        # systemd passes descriptors from 3 on, and the process id of the process that it starts (sd_listen_fds(3)).
        shell = f'exec 3<&{listener.fileno()} {listener.fileno()}<&-; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        activated = ("bash", "-c", shell, "bash", sys.executable, "-m", "bzstream")
        listener.set_inheritable(True)
        with running_node(place, command=activated, inherit=(listener.fileno(),), wait=False) as node:
            node.port = listener.getsockname()[1]
            node.wait_until_healthy()
            with traffic(node) as clients:
                for _ in range(seeds(1, 5)):
                    clients.wait_for_more()
                    node.process.send_signal(signal.SIGTERM)
                    assert node.process.wait(timeout=120) == 0
                    node.start()
                clients.wait_for_more()
