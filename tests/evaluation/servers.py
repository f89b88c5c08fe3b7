"""Servers that a hostile miner runs: each kind with the code that a fetch from it must end in.

One threaded server on loopback; the path's first segment picks the behaviour, which gets the socket after the request
head was read. `SERVERS` maps a name to (behaviour, code). Kinds that are no behaviour of an HTTP server (a closed
port, a forged certificate, a name that resolves to a private address) are in `test_fetch.py`.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

Behaviour = Callable[["Request"], None]
SERVERS: dict[str, tuple[Behaviour, str]] = {}

SIZE = 300_000
"""Bytes of the file that the servers claim to have; the tests allow `LIMIT`."""
LIMIT = 400_000
BODY = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)


class Request(NamedTuple):
    socket: socket.socket
    path: str
    start: int | None
    """First byte of the requested range."""
    stop: int
    server: Server
    times: int
    """How often this path was asked for, from 1."""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, status: str, *fields: str, body: bytes = b"") -> None:
        self.send("\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode() + body)

    def hold(self, seconds: float = 20.0) -> None:
        """Say nothing more until the client goes away or the server is closed."""
        self.socket.settimeout(seconds)
        with contextlib.suppress(OSError):
            while self.socket.recv(4096):
                pass

    def drip(self, data: bytes, seconds: float) -> None:
        for byte in data:
            self.send(bytes([byte]))
            if self.server.closing.wait(seconds):
                return


class Server:
    """Serves `files` honestly (with ranges) under /files/<name>, and every hostile kind under /<kind>."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.requests: list[str] = []
        self._counts: dict[str, int] = {}
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._socket.close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(65536)
                if not piece:
                    return
                head += piece
            path = head.split(b" ")[1].decode()
            found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d*)", head)
            start, stop = (int(found[1]), int(found[2] or 1 << 60) + 1) if found else (None, 1 << 60)
            self.requests.append(path)
            self._counts[path] = self._counts.get(path, 0) + 1
            request = Request(connection, path, start, stop, self, self._counts[path])
            parts = path.strip("/").split("/")
            if parts[0] == "files":
                honest(request, self.files[parts[1]])
            else:
                SERVERS[parts[0]][0](request)


def honest(request: Request, body: bytes, *, etag: str = '"v1"') -> None:
    if request.start is None or not body:
        request.answer("200 OK", f"Content-Length: {len(body)}", f"ETag: {etag}", body=body)
        return
    stop = min(request.stop, len(body))
    piece = body[request.start : stop]
    request.answer(
        "206 Partial Content",
        f"Content-Length: {len(piece)}",
        f"Content-Range: bytes {request.start}-{stop - 1}/{len(body)}",
        f"ETag: {etag}",
        body=piece,
    )


def kind(code: str) -> Callable[[Behaviour], Behaviour]:
    def add(behaviour: Behaviour) -> Behaviour:
        SERVERS[behaviour.__name__] = behaviour, code
        return behaviour

    return add


@kind("truncated")
def hangs_up_at_once(r: Request) -> None:
    pass


@kind("truncated")
def resets_at_once(r: Request) -> None:
    r.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@kind("stalled")
def never_answers(r: Request) -> None:
    r.hold()


@kind("stalled")
def drips_its_head(r: Request) -> None:
    r.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nX-Slow: " + b"a" * 10_000, 0.05)


@kind("bad_response")
def sends_a_head_without_end(r: Request) -> None:
    r.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        r.send(b"X-Field: " + b"a" * 1000 + b"\r\n")


@kind("bad_response")
def sends_interim_answers_without_end(r: Request) -> None:
    while True:
        r.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100)


@kind("bad_response")
def speaks_no_http(r: Request) -> None:
    r.send(b"220 mail.example.com ESMTP\r\n\r\n")
    r.hold()


@kind("bad_response")
def speaks_http_2(r: Request) -> None:
    r.send(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18))
    r.hold()


@kind("bad_response")
def has_two_lengths(r: Request) -> None:
    r.answer("200 OK", "Content-Length: 10", "Content-Length: 20", body=bytes(20))


@kind("bad_response")
def has_a_negative_length(r: Request) -> None:
    r.answer("200 OK", "Content-Length: -1", body=bytes(20))


@kind("bad_response")
def has_a_null_in_a_field(r: Request) -> None:
    r.answer("200 OK", "X-Field: a\0b", "Content-Length: 1", body=b"a")


@kind("bad_response")
def has_a_null_behind_much_white_space(r: Request) -> None:
    r.answer("200 OK", "X-Field:" + " " * 30_000 + "\0", "Content-Length: 1", body=b"a")


