"""aiohttp's FileResponse, which sends by sendfile on asyncio's own loop: `python -m bench.peers.aiohttp_app PORT`."""

from __future__ import annotations

import os
import sys

from aiohttp import web


async def file(request: web.Request) -> web.FileResponse:
    return web.FileResponse(os.environ["BENCH_FILE"])


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "healthy", "model_loaded": True, "current_block": 12345, "phase": "train"})


if __name__ == "__main__":
    application = web.Application()
    application.router.add_get("/file", file)
    application.router.add_get("/health", health)
    web.run_app(application, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
