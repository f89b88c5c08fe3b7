"""granian's own protocol, RSGI, whose response_file leaves the file to Rust."""

from __future__ import annotations

import os
import re
from typing import Any

FILE = os.environ.get("BENCH_FILE", os.devnull)
SIZE = os.stat(FILE).st_size
HEALTH = '{"status":"healthy","model_loaded":true,"current_block":12345,"phase":"train"}'


async def app(scope: Any, protocol: Any) -> None:
    if scope.path == "/health":
        protocol.response_str(200, [("content-type", "application/json"), ("content-length", str(len(HEALTH)))], HEALTH)
        return
    match = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", scope.headers.get("range") or "")
    if match is None:
        protocol.response_file(200, [("content-length", str(SIZE))], FILE)
        return
    start, stop = int(match[1]), min(int(match[2]) + 1, SIZE)
    headers = [("content-length", str(stop - start)), ("content-range", f"bytes {start}-{stop - 1}/{SIZE}")]
    protocol.response_file_range(206, headers, FILE, start, stop)
