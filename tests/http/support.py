"""A server on a thread of its own, a tiny application, and a client that sends raw bytes and reads what comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType

import h11
import msgspec
import uvloop

from bzstream.config import HttpSettings
from bzstream.http import (
    Endpoint,
    HttpError,
    Observer,
    Representation,
    Request,
    RequestRecord,
    Response,
    Result,
    Router,
    Server,
)
from bzstream.http.io.transports import unacknowledged
from bzstream.http.send.sender import Sender
from bzstream.payload import Extent, Payload, UnitFile

TOKEN = "t" * 32
AUTH = f"Authorization: Bearer {TOKEN}\r\n"
ETAG = '"tag"'
MODIFIED = 1_700_000_000
ENVELOPE = b"E" * 4096
_BIND_ADDRESS_NO_PORT = 24
"""IP_BIND_ADDRESS_NO_PORT of ip(7): the port is chosen by connect, from as many as without a bind."""


class Recorder(Observer):
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []
        self.errors: list[BaseException] = []
        self.warnings: list[str] = []
        self.stalls: list[float] = []
        self.damaged: list[Path] = []

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def on_stall(self, seconds: float) -> None:
        self.stalls.append(seconds)

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)

    def on_error(self, error: BaseException, request: Request | None) -> None:
        self.errors.append(error)

    def on_damage(self, path: Path) -> None:
        self.damaged.append(path)


@dataclass
class TinyApplication:
    """`/file` (an envelope and a file, needs a token), `/health`, `/echo`, and a few that misbehave."""

    file: UnitFile
    started: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    release: asyncio.Event | None = None

    def __post_init__(self) -> None:
        self.payload = Payload((ENVELOPE, Extent(self.file, 0, self.file.size)))
        router = self.router = Router()
        router.add("GET", "/health", Endpoint(lambda _: Response.json({"status": "healthy"}), limited=False))
        router.add("GET", "/file", Endpoint(self._file))
        router.add("GET", "/empty", Endpoint(lambda _: self._representation(Payload(()))))
        router.add("GET", "/forbidden", Endpoint(lambda _: Response(204), self._forbidden))
        router.add("GET", "/items/{id}", Endpoint(Response.json, lambda r: {**r.params, **r.query}))
        router.add("POST", "/echo", Endpoint(lambda r: Response(200, (), r.body), reads_body=True))
        router.add("GET", "/wait", Endpoint(self._wait))
        router.add("POST", "/wait", Endpoint(self._wait, reads_body=True))
        router.add("GET", "/bug", Endpoint(self._bug))
        router.add("GET", "/async-bug", Endpoint(self._async_bug))
        router.add("GET", "/bad-header", Endpoint(lambda _: Response(200, (("X", "a\nb"),), b"x")))
        router.add("GET", "/peer", Endpoint(lambda r: Response.json([r.peer, r.caller, r.secure])))

    @cached_property
    def content(self) -> bytes:
        """What `/file` is."""
        return self.payload.read()

    def admit(self, request: Request) -> Endpoint:
        if request.path != "/health" and request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HttpError(401, "unauthorized", "A token is needed.", (("WWW-Authenticate", "Bearer"),))
        endpoint = self.router.match(request)
        if (hotkey := request.headers.get("x-hotkey")) is not None:
            request.caller = hotkey
        return endpoint

    def _representation(self, payload: Payload) -> Representation:
        return Representation(
            payload, ETAG, MODIFIED, headers=(("Cache-Control", "no-cache"), ("X-Extra", "yes")), label="file"
        )

    def _file(self, request: Request) -> Result:
        return self._representation(self.payload)

    def _forbidden(self, request: Request) -> None:
        raise HttpError(403, "forbidden", "Not for you.")

    async def _wait(self, request: Request) -> Result:
        """Waits until `release`; notes how it ended."""
        self.release = asyncio.Event()
        self.started.set()
        try:
            await self.release.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        self.finished.set()
        return self._representation(self.payload) if request.method == "GET" else Response(202)

    def _bug(self, request: Request) -> Result:
        raise RuntimeError("secret detail")

    async def _async_bug(self, request: Request) -> Result:
        await asyncio.sleep(0)
        raise RuntimeError("secret detail")


class ManualClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass, and wait until the server has seen to all that is due."""
        self.now += seconds
        seen = self.calls
        wait_until(lambda: self.calls > seen + 5)


