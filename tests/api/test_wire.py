"""The wire of a real node, byte by byte: framing, limits, strictness, HEAD, pipelining, ranges, the slow and the many.

`tests/http` has the core over a tiny application; here is what the contract's table promises of the node as a whole.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.conftest import beside
from tests.api.contract import Pair, parse_multipart, spans_of
from tests.api.desk import Desk, new_key, signed, troubles
from tests.http.support import Answer, Client
from tests.nodes import TOKEN, Node, eventually, running_node

HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
AUTH = f"Authorization: Bearer {TOKEN}\r\n"
MINER = f"{AUTH}X-Hotkey: {HOTKEY}\r\nX-Expert-Group: 0\r\n"


def line(target: str, method: str = "GET", version: str = "1.1") -> str:
    return f"{method} {target} HTTP/{version}\r\nHost: node.example\r\n"


HEALTH = line("/health") + "\r\n"
POST = line("/submit", "POST") + AUTH
BAD = "POST /submit HTTP/1.1\r\n" + "Host: x\r\n"


def ask(node: Node, request: str | bytes, method: str = "GET") -> Answer:
    """One request on a connection of its own."""
    with Client(node.port) as client:
        client.send(request)
        return client.read(method)


def head_of(size: int) -> str:
    """A request head of so many bytes, blank line included."""
    begun = line("/health") + "X-Fill: "
    return begun + "x" * (size - len(begun) - 4) + "\r\n\r\n"


# (what is sent, status, code, whether the connection stays)
TABLE: list[tuple[str, int, str | None, bool]] = [
    # served
    (HEALTH, 200, None, True),
    ("\r\n\r\n" + HEALTH, 200, None, True),
    (line("/health", version="1.9") + "\r\n", 200, None, True),
    (line("/health", version="1.9") + "Content-Length: 0\r\n\r\n", 200, None, True),
    (line("/health", version="1.0") + "\r\n", 200, None, False),
    ("GET /health HTTP/1.0\r\n\r\n", 200, None, False),
    (line("/health") + "Connection: close\r\n\r\n", 200, None, False),
    (line("/health") + "Connection: Close, TE\r\nTE: trailers\r\n\r\n", 200, None, False),
    (line("/health") + "Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n", 200, None, True),
    (line("http://elsewhere.example:99/health") + "\r\n", 200, None, True),
    (line("HTTPS://elsewhere.example/health?x=1") + "\r\n", 200, None, True),
    (line("/health?") + "\r\n", 200, None, True),
    (line("/health") + "Content-Length: 4\r\n\r\nbody", 200, None, True),
    (line("/health") + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", 200, None, True),
    (head_of(16384), 200, None, True),
    (line("/health") + "A: b\r\n" * 99 + "\r\n", 200, None, True),
    (line("/model").replace("\r\n", "\r\nAUTHORIZATION:\tbearer ", 1)[: -len("Host: node.example\r\n")]
     + TOKEN + " \r\nhOsT:x\r\n\r\n", 200, None, True),
    # 400 framing and head limits: before 401
    ("GET /model HTTP/1.1\nHost: x\n\n", 400, "malformed_request", False),
    (line("/model")[:-2] + "\n\r\n", 400, "malformed_request", False),
    (line("/model") + "\n", 400, "malformed_request", False),
    (line("/model") + "A: b\r\n\tc\r\n\r\n", 400, "malformed_request", False),
    (" " + line("/model") + "\r\n", 400, "malformed_request", False),
    (line("/model") + " A: b\r\n\r\n", 400, "malformed_request", False),
    (line("/model") + "A b: c\r\n\r\n", 400, "malformed_request", False),
    (line("/model") + ": c\r\n\r\n", 400, "malformed_request", False),
    (line("/model") + "A\x7f: c\r\n\r\n", 400, "malformed_request", False),
    (line("/model") + "A: \x00\r\n\r\n", 400, "malformed_request", False),
    (line("/model") + "Host: again\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/1.1\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "malformed_request", False),
    ("GET  /model HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/1.1 \r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /mo del HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model http/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/1.10\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/1,1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model\r\n\r\n", 400, "malformed_request", False),
    ("GET model HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET ftp://x/model HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model#a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    ("GET /model\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", False),
    *((BAD + fields + "\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400, "malformed_request", False) for fields in (
        "Content-Length: 2\r\nContent-Length: 2", "Content-Length: 2, 2", "Content-Length: +2", "Content-Length: -2",
        "Content-Length: 0x2", "Content-Length: 2.0", "Content-Length:", "Content-Length: 1 2",
        "Content-Length: 2\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 2",
        "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "Transfer-Encoding : chunked",
        "Transfer-Encoding: \x0bchunked", "Transfer-Encoding: xchunked", "Transfer-Encoding:", "X: a\rb")),
    (BAD.replace("1.1", "1.0") + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "malformed_request", False),
    ("GET /model HTTP/2.0\r\nHost: x\r\n\r\n", 505, "http_version_not_supported", False),
    ("GET /model HTTP/0.9\r\nHost: x\r\n\r\n", 505, "http_version_not_supported", False),
    ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported", False),
    (head_of(16385), 431, "head_too_large", False),
    (head_of(16385)[:16385], 431, "head_too_large", False),
    ("GET /" + "x" * 200_000, 431, "head_too_large", False),
    (line("/health") + "A: b\r\n" * 100 + "\r\n", 431, "head_too_large", False),
    # 401, then 404, then 405
    (line("/model") + "\r\n", 401, "unauthorized", True),
    (line("/") + "\r\n", 401, "unauthorized", True),
    (line("/%68ealth") + "\r\n", 401, "unauthorized", True),
    (line("/model") + AUTH + AUTH + "\r\n", 401, "unauthorized", True),
    (line("/submit", "POST") + "Content-Length: 99999999\r\n\r\n", 401, "unauthorized", False),
    (line("/submit", "POST") + "Expect: 100-continue\r\nContent-Length: 9\r\n\r\n", 401, "unauthorized", False),
    (line("/nowhere", "POST") + AUTH + "Content-Length: 99999999\r\n\r\n", 404, "not_found", False),
    (line("/metrics") + AUTH + "\r\n", 404, "not_found", True),
    (line("//model") + AUTH + "\r\n", 404, "not_found", True),
    (line("/model/../health") + AUTH + "\r\n", 404, "not_found", True),
    (line("/model%2Fpartial") + MINER + "\r\n", 404, "not_found", True),
    (line("/MODEL") + AUTH + "\r\n", 404, "not_found", True),
    (line("x:1", "CONNECT") + AUTH + "\r\n", 404, "not_found", True),
    (line("/model", "get") + AUTH + "\r\n", 405, "method_not_allowed", True),
    (line("/model", "PUT") + AUTH + "Content-Length: 99999999\r\n\r\n", 405, "method_not_allowed", False),
    (line("/submit", "HEAD") + AUTH + "\r\n", 405, None, True),
    # then what the body says before it has come
    (POST + "Content-Length: 65537\r\n\r\n", 413, "body_too_large", False),
    (POST + f"Content-Length: {'9' * 20}\r\n\r\n", 413, "body_too_large", False),
    (POST + "Content-Length: 65537\r\nExpect: 100-continue\r\n\r\n", 413, "body_too_large", False),
    (line("/model/partial") + MINER + "Content-Length: 65537\r\n\r\n", 413, "body_too_large", False),
    (POST + "Content-Length: 2\r\nExpect: 200-maybe\r\n\r\n", 417, "expectation_failed", False),
    # then the body
    (POST + "Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: b\r\n\r\n", 400, "missing_field", True),
    (POST + "Transfer-Encoding: CHUNKED\r\n\r\n0002\r\n{}\r\n000\r\n\r\n", 400, "missing_field", True),
    (POST + "Content-Length: 2\r\n\r\n{}", 400, "missing_field", True),
    (POST + "Content-Length: 0002\r\n\r\n{}", 400, "missing_field", True),
    (POST + "\r\n", 400, "invalid_json", True),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_the_table(node: Node, row: int) -> None:
    text, status, code, stays = TABLE[row]
    method = "HEAD" if text.startswith("HEAD") else "GET"
    with Client(node.port) as client:
        client.send(text)
        answer = client.read(method)
        assert answer.status == status
        if code is not None:
            assert answer.code == code
        assert answer.complete
        assert answer.get("date")
        assert (answer.get("connection") == "close") == (not stays)
        assert (answer.get("www-authenticate") == "Bearer") == (status == 401)
        assert (answer.get("allow") is not None) == (status == 405)
        assert TOKEN.encode() not in answer.body
        if stays:
            client.send(HEALTH)
            assert client.read().status == 200
        else:
            assert client.ends()


GETS = [
    ("/health", ""),
    ("/openapi.json", ""),
    *((f"/model{path}", MINER) for path in ("", "/partial", "/shared", "/partial/manifest", "/shared/manifest")),
    ("/model/partial?format=safetensors", MINER),
    ("/model/shared?version=step_1000", MINER),
    ("/model/full", "VALIDATOR"),
    ("/model/full/manifest", "VALIDATOR"),
    ("/scores", AUTH),
    ("/submissions/550e8400-e29b-41d4-a716-446655440000", AUTH),
    ("/model/partial", MINER + "If-None-Match: *\r\n"),
    ("/model/partial", MINER + 'If-Match: "x"\r\n'),
    ("/model/partial", AUTH),
    ("/model/partial", ""),
    ("/model/full", MINER),
    ("/model/partial", MINER.replace("Group: 0", "Group: 77")),
    ("/nowhere", AUTH),
]  # fmt: skip


@pytest.mark.parametrize(("target", "fields"), GETS)
def test_head_is_get_without_its_body(node: Node, target: str, fields: str) -> None:
    fields = fields.replace("VALIDATOR", f"Authorization: Bearer {node.validator_token}\r\n")
    with Client(node.port) as client:
        client.send(line(target, "HEAD") + fields + "Range: bytes=0-9\r\n\r\n" + line(target) + fields + "\r\n")
        head, get = client.read("HEAD"), client.read()
        changing = {"date"}
        assert head.status == get.status
        assert [f for f in head.headers if f[0] not in changing] == [f for f in get.headers if f[0] not in changing]
        if get.status != 304:
            assert int(head.get("content-length") or -1) == len(get.body)
        client.send(HEALTH)
        assert client.read().status == 200, "not a byte of a body came after the head"


def test_a_pipeline_of_everything_in_one_piece(desk: Desk) -> None:
    slice_ = desk.node.get("/model/partial", desk.node.headers(0))
    raw = json.dumps(signed(new_key(), Desk.NOW))
    post = f"{POST}Content-Length: {len(raw)}\r\n\r\n{raw}"
    chunked = f"{POST}Transfer-Encoding: chunked\r\n\r\n{len(raw):x}\r\n{raw}\r\n0\r\n\r\n"
    get = line("/model/partial") + MINER
    sent: list[tuple[str, int, bytes | None]] = [
        (get + "Range: bytes=5-9\r\n\r\n", 206, slice_.body[5:10]),
        (post, 202, None),
        (chunked, 409, None),
        (line("/model/partial", "HEAD") + MINER + "\r\n", 200, b""),
        (get + "\r\n", 200, slice_.body),
        (get + f"If-None-Match: {slice_.headers['ETag']}\r\n\r\n", 304, b""),
        (line("/nowhere") + AUTH + "\r\n", 404, None),
        (line("/model") + "\r\n", 401, None),
        (get + "\r\n", 200, slice_.body),
        (line("/health") + "Connection: close\r\n\r\n", 200, None),
        (HEALTH, 0, None),
    ]  # fmt: skip
    with Client(desk.node.port) as client:
        client.send("".join(text for text, _, _ in sent))
        for text, status, body in sent[:-1]:
            answer = client.read("HEAD" if text.startswith("HEAD") else "GET")
            assert answer.status == status, text[:60]
            assert body is None or answer.body == body
        assert client.ends(), "what follows a request that closes is not served"


def test_expect_100_continue(desk: Desk) -> None:
    raw = json.dumps(signed(new_key(), Desk.NOW))
    with Client(desk.node.port) as client:
        client.send(f"{POST}Content-Length: {len(raw)}\r\nExpect: 100-Continue\r\n\r\n")
        assert client.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(raw)
        assert client.read().status == 202
        client.send(f"{POST}Content-Length: {len(raw)}\r\nExpect: 100-continue\r\n\r\n{raw}")
        assert client.read().status == 409, "whoever does not wait gets no 100"


# --- ranges ---


@pytest.fixture(scope="module")
def whole(node: Node) -> bytes:
    return node.get("/model/shared", node.headers()).body


EDGES = [0, 1, 2, 5, 4095, 4096, 4097, 8192, 100_000]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ranges_parse_back_to_the_bytes(node: Node, whole: bytes, data: st.DataObject) -> None:
    size = len(whole)
    position = st.one_of(st.sampled_from([*EDGES, size - 1, size, size + 7]), st.integers(0, size + 9))
    pair = st.one_of(
        st.tuples(position, st.integers(0, 9000)).map(lambda p: (p[0], p[0] + p[1])),
        st.tuples(position.map(lambda p: max(p, size - 9000)), st.none()),
        st.tuples(st.none(), st.integers(0, 9000)),
    )
    pairs: list[Pair] = data.draw(st.lists(pair, min_size=1, max_size=18))
    comma = data.draw(st.sampled_from([",", ", ", " ,\t"]))
    written = comma.join(f"{'' if a is None else a}-{'' if b is None else b}" for a, b in pairs)
    answer = ask(node, line("/model/shared") + MINER + f"Range: bytes={written}\r\n\r\n")
    spans = spans_of(pairs, size)
    if len(pairs) > 16:
        assert (answer.status, answer.body) == (200, whole), "more than 16 as written: ignored"
    elif not spans:
        assert (answer.status, answer.get("content-range")) == (416, f"bytes */{size}")
        assert answer.code == "range_not_satisfiable"
    elif len(spans) == 1:
        ((start, stop),) = spans
        assert (answer.status, answer.get("content-range")) == (206, f"bytes {start}-{stop - 1}/{size}")
        assert answer.body == whole[start:stop]
    else:
        assert answer.status == 206
        assert answer.get("content-range") is None
        kind = answer.get("content-type") or ""
        parts = parse_multipart(kind, answer.body)
        assert [where for where, _ in parts] == [f"bytes {a}-{b - 1}/{size}" for a, b in spans]
        assert [content for _, content in parts] == [whole[a:b] for a, b in spans]


def test_ranges_that_are_none(node: Node, whole: bytes) -> None:
    size = len(whole)
    for text in ("bytes=", "bytes=-", "bytes=a-b", "bytes=5-1", "bytes=0-1;2-3", "items=0-1", "bytes", "bytes=0-1-2",
                 "bytes =0-1", "bytes= 0-1", "bytes=+1-2", "bytes=1.0-2", "bytes=0x0-1", "bytes=\u00b2-3"):  # fmt: skip
        answer = ask(node, line("/model/shared") + MINER + f"Range: {text}\r\n\r\n")
        assert (answer.status, len(answer.body)) == (200, size), text
    for text, status in (("BYTES=0-0", 206), ("bytes=,0-0,", 206), ("bytes=" + "0" * 5000 + "-0", 206),
                         ("bytes=-0", 416), ("bytes=" + "9" * 5000 + "-", 416),
                         ("bytes=0-" + "9" * 5000, 206)):  # fmt: skip
        assert ask(node, line("/model/shared") + MINER + f"Range: {text}\r\n\r\n").status == status, text


# --- the slow and the many ---

PATIENCE = {
    "BZ_HTTP_HEAD_TIMEOUT_S": "0.8",
    "BZ_HTTP_BODY_TIMEOUT_S": "0.8",
    "BZ_HTTP_IDLE_TIMEOUT_S": "1.5",
    "BZ_HTTP_STALL_TIMEOUT_S": "1.0",
    "BZ_HTTP_LINGER_S": "1.5",
    "BZ_HTTP_MAX_CONNECTIONS_PER_CALLER": "4",
}


@pytest.fixture(scope="module")
def hasty(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with little patience, and with four connections a caller."""
    place = beside(node, tmp_path_factory.mktemp("hasty"))
    ledger = str(place / "ledger.sqlite")
    with running_node(place, "--ledger", ledger, environment=PATIENCE) as running:
        yield running
        assert troubles(running) == []


