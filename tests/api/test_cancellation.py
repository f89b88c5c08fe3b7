"""Nothing leaks, whichever await a request is cut off at: every one is tried, until the request completes before it.

Handlers are cut off at each suspension of their task, requests and TLS handshakes after each of their bytes (in a short
run after a good many). They end by a reset, by a close, and by a server that closes. What was promised holds all along:
a POST whose body has come is written down, once; a GET is cancelled.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from bzstream.api.app import Api
from bzstream.api.state import WorkerState
from bzstream.http import Headers, HttpError, Request, Response
from tests.api.cutting import AUTH, ENDINGS, Cut, Peer, Rig, begin, open_state, until
from tests.api.desk import Desk, new_key, signed
from tests.nodes import TOKEN
from tests.seeds import seeds

Run = Callable[[Coroutine[Any, Any, None]], None]


def submission() -> tuple[str, bytes]:
    """A new hotkey and the body of its submission."""
    key = new_key()
    return key.ss58_address, json.dumps(signed(key, Desk.NOW)).encode()


def post(body: bytes) -> bytes:
    return f"POST /submit HTTP/1.1\r\n{AUTH}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Book:
    """The ledger, looked at from outside."""

    def __init__(self, place: Path) -> None:
        self._connection = sqlite3.connect(place / "ledger.sqlite")

    def count(self, hotkey: str) -> int:
        (found,) = self._connection.execute("SELECT count(*) FROM submissions WHERE hotkey = ?", (hotkey,)).fetchone()
        assert isinstance(found, int)
        return found

    def close(self) -> None:
        self._connection.close()


@asynccontextmanager
async def opened(store: Path, place: Path) -> AsyncIterator[tuple[WorkerState, Book, str]]:
    """A worker's state, with everything open that is opened when first wanted, the ledger, and a submission in it."""
    async with open_state(store, place) as state:
        async with Rig(state) as rig:
            peer = rig.connect()
            await peer.send(post(submission()[1]))
            await answered(peer, b"202")
            submission_id = json.loads(peer.received.split(b"\r\n\r\n")[1])["submission_id"]
            peer.close()
        book = Book(place)
        book.count("")
        yield state, book, submission_id
        book.close()


async def answered(peer: Peer, status: bytes) -> None:
    """The peer has received a whole short answer of this status."""
    await until(
        lambda: (peer.take() or True) and peer.received.count(b"\r\n\r\n") > 0 and whole(peer.received), "answer"
    )
    assert peer.received.startswith(b"HTTP/1.1 " + status), peer.received


def whole(answer: bytes | bytearray) -> bool:
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
    return len(body) >= int(length[16:])


@pytest.mark.parametrize(
    ("run", "tls"),
    [pytest.param(asyncio.run, False, id="asyncio-plain"), pytest.param(uvloop.run, True, id="uvloop-tls")],
)
def test_every_await_of_every_handler(run: Run, tls: bool, small_store: Path, tmp_path: Path) -> None:
    async def cut_off(rig: Rig, how: str, at: int, data: bytes) -> Cut:
        peer = rig.connect()
        rig.observer.requests.clear()
        async with begin(at, rig.ending(peer, how)) as cut:
            await peer.send(data)
            await until(lambda: cut.reached or bool(rig.observer.requests), "the cut or the answer")
        await rig.idle()
        peer.close()
        return cut

    async def every(state: WorkerState, how: str, make: Callable[[], bytes], check: Callable[[Cut, int], None]) -> int:
        """The number of awaits, each of which was tried."""
        async with AsyncExitStack() as stack:
            for at in itertools.count():
                if not at or how == "server":
                    rig = await stack.enter_async_context(Rig(state, tls=tmp_path if tls else None))
                cut = await cut_off(rig, how, at, make())
                (record,) = rig.observer.requests
                check(cut, record.status)
                if not cut.reached:
                    return at - 1
        raise AssertionError

    async def main() -> None:
        async with opened(small_store, tmp_path) as (state, book, submission_id):
            hotkey = ""

            def submit() -> bytes:
                nonlocal hotkey
                hotkey, body = submission()
                return post(body)

            def written(cut: Cut, status: int) -> None:
                assert not cut.cancelled, "what was begun ends"
                assert book.count(hotkey) == 1
                assert cut.reached or status == 202

            def cancelled(cut: Cut, status: int) -> None:
                if not cut.reached:
                    assert status in (200, 404)
                elif how != "close":  # whoever closes may have closed one side only, and is answered
                    assert (cut.cancelled, status) == (True, 499)

            for how in ENDINGS:
                assert await every(state, how, submit, written) >= 2, "the lane of signatures and the ledger, at least"
                for target in (f"/submissions/{submission_id}", "/scores", "/scores?round=12520"):
                    get = f"GET {target} HTTP/1.1\r\n{AUTH}\r\n".encode()
                    assert await every(state, how, lambda data=get: data, cancelled) >= 1  # type: ignore[misc]

    run(main())


