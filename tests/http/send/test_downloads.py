"""Long answers: fairness, stalled and vanishing readers, files that are cut, cold pages, files let go."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bzstream.http.send.fair_queue import FairQueue
from bzstream.http.send.page_cache import Cachestat, PageCacheProbe
from bzstream.http.send.poller import Poller
from bzstream.http.send.read_ahead import ReadAhead
from bzstream.http.send.sender import Sender
from bzstream.http.send.transfer import Transfer, TransferState
from bzstream.payload import UnitFile
from tests.http.support import AUTH, Client, ManualClock, Running, evict, no_descriptor_leak, wait_until

Serve = Callable[..., Running]


def sending(**options: Any) -> dict[str, Any]:
    """What makes a server whose sender has these options."""
    return {"make_sender": partial(Sender, **options)}


FILE = "GET /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n"
HEALTH = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def read_to_end(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def references(server: Running) -> int:
    return server.application.file.references


def test_many_downloads_at_once_are_all_exact(serve: Serve) -> None:
    server = serve(parts=sending(quantum=100_000))
    content = server.application.content

    def fetch(seed: int) -> bool:
        rng = random.Random(seed)
        with server.connect() as client:
            for _ in range(5):
                a = rng.randrange(len(content))
                b = rng.randrange(a, len(content))
                client.send(FILE[:-2] + f"Range: bytes={a}-{b}\r\n\r\n")
                if client.read().body != content[a : b + 1]:
                    return False
        return True

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(fetch, range(24)))
    wait_until(lambda: references(server) == 1)


def test_a_file_is_held_for_its_download_and_no_longer(serve: Serve) -> None:
    server = serve()
    assert references(server) == 1
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: references(server) == 2)
        assert client.read().body == server.application.content
        wait_until(lambda: references(server) == 1)
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: references(server) == 2)
    wait_until(lambda: references(server) == 1)


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_vanishes_costs_one_descriptor_and_no_noise(serve: Serve, reset: bool) -> None:
    server = serve()
    with no_descriptor_leak():
        for _ in range(40):
            client = server.connect(receive_buffer=4096)
            client.send(FILE)
            client.socket.recv(1000)
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.socket.close()
        wait_until(lambda: server.server.connections == 0)
    wait_until(lambda: references(server) == 1)
    assert server.observer.errors == []
    wait_until(lambda: len(server.observer.requests) == 40)
    assert all(record.status == 200 and not record.complete for record in server.observer.requests)


def test_a_reader_that_takes_nothing_is_closed(serve: Serve) -> None:
    """After the time-out, and an eighth of it; not after twice as long, as the kernel's buffers could make believe."""
    clock = ManualClock()
    server = serve(stall_timeout_s=60, parts={"clock": clock})
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: server.server.downloads == 1)
        (transfer,) = server.server.sender.active
        wait_until(lambda: transfer.state is TransferState.BLOCKED)
        passed = 0
        while server.server.connections:
            passed += 3
            clock.advance(3)
        assert 60 <= passed <= 60 + 8 + 3
        with pytest.raises(ConnectionResetError):
            read_to_end(client.socket)


def test_a_reader_that_takes_little_is_not(serve: Serve) -> None:
    """It may leave the socket unwritable for much longer than the time-out."""
    clock = ManualClock()
    server = serve(stall_timeout_s=60, parts={"clock": clock})
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        for _ in range(10):
            for _ in range(30):
                client.socket.recv(3000)
            clock.advance(50)
        assert server.server.downloads == 1


def test_a_file_that_was_cut_is_never_padded(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "unit"
    path.write_bytes(bytes(range(256)) * 65536)
    server = serve(path)
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: server.server.downloads == 1)
        os.truncate(path, 9_000_000)
        answer = client.read()
        assert not answer.complete
        assert answer.body == server.application.content[: len(answer.body)]
        assert len(answer.body) <= 9_000_000 + 4096
    wait_until(lambda: server.observer.damaged == [path])
    assert server.application.file.broken
    assert server.observer.errors == []
    wait_until(lambda: references(server) == 1)
    assert server.ask(HEALTH).status == 200


