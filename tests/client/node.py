"""A small validator for the client's tests, written from the HTTP contract alone: honest, and able to lie.

Standard library only, a thread a connection. `Node.lie` names how the next data answers are false, `Node.lies_left`
how many of them (None: all).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, urlsplit

from blake3 import blake3

TOKEN = "t" * 32
HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"

Key = tuple[str, int | None]


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], align: int = 4096) -> bytes:
    """A safetensors file: name -> (dtype, shape, data)."""
    head: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(head).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


@dataclass
class Unit:
    payload: bytes
    version: str = "step_1"
    block: int = 12345

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.payload).hexdigest()


@dataclass
class Seen:
    """One request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def range(self) -> tuple[int, int] | None:
        """First and one past the last byte asked for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(found[1]), int(found[2]) + 1) if found else None


@dataclass
class Node:
    """Listens on loopback from `start()` to `stop()`; usable as a context manager."""

    units: dict[Key, Unit] = field(default_factory=dict)
    chunk_size: int = 65536
    port: int = 0
    lie: str = ""
    lies_left: int | None = None
    rate: float = 0.0
    """Bytes a second of one connection; 0: as fast as it goes."""
    sign: Callable[[dict[str, Any]], tuple[str, str]] | None = None
    """Fields -> (hotkey, URL-safe base64 signature)."""
    answer: Callable[[Seen], tuple[int, list[tuple[str, str]], bytes] | None] | None = None
    """Answers some requests itself."""
    hotkey: str | None = None
    """Whose node it says it is."""
    tls: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    sent: int = 0
    """Payload bytes sent."""
    connections: int = 0

    def __enter__(self) -> Node:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """Close everything at once, as a killed server does."""
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def data_requests(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.range is not None]

    def manifest(self, key: Key) -> dict[str, Any]:
        unit = self.units[key]
        data, size = unit.payload, self.chunk_size
        fields: dict[str, Any] = {
            "unit": key[0], "expert_group": key[1], "block_number": unit.block, "model_version": unit.version,
            "content_hash": "sha256:" + unit.sha256, "payload_offset": 4096, "size": len(data),
            "chunk_size": size, "chunk_hash": "blake3",
            "chunks": [blake3(data[i : i + size]).hexdigest() for i in range(0, len(data), size)],
            "validator_hotkey": None,
        }  # fmt: skip
        signature = None
        if self.sign is not None:
            fields["validator_hotkey"], signature = self.sign(fields)
        return {**fields, "signature": signature}

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            with self._lock:
                self._open.add(sock)
                self._threads.append(thread)
                self.connections += 1
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        raw = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True)
            stream = sock.makefile("rb")
            while self._one(sock, stream):
                pass
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._open.discard(raw)
            sock.close()

    def _one(self, sock: socket.socket, stream: Any) -> bool:
        line = stream.readline(65536).decode("latin-1").split()
        if len(line) != 3:
            return False
        headers: dict[str, str] = {}
        while (raw := stream.readline(65536)) not in (b"\r\n", b""):
            name, _, value = raw.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", "0")))
        request = Seen(line[0], line[1], headers, body)
        with self._lock:
            self.seen.append(request)
        if self.answer is not None and (answer := self.answer(request)) is not None:
            status, fields, content = answer
            self._send(sock, status, [*fields, ("Content-Length", str(len(content)))], content)
            return True
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return self._problem(sock, 401, "unauthorized", [("WWW-Authenticate", "Bearer")])
        return self._unit(sock, request)

    def _unit(self, sock: socket.socket, request: Seen) -> bool:
        parts = request.path.strip("/").split("/")
        if parts == ["model"]:
            content = json.dumps({"validator_hotkey": self.hotkey, "versions": []}).encode()
            self._send(sock, 200, [("Content-Length", str(len(content)))], content)
            return True
        if len(parts) < 2 or parts[0] != "model":
            return self._problem(sock, 404, "not_found")
        group = request.headers.get("x-expert-group") if parts[1] == "partial" else None
        if parts[1] != "full" and "x-hotkey" not in request.headers:
            return self._problem(sock, 400, "missing_header")
        unit = self.units.get((parts[1], None if group is None else int(group)))
        wanted = request.query.get("version", [unit.version if unit else ""])[0]
        if unit is None or wanted != unit.version:
            return self._problem(sock, 404, "unknown_group")
        if parts[2:] == ["manifest"]:
            content = json.dumps(self.manifest((parts[1], None if group is None else int(group)))).encode()
            self._send(sock, 200, [("Content-Length", str(len(content)))], content)
            return True
        return self._payload(sock, request, unit)

    def _problem(
        self, sock: socket.socket, status: int, code: str, fields: list[tuple[str, str]] | None = None
    ) -> bool:
        content = json.dumps({"detail": f"no: {code}", "code": code}).encode()
        self._send(sock, status, [*(fields or []), ("Content-Length", str(len(content)))], content)
        return True

    def _take_lie(self) -> str:
        with self._lock:
            if not self.lie or self.lies_left == 0:
                return ""
            if self.lies_left is not None:
                self.lies_left -= 1
            return self.lie

    def _payload(self, sock: socket.socket, request: Seen, unit: Unit) -> bool:
        etag = f'"{unit.sha256}"'
        lie = self._take_lie()
        match = request.headers.get("if-match")
        if match is not None and match != etag:
            return self._problem(sock, 412, "precondition_failed")
        size = len(unit.payload)
        begin, end = request.range or (0, size)
        status = 206 if request.range else 200
        if begin >= size:
            return self._problem(sock, 416, "range", [("Content-Range", f"bytes */{size}")])
        end = min(end, size)
        body = memoryview(unit.payload)[begin:end]
        fields = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(len(body))}
        if status == 206:
            fields["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        if lie == "flip":
            changed = bytearray(body)
            changed[len(changed) // 2] ^= 1
            body = memoryview(changed)
        elif lie == "short":
            body = body[: len(body) // 2]
        elif lie == "empty":
            body = body[:0]
        elif lie == "200":
            status, body = 200, memoryview(unit.payload)
            fields["Content-Length"] = str(size)
            del fields["Content-Range"]
        elif lie == "etag":
            fields["ETag"] = '"' + os.urandom(32).hex() + '"'
        elif lie == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        elif lie == "content-range":
            fields["Content-Range"] = f"bytes {begin + 1}-{end}/{size}"
        elif lie == "length":
            fields["Content-Length"] = str(len(body) + 5)
        elif lie == "redirect":
            fields = {"Location": "http://127.0.0.1:1/elsewhere", "Content-Length": "0"}
            status, body = 302, memoryview(b"")
        elif lie == "chunked":
            del fields["Content-Length"]
            fields["Transfer-Encoding"] = "chunked"
        elif lie == "garbage":
            sock.sendall(b"\x00\x01 not http at all\r\n\r\n")
            return False
        elif lie == "endless-head":
            sock.sendall(b"HTTP/1.1 206 Partial Content\r\n")
            while not self._over.is_set():
                sock.sendall(b"X-More: " + b"x" * 1000 + b"\r\n")
            return False
        elif lie == "endless-interim":
            while not self._over.is_set():
                sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 16)
            return False
        elif lie == "stall":
            self._send(sock, status, list(fields.items()), bytes(body[:1000]))
            self._over.wait(60)
            return False
        self._send(sock, status, list(fields.items()), body, count=True)
        return lie not in ("short", "empty", "length", "chunked")

    def _send(
        self,
        sock: socket.socket,
        status: int,
        fields: list[tuple[str, str]],
        content: bytes | memoryview,
        *,
        count: bool = False,
    ) -> None:
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
        sock.sendall(head.encode("latin-1"))
        view = memoryview(content)
        piece = len(view) if not self.rate else max(1024, int(self.rate / 50))
        for at in range(0, len(view), max(1, piece)):
            sock.sendall(view[at : at + piece])
            if count:
                with self._lock:
                    self.sent += len(view[at : at + piece])
            if self.rate:
                time.sleep(piece / self.rate)


def ed25519_signer(key: Any) -> Callable[[dict[str, Any]], tuple[str, str]]:
    """A `Node.sign` for a bzstream key: the canonical JSON written here by hand, not by the code under test."""

    def sign(fields: dict[str, Any]) -> tuple[str, str]:
        named = {**fields, "validator_hotkey": key.ss58_address}
        message = json.dumps(named, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        return key.ss58_address, base64.urlsafe_b64encode(key.sign(message)).decode()

    return sign
