"""Random sequences of requests, split at random bytes, against a model of the contract that shares no code with it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    multiple,
    rule,
    run_state_machine_as_test,
)

from bzstream.config import HttpSettings
from bzstream.http.send.sender import Sender
from bzstream.payload import UnitFile
from tests.http.support import ENVELOPE, TOKEN, Answer, Client, Running, TinyApplication, no_descriptor_leak
from tests.seeds import seeds

MAX_BODY = 50
SIZE = len(ENVELOPE) + 3000


@dataclass(frozen=True)
class Ask:
    """One request, valid or not, in the model's words."""

    method: str = "GET"
    path: str = "/file"
    token: bool = True
    version: str = "1.1"
    close: bool = False
    window: tuple[int, int] | None = None
    condition: str | None = None
    body: bytes | None = None
    chunks: int = 0
    flaw: str | None = None

    def text(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/{self.version}", "Host: x"]
        if self.token:
            lines.append(f"Authorization: Bearer {TOKEN}")
        if self.close:
            lines.append("Connection: close")
        if self.window is not None:
            lines.append(f"Range: bytes={self.window[0]}-{self.window[1]}")
        if self.condition is not None:
            lines.append(f'If-None-Match: "{self.condition}"')
        body = self.body or b""
        if self.flaw == "both lengths":
            lines += ["Content-Length: 3", "Transfer-Encoding: chunked"]
        elif self.flaw == "two lengths":
            lines += ["Content-Length: 3", "Content-Length: 3"]
        elif self.body is not None and self.chunks:
            lines.append("Transfer-Encoding: chunked")
            body = b""
            for at in range(0, len(self.body), self.chunks):
                piece = self.body[at : at + self.chunks]
                body += f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
            body += b"0\r\n\r\n"
        elif self.body is not None:
            lines.append(f"Content-Length: {len(self.body)}")
        if self.flaw == "fold":
            lines.append(" folded")
        if self.flaw == "no colon":
            lines.append("nonsense")
        if self.flaw == "no host":
            lines.remove("Host: x")
        end = "\n" if self.flaw == "bare LF" else "\r\n"
        return (end.join(lines) + end * 2).encode() + body

    def expected(self) -> tuple[int, bytes | None, bool]:
        """(status, body or None for any, does the connection go on)."""
        if self.flaw == "bare LF":
            return 400, None, False
        if self.version == "2.0":
            return 505, None, False
        if self.flaw is not None and not (self.flaw == "no host" and self.version == "1.0"):
            return 400, None, False
        if self.version == "1.0" and self.body is not None and self.chunks:
            return 400, None, False
        goes_on = self.version != "1.0" and not self.close
        has_body = bool(self.body) or (self.body is not None and self.chunks > 0)
        if self.path != "/health" and not self.token:
            return 401, None, goes_on and not has_body
        methods = {"/health": "GET HEAD", "/file": "GET HEAD", "/echo": "POST"}.get(self.path)
        if methods is None:
            return 404, None, goes_on and not has_body
        if self.method not in methods.split():
            return 405, None, goes_on and not has_body
        if has_body and len(self.body or b"") > MAX_BODY:
            return 413, None, False
        if self.path == "/health":
            return 200, None, goes_on
        if self.path == "/echo":
            return 200, self.body or b"", goes_on
        if self.condition == "tag":
            return 304, b"", goes_on
        if self.window is not None and self.method == "GET" and self.window[0] <= self.window[1]:
            a, b = self.window
            if a >= SIZE:
                return 416, None, goes_on
            return 206, content()[a : b + 1], goes_on
        return 200, content(), goes_on


def content() -> bytes:
    return ENVELOPE + random.Random(5).randbytes(SIZE - len(ENVELOPE))


positions = st.integers(0, SIZE + 100)
asks = st.builds(
    Ask,
    method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "PUT"]),
    path=st.sampled_from(["/file", "/file", "/health", "/echo", "/echo", "/nowhere"]),
    token=st.integers(0, 9).map(bool),
    version=st.sampled_from(["1.1"] * 8 + ["1.0", "1.3", "2.0"]),
    close=st.integers(0, 9).map(lambda n: n == 0),
    window=st.one_of(st.none(), st.tuples(positions, positions)),
    condition=st.sampled_from([None, None, None, "tag", "other"]),
    body=st.one_of(st.none(), st.binary(max_size=MAX_BODY + 5)),
    chunks=st.integers(0, 7),
    flaw=st.sampled_from([None] * 12 + ["both lengths", "two lengths", "fold", "no colon", "no host", "bare LF"]),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path: Path = tmp_path_factory.mktemp("sequence") / "unit"
    path.write_bytes(content()[len(ENVELOPE) :])
    file = UnitFile(path)
    config = HttpSettings(max_body=MAX_BODY, max_connections_per_caller=1000, linger_s=0.5)
    with Running(TinyApplication(file), config, make_sender=partial(Sender, quantum=1000)) as running:
        yield running
    file.release()


def check(ask: Ask, answer: Answer) -> bool:
    """Whether the connection goes on."""
    status, body, goes_on = ask.expected()
    assert answer.status == status, (ask, answer)
    assert answer.complete
    assert (answer.get("connection") == "close") == (not goes_on), (ask, answer)
    if body is not None:
        assert answer.body == (b"" if ask.method == "HEAD" else body), ask
    return goes_on


class Sequences(RuleBasedStateMachine):
    """Several connections; on each, pipelines of requests cut into pieces at any byte."""

    server: Running
    connections: Bundle[Client] = Bundle("connections")

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []

    @rule(target=connections)
    def connect(self) -> Client:
        client = self.server.connect()
        self.clients.append(client)
        return client

    @rule(target=connections, client=consumes(connections), pipeline=st.lists(asks, min_size=1, max_size=5),
          cuts=st.lists(st.integers(0, 2000), max_size=6))  # fmt: skip
    def send(self, client: Client, pipeline: list[Ask], cuts: list[int]) -> Client | MultipleResults[Client]:
        raw = b"".join(ask.text() for ask in pipeline)
        points = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
        for a, b in pairwise(points):
            try:
                client.send(raw[a:b])
            except ConnectionError:
                break  # an earlier request of the pipeline was the last
        for ask in pipeline:
            if not check(ask, client.read(ask.method if ask.method == "HEAD" else "GET")):
                assert client.ends()
                return multiple()
        return client

    @rule(client=consumes(connections))
    def leave(self, client: Client) -> None:
        client.socket.close()

    @rule(client=consumes(connections), ask=asks, cut=st.integers(0, 2000))
    def leave_in_the_middle(self, client: Client, ask: Ask, cut: int) -> None:
        client.send(ask.text()[:cut])
        client.socket.close()

    def teardown(self) -> None:
        for client in self.clients:
            client.socket.close()
        assert self.server.observer.errors == []


def test_sequences_of_requests(server: Running) -> None:
    Sequences.server = server
    with no_descriptor_leak():
        run_state_machine_as_test(
            Sequences,
            settings=settings(
                max_examples=seeds(15, 60),
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )


def test_every_split_of_a_pipeline(server: Running) -> None:
    pipeline = [
        Ask(path="/echo", method="POST", body=b"hello", chunks=2),
        Ask(window=(4090, 4100)),
        Ask(path="/echo", method="POST", body=b"hello"),
        Ask(method="HEAD", path="/health"),
    ]
    raw = b"".join(ask.text() for ask in pipeline)
    with server.connect() as client:
        for cut in range(1, len(raw), 3):
            client.send(raw[:cut])
            client.send(raw[cut:])
            for ask in pipeline:
                assert check(ask, client.read(ask.method))