def test_callers_get_equal_shares(serve: Serve, tmp_path: Path) -> None:
    """Four callers with 1 connection and four with 6, all saturating: Jain's index of their bytes."""
    path = tmp_path / "unit"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # sparse: the kernel sends its zeros from the cache like any page
    # Turns so small cost far more than their bytes: the server is what everybody waits for, on any machine.
    server = serve(path, parts=sending(quantum=16 * 1024, shared_threads=1), max_connections_per_caller=100)
    owners = [caller for caller in range(8) for _ in range(1 if caller < 4 else 6)]
    totals, memory = [0] * len(owners), bytearray(4 << 20)
    poll = select.epoll()
    owner_of: dict[int, tuple[int, Client]] = {}

    def take(size: int) -> float:
        """Jain's index of what the callers get of the next `size` bytes."""
        begun, end = list(totals), sum(totals) + size
        while sum(totals) < end:
            for fd, _ in poll.poll(10):
                number, client = owner_of[fd]
                # MSG_TRUNC drops what has come without a copy, and one thread empties all sockets by turns: the server
                # is what everybody waits for.
                with suppress(BlockingIOError):
                    totals[number] += client.socket.recv_into(memory, 4 << 20, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
        taken = [0] * 8
        for number, total in enumerate(totals):
            taken[owners[number]] += total - begun[number]
        return float(sum(taken) ** 2 / (8 * sum(n * n for n in taken)))

    with ExitStack() as stack:
        stack.callback(poll.close)
        for number, owner in enumerate(owners):
            client = stack.enter_context(server.connect())
            client.send(FILE[:-2] + f"X-Hotkey: caller-{owner}\r\n\r\n")
            owner_of[client.socket.fileno()] = (number, client)
            poll.register(client.socket, select.EPOLLIN)
        # By connections it would be 0.66. The client shares the interpreter with the server: on a machine that is busy
        # with other things one window may catch it asleep.
        assert max(take(64 << 20) for _ in range(3)) >= 0.96


class BrokenQueue(FairQueue[Transfer]):
    """A queue with a bug that shows when `broken` is set."""

    broken = False

    def pop(self) -> Transfer | None:
        if self.broken:
            raise KeyError("a bug")
        return super().pop()


def test_a_bug_in_a_sending_thread_is_the_servers_end(serve: Serve) -> None:
    """It is reported, and whoever runs the server hears of it: downloads would otherwise wait for ever."""
    queues: list[BrokenQueue] = []

    def make_queue(quantum: int) -> BrokenQueue:
        queues.append(BrokenQueue(quantum))
        return queues[-1]

    server = serve(parts=sending(queue=make_queue))
    with server.connect(receive_buffer=4096) as client:
        client.send(FILE)
        wait_until(lambda: server.server.downloads == 1)
        queues[0].broken = True
        with server.connect() as other:
            other.send(FILE)
            wait_until(server.server.failure.done)
    assert [type(error) for error in server.observer.errors] == [KeyError]
    server.observer.errors.clear()


def test_a_cold_file_is_sent_exactly(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "unit"
    path.write_bytes(random.Random(3).randbytes(24 << 20))
    server = serve(path)
    for _ in range(3):
        evict(path)
        assert server.ask(FILE).body == server.application.content
    evict(path)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.ask(FILE).body == server.application.content, range(8)))
    assert all(answers)
    wait_until(lambda: references(server) == 1)


class NothingCached:
    """A probe to which every page is on the disk."""

    def is_cached(self, file: UnitFile, offset: int, length: int) -> bool:
        return False


def test_a_client_may_vanish_while_the_disk_is_read(serve: Serve) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(null: int, fd: int, start: int, length: int) -> None:
        reading.set()
        assert go_on.wait(10)

    server = serve(parts=sending(probe=lambda _: NothingCached(), read_ahead=partial(ReadAhead, read=slow)))
    with no_descriptor_leak():
        client = server.connect()
        client.send(FILE)
        assert reading.wait(10)
        wait_until(lambda: references(server) == 2 + 4)  # the server, the download, a thread a window
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.socket.close()
        wait_until(lambda: server.server.connections == 0)
        assert references(server) == 1 + 4
        assert server.ask(HEALTH).status == 200
        go_on.set()
        wait_until(lambda: references(server) == 1)


