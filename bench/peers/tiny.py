"""bzstream's HTTP core alone, with a file and a health check: `python -m bench.peers.tiny PORT`.

What the latency bench measures: the core without tokens, logs and metrics. `bench.serve` has the whole node too.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from pathlib import Path

import uvloop

from bzstream.config import HttpSettings
from bzstream.http import Endpoint, Observer, Representation, Request, Response, Result, Router, Server
from bzstream.payload import Extent, Payload, UnitFile


class FileApplication:
    """`/file` and `/health`."""

    def __init__(self, file: UnitFile) -> None:
        payload = Payload((Extent(file, 0, file.size),))
        self._file = Representation(payload, '"bench"', 1_700_000_000, label="file")
        self._router = Router()
        self._router.add("GET", "/file", Endpoint(self._send))
        self._router.add("GET", "/health", Endpoint(self._health, limited=False))

    def admit(self, request: Request) -> Endpoint:
        if (miner := request.headers.get("x-miner")) is not None:
            request.caller = miner
        return self._router.match(request)

    def _send(self, request: Request) -> Result:
        return self._file

    def _health(self, request: Request) -> Result:
        return Response.json({"status": "healthy", "model_loaded": True, "current_block": 12345, "phase": "train"})


class StallObserver(Observer):
    """Tells the longest stall of the loop on stderr, whenever there is a longer one."""

    longest = 0.0

    def on_stall(self, seconds: float) -> None:
        if seconds > self.longest:
            self.longest = seconds
            print(f"stall {seconds:.6f}", file=sys.stderr, flush=True)


async def main() -> None:
    settings = HttpSettings(max_connections_per_caller=20_000, max_connections=20_000)
    file = UnitFile(Path(os.environ["BENCH_FILE"]))
    server = Server(settings, FileApplication(file), StallObserver())
    server.start([socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=settings.backlog)])
    gc.freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