class Running:
    """A server running on its own thread and loop."""

    def __init__(
        self,
        application: TinyApplication,
        settings: HttpSettings,
        *,
        uv: bool = True,
        clock: Callable[[], float] = time.monotonic,
        make_sender: Callable[..., Sender] = Sender,
        make_listener: Callable[[], socket.socket] = lambda: socket.create_server(("127.0.0.1", 0)),
    ) -> None:
        self.application = application
        self._clock = clock
        self._make_sender = make_sender
        self._make_listener = make_listener
        self.observer = Recorder()
        self.settings = settings
        self._uv = uv
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server")

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        if self._uv:
            uvloop.run(self._main())
        else:
            asyncio.run(self._main())

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        listener = self._make_listener()
        self.port: int = listener.getsockname()[1]
        self.server = Server(
            self.settings, self.application, self.observer, clock=self._clock, make_sender=self._make_sender
        )
        self.server.start([listener])
        self._ready.set()
        await self._stop.wait()
        await self.server.close()
        assert self.server.connections == 0
        assert self.server.downloads == 0
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others

    def call(self, function: Callable[[], object]) -> None:
        """Run something on the server's loop and wait for it."""
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(10)

    def heard(self, client: Client) -> None:
        """Wait until the server has taken what a client has sent."""
        wait_until(lambda: unacknowledged(client.socket.fileno()) == 0)
        for _ in range(3):
            self.call(lambda: None)

    def connect(self, *, receive_buffer: int | None = None) -> Client:
        return Client(self.port, receive_buffer)

    def ask(self, text: str, *, method: str = "GET") -> Answer:
        """One request on a fresh connection."""
        with self.connect() as client:
            client.send(text)
            return client.read(method)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool = True

    def get(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name.lower()]
        assert len(found) <= 1, f"{name} is repeated"
        return found[0] if found else None

    @property
    def code(self) -> str:
        """The error code of a JSON error, whose form is checked."""
        assert self.get("content-type") == "application/json"
        error = msgspec.json.decode(self.body)
        assert set(error) == {"detail", "code"}
        return str(error["code"])


class Client:
    """A raw TCP client that parses answers with h11."""

    def __init__(self, port: int, receive_buffer: int | None = None, source: str = "127.0.0.1") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((source, 0))
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self._rest = b""
        self.eof = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: str | bytes) -> None:
        self.socket.sendall(data.encode("latin-1") if isinstance(data, str) else data)

    def read(self, method: str = "GET") -> Answer:
        """The next final answer; an answer cut short by a closed connection is given back as not complete."""
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        if self._rest:
            parser.receive_data(self._rest)
            self._rest = b""
        head: h11.Response | None = None
        body = bytearray()
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                assert head is not None, f"the connection ended before an answer: {bytes(body)!r}"
                return self._answer(head, body, complete=False)
            if event is h11.NEED_DATA:
                try:
                    data = self.socket.recv(1 << 20)
                except ConnectionResetError:
                    data = b""
                self.eof = not data
                parser.receive_data(data)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self._rest = parser.trailing_data[0]
                return self._answer(head, body)
            elif isinstance(event, h11.ConnectionClosed):
                raise AssertionError("the connection was closed instead of an answer")

    def ends(self) -> bool:
        """Whether the server closes now: nothing more comes but the end."""
        try:
            return self._rest == b"" and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    @staticmethod
    def _answer(head: h11.Response, body: bytearray, *, complete: bool = True) -> Answer:
        headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
        return Answer(head.status_code, headers, bytes(body), complete)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Poll a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


@contextlib.contextmanager
def no_descriptor_leak() -> Iterator[None]:
    """The process has as many descriptors afterwards as before."""
    fds = Path("/proc/self/fd")

    def count() -> int:
        return len(list(fds.iterdir()))

    before = count()
    yield
    wait_until(lambda: count() <= before)


def evict(path: Path) -> None:
    """Have the kernel forget the pages of a file, where the file system lets it."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
