"""The stack that the subnet's first public code used: FastAPI's FileResponse, served by uvicorn."""

from __future__ import annotations

import os

from fastapi import FastAPI
from fastapi.responses import FileResponse

app = FastAPI()


@app.get("/file")
async def file() -> FileResponse:
    return FileResponse(os.environ["BENCH_FILE"])


@app.get("/health")
async def health() -> dict[str, object]:
    return {"status": "healthy", "model_loaded": True, "current_block": 12345, "phase": "train"}
