"""A peer that lies: it passes requests on to a real node, and changes what comes back."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Relay:
    """`change(path, body)` is what is sent instead of the body; the head is the node's, but for the length."""

    def __init__(self, port: int, change: Callable[[str, bytes], bytes] = lambda path, body: body) -> None:
        self.change = change
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with suppress(OSError):  # a client may go at any time
                    super().handle()

            def do_GET(self) -> None:
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as node:
                    node.request("GET", self.path, headers=dict(self.headers))
                    response = node.getresponse()
                    body = relay.change(self.path, response.read())
                self.send_response_only(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