def trickle(client: Client, start: str, text: str, pause: float = 0.05) -> float:
    """Send `start`, then byte by byte until the server answers; the seconds until then."""
    begun = time.monotonic()
    client.send(start)
    client.socket.settimeout(pause)
    for letter in text:
        client.send(letter)
        try:
            if client.socket.recv(1, socket.MSG_PEEK):
                break
        except TimeoutError:
            continue
    client.socket.settimeout(20)
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "start", ["", POST + "Content-Length: 900\r\n\r\n", POST + "Transfer-Encoding: chunked\r\n\r\n900\r\n"]
)
def test_slow_senders(hasty: Node, start: str) -> None:
    with Client(hasty.port) as client:
        seconds = trickle(client, start, line("/model/partial") + "x" * 900)
        answer = client.read()
        assert (answer.status, answer.code, answer.get("connection")) == (408, "request_timeout", "close")
        assert seconds > 0.7
        assert client.ends()


def test_idle_connections_are_closed_without_a_word(hasty: Node) -> None:
    with Client(hasty.port) as client:
        begun = time.monotonic()
        client.send(HEALTH)
        assert client.read().status == 200
        assert client.ends()
        assert time.monotonic() - begun > 1.4


def test_a_reader_that_stalls_is_closed_and_a_slow_one_is_not(hasty: Node) -> None:
    full = line("/model/full") + f"Authorization: Bearer {hasty.validator_token}\r\n\r\n"
    with Client(hasty.port, 65536) as stalled, Client(hasty.port, 65536) as slow:
        for client in (stalled, slow):
            client.send(full)
        begun = time.monotonic()
        while time.monotonic() - begun < 2.8:
            assert slow.socket.recv(30_000)
            time.sleep(0.02)
        stalled.socket.settimeout(5)
        with pytest.raises(ConnectionResetError):
            read_all(stalled)