@kind("bad_response")
def sends_single_bytes_as_chunks(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: chunked", body=b"1\r\na\r\n" * 30_000 + b"0\r\n\r\n")


@kind("bad_response")
def frames_its_body_twice(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: chunked", "Content-Length: 1", body=b"1\r\na\r\n0\r\n\r\n")


@kind("bad_response")
def breaks_its_chunks(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: chunked", body=b"zz\r\nabc\r\n")


@kind("bad_response")
def uses_an_unknown_transfer_coding(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: gzip", body=bytes(20))


@kind("content_encoding")
def compresses(r: Request) -> None:
    r.answer("200 OK", "Content-Encoding: gzip", "Content-Length: 20", body=bytes(20))


@kind("http_status")
def is_not_found(r: Request) -> None:
    r.answer("404 Not Found", "Content-Length: 0")


@kind("http_status")
def is_always_broken(r: Request) -> None:
    r.answer("503 Service Unavailable", "Content-Length: 0")


@kind("http_status")
def has_no_content(r: Request) -> None:
    r.answer("204 No Content")


@kind("http_status")
def says_not_modified(r: Request) -> None:
    r.answer("304 Not Modified")


@kind("too_many_redirects")
def redirects_in_a_circle(r: Request) -> None:
    r.answer("302 Found", f"Location: {r.path}", "Content-Length: 0")


@kind("bad_response")
def redirects_to_nowhere(r: Request) -> None:
    r.answer("302 Found", "Content-Length: 0")


@kind("forbidden_url")
def redirects_to_a_file(r: Request) -> None:
    r.answer("302 Found", "Location: file:///etc/passwd", "Content-Length: 0")


@kind("forbidden_url")
def redirects_with_credentials(r: Request) -> None:
    r.answer("302 Found", f"Location: http://a:b@127.0.0.1:{r.server.port}/x", "Content-Length: 0")


@kind("forbidden_url")
def redirects_to_another_protocol(r: Request) -> None:
    r.answer("301 Moved", "Location: gopher://127.0.0.1:11211/_stats", "Content-Length: 0")


@kind("forbidden_url")
def redirects_to_a_disguised_address(r: Request) -> None:
    r.answer("307 Temporary Redirect", "Location: http://0x7f.1/", "Content-Length: 0")


@kind("forbidden_address")
def redirects_to_the_metadata_service(r: Request) -> None:
    r.answer("302 Found", "Location: http://169.254.169.254/latest/meta-data/", "Content-Length: 0")


@kind("forbidden_address")
def redirects_to_a_mapped_address(r: Request) -> None:
    r.answer("308 Permanent Redirect", "Location: http://[::ffff:10.0.0.1]/", "Content-Length: 0")


@kind("too_large")
def announces_a_terabyte(r: Request) -> None:
    r.answer("200 OK", f"Content-Length: {1 << 40}")
    r.hold()


@kind("too_large")
def announces_a_terabyte_in_ranges(r: Request) -> None:
    r.answer("206 Partial Content", "Content-Length: 10", f"Content-Range: bytes 0-9/{1 << 40}", body=bytes(10))


@kind("too_large")
def sends_without_end(r: Request) -> None:
    r.answer("200 OK", "Connection: close")
    while True:
        r.send(bytes(65536))


@kind("too_large")
def sends_chunks_without_end(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: chunked")
    while True:
        r.send(b"10000\r\n" + bytes(65536) + b"\r\n")


@kind("truncated")
def ends_early(r: Request) -> None:
    r.answer("200 OK", f"Content-Length: {SIZE}", body=BODY[:1000])


@kind("truncated")
def ends_early_in_chunks(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: chunked", body=b"3e8\r\n" + BODY[:1000] + b"\r\n")


@kind("truncated")
def resets_in_the_middle(r: Request) -> None:
    r.answer("200 OK", f"Content-Length: {SIZE}", body=BODY[:1000])
    r.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@kind("stalled")
def stops_in_the_middle(r: Request) -> None:
    r.answer("200 OK", f"Content-Length: {SIZE}", body=BODY[:1000])
    r.hold()


@kind("stalled")
def drips_its_body(r: Request) -> None:
    r.answer("200 OK", f"Content-Length: {SIZE}")
    r.drip(BODY, 0.05)


@kind("stalled")
def drips_its_chunks(r: Request) -> None:
    r.answer("200 OK", "Transfer-Encoding: chunked")
    while not r.server.closing.wait(0.05):
        r.send(b"1\r\na\r\n")


@kind("bad_response")
def answers_another_range(r: Request) -> None:
    r.answer("206 Partial Content", "Content-Length: 10", f"Content-Range: bytes 5-14/{SIZE}", body=bytes(10))


@kind("bad_response")
def answers_a_range_without_saying_which(r: Request) -> None:
    r.answer("206 Partial Content", "Content-Length: 10", body=bytes(10))


@kind("bad_response")
def answers_in_several_parts(r: Request) -> None:
    r.answer("206 Partial Content", "Content-Type: multipart/byteranges; boundary=x", "Content-Length: 0")


@kind("bad_response")
def answers_a_range_of_another_length(r: Request) -> None:
    r.answer("206 Partial Content", "Content-Length: 5", f"Content-Range: bytes 0-9/{SIZE}", body=bytes(5))


@kind("bad_response")
def changes_the_file_between_ranges(r: Request) -> None:
    honest(r, BODY, etag=f'"{r.start}"')


@kind("bad_response")
def changes_the_size_between_ranges(r: Request) -> None:
    honest(r, BODY if r.start == 0 else BODY + b"more")


@kind("bad_response")
def forgets_ranges_after_the_first(r: Request) -> None:
    if r.start == 0:
        honest(r, BODY)
    else:
        r.answer("200 OK", f"Content-Length: {SIZE}", body=BODY)


@kind("truncated")
def breaks_off_a_later_range(r: Request) -> None:
    if r.start == 0:
        honest(r, BODY)
        return
    assert r.start is not None
    length = min(r.stop, SIZE) - r.start
    head = f"Content-Range: bytes {r.start}-{r.start + length - 1}/{SIZE}"
    r.answer("206 Partial Content", f"Content-Length: {length}", head, 'ETag: "v1"', body=BODY[:10])


@kind("http_status")
def forbids_later_ranges(r: Request) -> None:
    if r.start == 0:
        honest(r, BODY)
    else:
        r.answer("403 Forbidden", "Content-Length: 0")


LATER = {
    "changes_the_file_between_ranges",
    "changes_the_size_between_ranges",
    "forgets_ranges_after_the_first",
    "breaks_off_a_later_range",
    "forbids_later_ranges",
}
"""Kinds that only show when the file is fetched in several ranges."""


def serving() -> Iterator[Server]:
    with Server() as server:
        yield server