def test_a_cancelled_handler_holds_up_nobody(small_store: Path, tmp_path: Path) -> None:
    """A server that has waited for `drain_s` cancels POSTs too. Others stand before and behind this one in the lane."""

    async def trial(api: Api, book: Book, at: int) -> bool:
        """Whether the one in the middle came to await number `at`."""
        posts = [submission() for _ in range(3)]
        hotkey, body = posts[1]
        before = asyncio.create_task(handle(api, posts[0][1]))

        async def cancel() -> None:
            victim.cancel()

        async with begin(at, cancel) as cut:
            victim = asyncio.create_task(handle(api, body))
            behind = asyncio.create_task(handle(api, posts[2][1]))
            assert (await before, await behind) == (202, 202)
            await asyncio.wait([victim])
        assert victim.cancelled() or victim.result() == 202
        assert victim.cancelled() == cut.cancelled
        # Cancelled while the ledger writes, it is in, and else it is not: then the same body is welcome.
        assert await handle(api, submission()[1]) == 202, "written after all that was begun before"
        held = book.count(hotkey)
        assert held == 1 or victim.cancelled()
        assert await handle(api, body) == (409 if held else 202)
        assert [book.count(name) for name, _ in posts] == [1, 1, 1]
        return cut.reached

    async def main() -> None:
        async with opened(small_store, tmp_path) as (state, book, _), Rig(state) as rig:
            awaits = 0
            while await trial(rig.api, book, awaits):
                awaits += 1
            assert awaits > 3, "before it begins, the lane, a turn in it, the ledger"

    uvloop.run(main())


async def handle(api: Api, body: bytes) -> int:
    """The status of the answer to a submission, the core left out."""
    sent = Headers([("authorization", f"Bearer {TOKEN}")])
    request = Request("POST", "/submit", "/submit", "", sent, "127.0.0.1", "127.0.0.1", body=body)
    endpoint = api.admit(request)
    answer = endpoint.handle(endpoint.check(request))
    assert isinstance(answer, Awaitable)
    try:
        result = await answer
    except HttpError as refused:
        return refused.status
    assert isinstance(result, Response)
    return result.status


REFUSED = f"POST /submit HTTP/1.1\r\n{AUTH}Content-Length: 99999\r\n\r\n".encode() + b"x" * 100
"""Answered before its body has come: what follows is discarded for a while."""


@pytest.mark.parametrize("kind", ["whole", "chunked", "expecting", "refused"])
def test_every_byte_of_a_request(kind: str, small_store: Path, tmp_path: Path) -> None:
    hotkey, body = submission()
    data = {
        "whole": post(body),
        "chunked": f"POST /submit HTTP/1.1\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode()
        + body
        + b"\r\n0\r\n\r\n",
        "expecting": post(body).replace(b"Host: x\r\n", b"Host: x\r\nExpect: 100-continue\r\n"),
        "refused": REFUSED,
    }[kind]

    async def main() -> None:
        async with opened(small_store, tmp_path) as (state, book, _):
            async with Rig(state) as rig:
                for length, how in itertools.product(range(0, len(data), seeds(5, 1)), ("reset", "close")):
                    await cut_bytes(rig, rig.connect(), [data[:length]], how)
            for length in range(0, len(data), seeds(96, 24)):
                async with Rig(state) as rig:
                    await cut_bytes(rig, rig.connect(), [data[:length]], "server")
            assert book.count(hotkey) == 0, "none was whole"
            async with Rig(state) as rig:
                await cut_bytes(rig, rig.connect(), [data], "close")
                await rig.idle()
            assert book.count(hotkey) == (kind != "refused")

    uvloop.run(main())


async def cut_bytes(rig: Rig, peer: Peer, pieces: list[bytes], how: str) -> None:
    """Send the pieces, waiting after each until the server has taken it, then end it."""
    for piece in pieces:
        peer.push(piece)
        await rig.heard(peer)
    await rig.ending(peer, how)()
    peer.close()
    await rig.assert_clean()


def test_every_byte_of_a_handshake(small_store: Path, tmp_path: Path) -> None:
    get = f"GET /model HTTP/1.1\r\n{AUTH}\r\n".encode()

    async def hello(rig: Rig, length: int) -> tuple[Peer, list[bytes], bool]:
        """A client about to send the beginning of its first flight; whether that is all of it."""
        peer = rig.connect()
        flight = peer.hello()
        return peer, [flight[:length]], length >= len(flight)

    async def finished(rig: Rig, length: int) -> tuple[Peer, list[bytes], bool]:
        """The same of its last flight and a request behind it."""
        peer = rig.connect()
        last = await peer.handshake()
        return peer, [(last + peer.sealed(get))[:length]], length >= len(last) + len(get)

    async def main() -> None:
        async with opened(small_store, tmp_path) as (state, _, _):
            for flight in (hello, finished):
                for how, step in (("reset", seeds(31, 7)), ("close", seeds(37, 13)), ("server", seeds(200, 60))):
                    async with AsyncExitStack() as stack:
                        for length in itertools.count(0, step):
                            if not length or how == "server":
                                rig = await stack.enter_async_context(Rig(state, tls=tmp_path))
                            peer, pieces, over = await flight(rig, length)
                            await cut_bytes(rig, peer, pieces, how)
                            if over:
                                break

    uvloop.run(main())