def read_all(client: Client) -> None:
    while client.socket.recv(1 << 20):
        pass


def pour(client: Client, piece: bytes) -> int:
    """Send until the connection is closed; the bytes that were sent."""
    sent = 0
    try:
        while True:
            sent += client.socket.send(piece)
    except (BrokenPipeError, ConnectionResetError):
        return sent


def test_input_after_an_early_answer(hasty: Node) -> None:
    refused = line("/submit", "POST") + "Content-Length: 9999999\r\n\r\n"
    with Client(hasty.port) as client:
        client.send(refused)
        client.send(b"x" * 900_000)
        assert client.read().status == 401, "it can be read, whatever was sent"
        assert client.ends()
        pour(client, b"x")  # ends: discarded for linger_s, then closed
    with Client(hasty.port) as client:
        client.send(refused)
        assert client.read().status == 401
        assert pour(client, b"x" * 65536) < 32 << 20, "after 1 MiB, and what lies in buffers, it is closed"


def test_connections_of_one_caller_and_the_order_of_refusals(hasty: Node) -> None:
    def settled() -> bool:
        with Client(hasty.port) as probe:
            probe.send(line("/model") + AUTH + "\r\n")
            return probe.read().status == 200

    with ExitStack() as stack:
        held = [stack.enter_context(Client(hasty.port)) for _ in range(4)]
        for client in held:
            client.send(line("/model") + AUTH + "\r\n")
            assert client.read().status == 200
        validator = f"Authorization: Bearer {hasty.validator_token}\r\n"
        for text, status in (
            (HEALTH, 200),
            (line("/model") + "\r\n", 401),
            (line("/nowhere") + AUTH + "\r\n", 404),
            (line("/model", "PUT") + AUTH + "\r\n", 405),
            (line("/model/partial") + AUTH + "\r\n", 400),
            (line("/model/full") + AUTH + "\r\n", 403),
            (line("/model/partial") + MINER.replace("Group: 0", "Group: 77") + "\r\n", 429),
            (line("/model/partial") + MINER + "If-None-Match: *\r\n\r\n", 429),
            (line("/model") + AUTH + "\r\n", 429),
            (line("/model/full/manifest") + validator + "\r\n", 200),
        ):
            answer = ask(hasty, text)
            assert answer.status == status, text
            if status == 429:
                assert (answer.code, answer.get("connection")) == ("too_many_connections", "close")
                assert int(answer.get("retry-after") or 0) >= 1
    eventually(settled, "closed connections leave their seats")


