"""Requests and their answers, over real sockets."""

from __future__ import annotations

import re

import msgspec
import pytest

from bzstream.http.protocol.dates import format_date
from tests.http.support import AUTH, ENVELOPE, ETAG, MODIFIED, Running

GET = "GET {} HTTP/1.1\r\nHost: x\r\n"
FILE = GET.format("/file") + AUTH
POST = "POST /echo HTTP/1.1\r\nHost: x\r\n" + AUTH

# (request, status, error code or None, does the connection stay open)
TABLE = [
    (GET.format("/health") + "\r\n", 200, None, True),
    (GET.format("http://any.host/health") + "\r\n", 200, None, True),
    (GET.format("/h%65alth") + AUTH + "\r\n", 200, None, True),
    ("\r\n\r\n" + GET.format("/health") + "\r\n", 200, None, True),
    ("GET /health HTTP/1.0\r\n\r\n", 200, None, False),
    ("GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, None, False),
    ("GET /health HTTP/1.7\r\nHost: x\r\n\r\n", 200, None, True),
    (GET.format("/health") + "Connection: close\r\n\r\n", 200, None, False),
    (GET.format("/health") + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200, None, True),
    (GET.format("/health") + "Content-Length: 3\r\n\r\nabc", 200, None, True),
    (FILE + "\r\n", 200, None, True),
    ("HEAD /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", 200, None, True),
    (GET.format("/items/a%2Fb?x=1") + AUTH + "\r\n", 200, None, True),
    (POST + "Content-Length: 5\r\n\r\nhello", 200, None, True),
    (POST + "Content-Length: 0\r\n\r\n", 200, None, True),
    (POST + "\r\n", 200, None, True),
    (POST + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200, None, True),
    (POST + "Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nTrailer: x\r\n\r\n", 200, None, True),
    (GET.format("/health") + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200, None, True),
    ("OPTIONS * HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", 204, None, True),
    # 400 framing comes before everything
    ("GET /file HTTP/1.1\nHost: x\n\n", 400, "malformed_request", False),
    ("GET /file HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400, "malformed_request", False),
    ("GET /file\r\n\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "A: 1\r\n 2\r\n\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "A : 1\r\n\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "A: \x00\r\n\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "A: " + " " * 16_000 + "\x00\r\n\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "A: a\x0bb\x7f\r\n\r\n", 400, "malformed_request", False),
    ("\r\n" * 9 + GET.format("/health") + "\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "A: 1\r2\r\n\r\n", 400, "malformed_request", False),
    (GET.format("/file") + "NoColon\r\n\r\n", 400, "malformed_request", False),
    ("GET /file HTTP/1.1\r\n\r\n", 400, "malformed_request", False),
    (POST + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400, "malformed_request", False),
    (POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "malformed_request", False),
    ("POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n0\r\n\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n5;\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n5;a=\rb\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n100000000\r\n", 400, "malformed_request", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n0\r\nA: " + " " * 9999 + "\0\r\n", 400, "malformed_request", False),
    (GET.format("file") + "\r\n", 400, "malformed_request", False),
    ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_request", False),
    ("GET /file HTTP/2.0\r\nHost: x\r\n\r\n", 505, "http_version_not_supported", False),
    ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported", False),
    (GET.format("/file") + "A: 1\r\n" * 100 + "\r\n", 431, "head_too_large", False),
    (GET.format("/file") + "A: " + "x" * 17_000 + "\r\n\r\n", 431, "head_too_large", False),
    (GET.format("/" + "x" * 17_000) + "\r\n", 431, "head_too_large", False),
    ("GET /" + "x" * 17_000, 431, "head_too_large", False),
    # then 401, 404, 405
    (GET.format("/file") + "\r\n", 401, "unauthorized", True),
    (GET.format("/unknown") + "\r\n", 401, "unauthorized", True),
    ("DELETE /file HTTP/1.1\r\nHost: x\r\n\r\n", 401, "unauthorized", True),
    ("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", 401, "unauthorized", False),
    ("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 401, "unauthorized", False),
    (GET.format("/unknown") + AUTH + "\r\n", 404, "not_found", True),
    (GET.format("/") + AUTH + "\r\n", 404, "not_found", True),
    ("CONNECT host:80 HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", 404, "not_found", True),
    ("DELETE /unknown HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", 404, "not_found", True),
    ("DELETE /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", 405, "method_not_allowed", True),
    ("get /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", 405, "method_not_allowed", True),
    (GET.format("/echo") + AUTH + "\r\n", 405, "method_not_allowed", True),
    # then the body's head
    (POST + "Content-Length: 65537\r\n\r\n", 413, "body_too_large", False),
    (POST + f"Content-Length: {'9' * 18}\r\n\r\n", 413, "body_too_large", False),
    (FILE + "Content-Length: 65537\r\n\r\n", 413, "body_too_large", False),
    (POST + "Content-Length: 65537\r\nExpect: 100-continue\r\n\r\n", 413, "body_too_large", False),
    (POST + "Content-Length: 5\r\nExpect: 200-ok\r\n\r\n", 417, "expectation_failed", False),
    (POST + "Transfer-Encoding: chunked\r\n\r\n10001\r\n" + "x" * 0x10001, 413, "body_too_large", False),
    # then the application
    (GET.format("/items/1?a=1&a=2") + AUTH + "\r\n", 400, "bad_query", True),
    (GET.format("/file") + AUTH + AUTH + "\r\n", 400, "repeated_header", True),
    (GET.format("/forbidden") + AUTH + "\r\n", 403, "forbidden", True),
    (GET.format("/bug") + AUTH + "\r\n", 500, "internal_error", True),
    (GET.format("/async-bug") + AUTH + "\r\n", 500, "internal_error", True),
    (GET.format("/bad-header") + AUTH + "\r\n", 500, "internal_error", True),
    # then conditions and ranges
    (FILE + 'If-Match: "other"\r\n\r\n', 412, "precondition_failed", True),
    (FILE + f"If-None-Match: {ETAG}\r\n\r\n", 304, None, True),
    (FILE + "If-None-Match: *\r\nRange: bytes=0-0\r\n\r\n", 304, None, True),
    (FILE + f"If-Modified-Since: {format_date(MODIFIED)}\r\n\r\n", 304, None, True),
    (FILE + "Range: bytes=99999999-\r\n\r\n", 416, "range_not_satisfiable", True),
    (FILE + "Range: bytes=0-0\r\n\r\n", 206, None, True),
    (FILE + 'Range: bytes=0-0\r\nIf-Range: "other"\r\n\r\n', 200, None, True),
    (FILE + "Range: bytes=0-0\r\nRange: bytes=1-1\r\n\r\n", 200, None, True),
    (FILE + "Range: bytes=" + ",".join(f"{n}-{n}" for n in range(0, 34, 2)) + "\r\n\r\n", 200, None, True),
    (GET.format("/empty") + AUTH + "\r\n", 200, None, True),
    (GET.format("/empty") + AUTH + "Range: bytes=-5\r\n\r\n", 200, None, True),
    (GET.format("/empty") + AUTH + "Range: bytes=0-\r\n\r\n", 416, "range_not_satisfiable", True),
]


@pytest.mark.parametrize(("request_text", "status", "code", "stays"), TABLE)
def test_the_table(running: Running, request_text: str, status: int, code: str | None, stays: bool) -> None:
    method = request_text.split(" ")[0]
    method = method if method in ("HEAD", "OPTIONS") else "GET"
    with running.connect() as client:
        client.send(request_text)
        answer = client.read(method)
        assert answer.status == status
        assert answer.complete
        assert answer.get("date")
        assert answer.get("server") == "bzstream"
        assert (answer.get("connection") == "close") == (not stays)
        if code is not None:
            assert answer.code == code
            assert b"secret" not in answer.body
        if stays:
            client.send(GET.format("/health") + "\r\n")
            assert client.read().status == 200
        else:
            assert client.ends()


def test_whole_ranges_and_head(running: Running) -> None:
    content = running.application.content
    size = len(content)
    whole = running.ask(FILE + "\r\n")
    assert whole.body == content
    headers = dict(whole.headers)
    assert headers["etag"] == ETAG
    assert headers["last-modified"] == format_date(MODIFIED)
    assert headers["accept-ranges"] == "bytes"
    assert headers["content-length"] == str(size)
    assert headers["x-extra"] == "yes"
    head = running.ask(FILE.replace("GET", "HEAD") + "Range: bytes=0-5\r\n\r\n", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert {k: v for k, v in head.headers if k != "date"} == {k: v for k, v in whole.headers if k != "date"}
    for field, start, stop in (
        ("0-0", 0, 1),
        ("4000-5000", 4000, 5001),
        (f"{len(ENVELOPE)}-", len(ENVELOPE), size),
        ("-7", size - 7, size),
        ("0-99999999999", 0, size),
        ("10-19,20-29,25-40", 10, 41),
    ):
        answer = running.ask(FILE + f"Range: bytes={field}\r\nIf-Range: {ETAG}\r\n\r\n")
        assert answer.status == 206
        assert answer.get("content-range") == f"bytes {start}-{stop - 1}/{size}"
        assert answer.body == content[start:stop]
        assert answer.get("etag") == ETAG


def test_several_ranges_come_as_multipart(running: Running) -> None:
    content = running.application.content
    size = len(content)
    wanted = [(5000, 6000), (0, 10), (4090, 4100), (size - 3, size)]
    field = ", ".join(f"{a}-{b - 1}" for a, b in wanted)
    answer = running.ask(FILE + f"Range: bytes={field}\r\n\r\n")
    assert answer.status == 206
    assert answer.get("content-range") is None
    match = re.fullmatch("multipart/byteranges; boundary=([0-9a-f]{32})", answer.get("content-type") or "")
    assert match
    assert len(answer.body) == int(answer.get("content-length") or 0)
    lead, *parts, end = answer.body.split(f"--{match[1]}".encode())
    assert (lead, end) == (b"", b"--\r\n")
    for part, (a, b) in zip(parts, wanted, strict=True):
        head, _, body = part.partition(b"\r\n\r\n")
        assert f"Content-Range: bytes {a}-{b - 1}/{size}".encode() in head
        assert body == content[a:b] + b"\r\n"


def test_what_304_412_416_405_and_401_carry(running: Running) -> None:
    not_modified = running.ask(FILE + f"If-None-Match: {ETAG}\r\n\r\n")
    assert {name for name, _ in not_modified.headers} == {"date", "server", "etag", "cache-control"}
    assert running.ask(FILE + "Range: bytes=99999999-\r\n\r\n").get("content-range") == (
        f"bytes */{len(running.application.content)}"
    )
    assert running.ask("PUT /file HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n").get("allow") == "GET, HEAD"
    assert running.ask(GET.format("/file") + "\r\n").get("www-authenticate") == "Bearer"
    allowed = running.ask("OPTIONS * HTTP/1.1\r\nHost: x\r\n" + AUTH + "\r\n", method="OPTIONS")
    assert allowed.get("allow") == "GET, HEAD, OPTIONS, POST"


def test_100_continue_is_sent_when_the_body_is_wanted_and_only_then(running: Running) -> None:
    with running.connect() as client:
        client.send(POST + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert client.socket.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send("hello")
        assert client.read().body == b"hello"
        client.send(POST + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\nhello")
        assert client.read().body == b"hello"
    with running.connect() as client:
        client.send(POST.replace("1.1", "1.0") + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        client.send("hello")
        assert client.socket.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


def test_pipelined_requests_are_answered_in_order(running: Running) -> None:
    with running.connect() as client:
        one = POST + "Content-Length: 1\r\n\r\n{}"
        chunked = POST + "Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n"
        client.send("".join((one if n % 2 else chunked).format(chr(65 + n % 26)) for n in range(200)))
        client.send(FILE + "Range: bytes=0-3\r\n\r\n" + FILE + "\r\n" + GET.format("/health") + "\r\n")
        for n in range(200):
            assert client.read().body == bytes([65 + n % 26])
        assert client.read().body == ENVELOPE[:4]
        assert client.read().body == running.application.content
        assert client.read().status == 200


def test_bugs_are_told_to_the_observer_alone(running: Running) -> None:
    running.observer.errors.clear()
    for path in ("/bug", "/async-bug", "/bad-header"):
        answer = running.ask(GET.format(path) + AUTH + "\r\n")
        assert (answer.status, answer.code) == (500, "internal_error")
    assert len(running.observer.errors) == 3


def test_a_client_that_ends_its_side_early(running: Running) -> None:
    import socket

    with running.connect() as client:
        client.send(FILE + "\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read().body == running.application.content
        assert client.ends()
    for cut in (GET.format("/health"), POST + "Content-Length: 5\r\n\r\nhel", "G"):
        with running.connect() as client:
            client.send(cut)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.read().code == "malformed_request"
            assert client.ends()
    with running.connect() as client:
        client.socket.shutdown(socket.SHUT_WR)
        assert client.ends()


def test_an_early_answer_survives_the_body_that_nobody_reads(running: Running) -> None:
    with running.connect() as client:
        client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n")
        for _ in range(9):
            client.send(b"x" * 100_000)
        assert client.read().status == 401
        assert client.ends()


def test_peer_and_caller(running: Running) -> None:
    answer = running.ask(GET.format("/peer") + AUTH + "X-Hotkey: 5F\r\nX-Forwarded-For: 9.9.9.9\r\n\r\n")
    assert msgspec.json.decode(answer.body) == ["127.0.0.1", "5F", False]
