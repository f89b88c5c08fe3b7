"""The peer of `bench.submissions`: FastAPI and SQLite as they are usually put together, doing the same durable work.

The same token, fields, canonical JSON, ed25519 signature and unique (hotkey, block_number), the same WAL with
synchronous=FULL, and one commit for each submission, answered after it. Handlers run in FastAPI's thread pool and take
turns with a lock, which is kinder to SQLite than its own busy wait.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import threading
import uuid
from typing import Annotated

import nacl.exceptions
import nacl.signing
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, Field

from bzstream.chain.ss58 import decode_hotkey

TOKEN = os.environ["BZ_AUTH_TOKEN"]
ROUND = 12520

app = FastAPI()
lock = threading.Lock()
ledger = sqlite3.connect(os.environ["BENCH_LEDGER"], check_same_thread=False, isolation_level=None)
ledger.execute("PRAGMA journal_mode=WAL")
ledger.execute("PRAGMA synchronous=FULL")
ledger.execute(
    "CREATE TABLE IF NOT EXISTS submissions (id TEXT PRIMARY KEY, hotkey TEXT, block_number INTEGER,"
    " expert_group INTEGER, url TEXT, signature TEXT, round INTEGER, status TEXT, received_at REAL,"
    " UNIQUE (hotkey, block_number))"
)
ledger.execute("CREATE INDEX IF NOT EXISTS of_a_round ON submissions (round, hotkey)")


class Submission(BaseModel):
    hotkey: str
    expert_group: Annotated[int, Field(ge=0)]
    checkpoint_url: Annotated[str, Field(max_length=2048)]
    block_number: Annotated[int, Field(ge=0)]
    signature: str


@app.post("/submit", status_code=202)
def submit(body: Submission, authorization: Annotated[str, Header()]) -> dict[str, object]:
    if authorization != f"Bearer {TOKEN}":
        raise HTTPException(401)
    fields = body.model_dump(exclude={"signature"})
    signed = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    try:
        key = nacl.signing.VerifyKey(decode_hotkey(body.hotkey))
        key.verify(signed, base64.urlsafe_b64decode(body.signature))
    except nacl.exceptions.BadSignatureError:
        raise HTTPException(400) from None
    submission_id = str(uuid.uuid4())
    row = (body.hotkey, body.block_number, body.expert_group, body.checkpoint_url, body.signature, ROUND)
    with lock:
        ledger.execute("BEGIN IMMEDIATE")
        try:
            (count,) = ledger.execute(
                "SELECT count(*) FROM submissions WHERE round = ? AND hotkey = ?", (ROUND, body.hotkey)
            ).fetchone()
            if count >= 3:
                raise HTTPException(429)
            ledger.execute(
                "INSERT INTO submissions VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', julianday('now'))",
                (submission_id, *row),
            )
        except sqlite3.IntegrityError:
            ledger.execute("ROLLBACK")
            raise HTTPException(409) from None
        except BaseException:
            ledger.execute("ROLLBACK")
            raise
        ledger.execute("COMMIT")
    return {"status": "accepted", "submission_id": submission_id, "evaluation_eta_blocks": 5}


@app.get("/health")
def health() -> dict[str, object]:
    return {"status": "healthy", "model_loaded": True, "current_block": 12540, "phase": "submit"}