def test_a_draining_node(node: Node, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = beside(node, tmp_path_factory.mktemp("draining"))
    with (
        running_node(place, "--ledger", str(place / "ledger.sqlite")) as draining,
        Client(draining.port, 65536) as download,
        Client(draining.port) as late,
        Client(draining.port) as asking,
    ):
        download.send(line("/model/full") + f"Authorization: Bearer {draining.validator_token}\r\n\r\n")
        assert download.socket.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        late.send(line("/model") + AUTH)
        asking.send(line("/health"))
        for client in (late, asking):  # the heads have arrived when the node has acknowledged them
            eventually(lambda c=client: unacknowledged(c) == 0, "the bytes are there")  # type: ignore[misc]
        draining.process.send_signal(signal.SIGTERM)
        eventually(lambda: refused(draining.port), "new connections are refused")
        late.send("\r\n")
        answer = late.read()
        assert (answer.status, answer.code, answer.get("connection")) == (503, "draining", "close")
        assert int(answer.get("retry-after") or 0) >= 1
        asking.send("\r\n")
        answer = asking.read()
        assert (answer.status, json.loads(answer.body)["status"]) == (200, "draining")


def unacknowledged(client: Client) -> int:
    from bzstream.http.io.transports import unacknowledged

    return unacknowledged(client.socket.fileno())


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False