class EarlyRoom(Poller):
    """A poller whose socket has room again before the thread that armed it has let go of the transfer.

    The thread waits until the other one was told of the room, and has noted it: it comes for its next turn then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told, self.noted = threading.Event(), threading.Event()
        self.early = 0

    def arm(self, transfer: Transfer) -> None:
        super().arm(transfer)
        self.told.clear()
        self.noted.clear()
        if self.told.wait(1) and self.noted.wait(1):
            self.early += 1

    def poll(self, *, wait: bool) -> list[Transfer]:
        ready = super().poll(wait=wait)
        if ready:
            self.told.set()
        return ready


class NotingQueue(FairQueue[Transfer]):
    """A queue that tells a poller when a thread has come for its next turn."""

    poller: EarlyRoom | None = None

    def pop(self) -> Transfer | None:
        if self.poller is not None and self.poller.told.is_set():
            self.poller.noted.set()
        return super().pop()


def test_room_that_comes_before_the_thread_has_let_go_is_not_forgotten(serve: Serve, tmp_path: Path) -> None:
    pollers: list[EarlyRoom] = []

    def make_poller() -> EarlyRoom:
        pollers.append(EarlyRoom())
        return pollers[-1]

    def make_queue(quantum: int) -> NotingQueue:
        queue = NotingQueue(quantum)
        queue.poller = pollers[-1]
        return queue

    path = tmp_path / "unit"
    path.write_bytes(os.urandom(32 << 20))
    server = serve(path, parts=sending(max_dedicated=0, poller=make_poller, queue=make_queue))
    with server.connect() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)
        client.send(FILE)
        assert client.read().body == server.application.content
    assert pollers[0].early


def test_readers_who_read_nothing_hold_no_thread(serve: Serve, tmp_path: Path) -> None:
    """Few downloads have a thread each, which waits for the reader; but not for ever, and others need no such luck."""
    path = tmp_path / "unit"
    path.write_bytes(os.urandom(16 << 20))
    server = serve(path, parts=sending(shared_threads=1), max_connections_per_caller=100)
    with ExitStack() as stack:
        for _ in range(12):
            stalled = stack.enter_context(server.connect())
            stalled.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.send(FILE)
            assert server.ask(FILE).body == server.application.content
        waiting = server.server.sender.active
        wait_until(lambda: {transfer.state for transfer in waiting} == {TransferState.BLOCKED})
        assert len(waiting) == 12


def test_a_cached_file_is_sent_whole_although_the_kernel_miscounts(serve: Serve) -> None:
    """A preempted cachestat counts too few pages: that alone must not send anybody to the disk."""
    read: list[object] = []

    def miscounting(settling: Mapping[UnitFile, float]) -> PageCacheProbe:
        count, calls = Cachestat(), itertools.count()
        return PageCacheProbe(settling, lambda *range_: count(*range_) if next(calls) % 2 else 0)

    read_ahead = partial(ReadAhead, read=lambda *arguments: read.append(arguments))
    server = serve(parts=sending(probe=miscounting, read_ahead=read_ahead))
    server.application.file.path.read_bytes()
    with server.connect() as client:
        client.send(FILE)
        assert client.read().body == server.application.content
    assert read == []


def test_requests_are_answered_while_downloads_saturate(serve: Serve) -> None:
    server = serve(max_connections_per_caller=1000)
    stop = threading.Event()

    def load() -> None:
        with server.connect() as client:
            while not stop.is_set():
                client.send(FILE)
                client.read()

    with ThreadPoolExecutor(16) as pool:
        for _ in range(16):
            pool.submit(load)
        waits = []
        with server.connect() as client:
            for _ in range(100):
                begun = time.monotonic()
                client.send(HEALTH)
                assert client.read().status == 200
                waits.append(time.monotonic() - begun)
        stop.set()
    # Sixteen clients of Python share the interpreter with the server here; bench/latency.py measures properly.
    assert sorted(waits)[50] < 0.5


def test_a_get_is_cancelled_when_its_client_vanishes(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    client.send("GET /wait HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n")
    assert server.application.started.wait(10)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.socket.close()
    assert server.application.cancelled.wait(10)
    wait_until(lambda: [record.status for record in server.observer.requests] == [499])
    assert server.observer.errors == []


def test_a_post_ends_what_it_began(serve: Serve) -> None:
    server = serve()
    client = server.connect()
    client.send("POST /wait HTTP/1.1\r\nHost: x\r\n" + AUTH + "Content-Length: 0\r\n\r\n")
    assert server.application.started.wait(10)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.socket.close()
    wait_until(lambda: server.server.connections == 0)
    assert server.application.release is not None
    server.loop.call_soon_threadsafe(server.application.release.set)
    assert server.application.finished.wait(10)
    assert not server.application.cancelled.is_set()


def test_a_server_that_closes_waits_for_a_post_but_not_for_ever(serve: Serve) -> None:
    server = serve(drain_s=0.3)
    with server.connect() as client:
        client.send("POST /wait HTTP/1.1\r\nHost: x\r\n" + AUTH + "Content-Length: 0\r\n\r\n")
        assert server.application.started.wait(10)
        closing = asyncio.run_coroutine_threadsafe(server.server.close(), server.loop)
        assert client.ends()
        assert not server.application.cancelled.is_set()
        closing.result(10)
        assert server.application.cancelled.is_set()


def test_an_answer_that_waited_is_sent(serve: Serve) -> None:
    server = serve()
    with server.connect() as client:
        client.send("GET /wait HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n" + HEALTH)
        assert server.application.started.wait(10)
        assert server.application.release is not None
        server.loop.call_soon_threadsafe(server.application.release.set)
        assert client.read().body == server.application.content
        assert client.read().status == 200


def test_records_say_what_was_sent(serve: Serve) -> None:
    server = serve()
    nothing = "GET /nothing HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n"
    for n, text in enumerate((FILE[:-2] + "Range: bytes=0-9\r\n\r\n", HEALTH, nothing, "nonsense\n")):
        server.ask(text)
        wait_until(lambda n=n: len(server.observer.requests) == n + 1)  # type: ignore[misc]
    found = [(r.method, r.route, r.label, r.status, r.sent, r.complete) for r in server.observer.requests]
    assert found[0] == ("GET", "/file", "file", 206, 10, True)
    assert found[1] == ("GET", "/health", "", 200, 20, True)
    assert found[2][:4] == ("GET", "", "", 404)
    assert found[3][:4] == ("", "", "", 400)
    assert all(record.seconds < 5 and record.peer == "127.0.0.1" for record in server.observer.requests)
