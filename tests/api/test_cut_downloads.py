"""Nothing leaks, whichever turn of the sender a download is cut off at: every one is tried.

A download waits for the disk (here no page is resident until it was read), for room in its socket (the buffers are
small) and for its turn (turns are short). It is cut off before each turn, with a thread about to send, and after each,
in whatever state that left it; by a reset, by a close, and by a server that closes. What has come by then is the
beginning of the truth.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from bzstream.api.state import WorkerState
from bzstream.http.send.fair_queue import FairQueue
from bzstream.http.send.read_ahead import ReadAhead
from bzstream.http.send.sender import MAX_DEDICATED, Sender
from bzstream.http.send.transfer import Transfer, TransferState
from bzstream.model import publish
from bzstream.payload import UnitFile
from tests.api.cutting import AUTH, ENDINGS, Rig, open_state, until
from tests.model import build

HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
GET = f"GET /model/partial HTTP/1.1\r\n{AUTH}X-Expert-Group: 0\r\nX-Hotkey: {HOTKEY}\r\n\r\n".encode()
QUANTUM = 24 * 1024
WINDOW = 48 * 1024
Ending = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with slices of 200 KB: five windows."""
    folder = tmp_path_factory.mktemp("slices")
    specs = build.fused(layers=1, hidden=128, inner=256)
    build.write_checkpoint(folder / "model", specs, build.contents(specs))
    publish(folder / "model", folder / "store", block=1, version="v", groups=4)
    return folder / "store"


class NothingCached:
    """A probe to which every page is on the disk until it was read."""

    def is_cached(self, file: UnitFile, offset: int, length: int) -> bool:
        return False


class Scissors:
    """Counts the moments of a download and begins an ending at the chosen one, asked from the sender's threads.

    They ask its clock when a turn begins, and its queue when one has ended.
    """

    def __init__(self) -> None:
        self.came_from: set[TransferState] = set()
        """All states that transfers were in before they were ready; BUSY: they were ready again at once."""
        self.reached = False
        self._lock = threading.Lock()

    def clock(self) -> float:
        # The thread waits until the ending has had its first step, which so finds the transfer busy.
        if self._count():
            assert self._begun.wait(10)
        return time.monotonic()

    def make_queue(self, quantum: int) -> FairQueue[Transfer]:
        scissors = self

        class CountingQueue(FairQueue[Transfer]):
            def add(self, item: Transfer) -> None:
                scissors.came_from.add(item.state)
                super().add(item)

            def charge(self, item: Transfer, sent: int) -> None:
                super().charge(item, sent)
                scissors._count()  # the sender's lock is held: no waiting here

        return CountingQueue(quantum)

    def make_sender(self, *arguments: Any, alone: bool) -> Sender:
        return Sender(
            *arguments,
            quantum=QUANTUM,
            max_dedicated=MAX_DEDICATED if alone else 0,
            dedicated_bytes=QUANTUM,
            clock=self.clock,
            queue=self.make_queue,
            probe=lambda _: NothingCached(),
            read_ahead=partial(ReadAhead, window=WINDOW),
        )

    def open(self, at: int, ending: Ending) -> None:
        self._left, self._ending = at, ending
        self._loop, self._begun = asyncio.get_running_loop(), threading.Event()
        self.reached = False

    async def done(self, rig: Rig) -> bool:
        """Whether the moment came, after all that it began has been done; to be called when it or the end has come."""
        if not self.reached:
            await until(lambda: not rig.server.downloads, "the end of the last turn")
            with self._lock:
                came = self._left < 0
            await until(lambda: self.reached or not came, "the beginning of the ending")
        if self.reached:
            await self._task
        return self.reached

    def _count(self) -> bool:
        with self._lock:
            self._left -= 1
            now = self._left == -1
        if now:
            self._loop.call_soon_threadsafe(self._begin)
        return now

    def _begin(self) -> None:
        self.reached = True
        self._task = self._loop.create_task(self._ending())
        self._loop.call_soon(self._begun.set)


@pytest.mark.parametrize("alone", [False, True], ids=["by turns", "alone"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_every_turn_of_a_download(tls: bool, alone: bool, slices: Path, tmp_path: Path) -> None:
    scissors = Scissors()

    async def cut_off(rig: Rig, truth: bytes, how: str, at: int) -> None:
        rig.observer.requests.clear()
        peer = rig.connect()
        scissors.open(at, rig.ending(peer, how))
        await peer.send(GET)
        await until(lambda: scissors.reached or (peer.take() and peer.body() == truth), "the cut or the whole")
        if await scissors.done(rig) and how == "server":
            await until(lambda: peer.take() and peer.ended, "the connection is closed")
            assert truth.startswith(peer.body())
        peer.close()
        await rig.assert_clean()
        (record,) = rig.observer.requests
        assert record.status == 200
        assert record.sent <= record.length == len(truth)
        assert scissors.reached or record.complete

    async def every(state: WorkerState, how: str) -> int:
        """The number of moments, each of which was tried."""
        snapshot = state.snapshots.current
        assert snapshot is not None
        truth = snapshot.units["partial/0"].enveloped.read()
        async with AsyncExitStack() as stack:
            for at in itertools.count():
                if not at or how == "server":
                    make_sender = partial(scissors.make_sender, alone=alone)
                    rig = await stack.enter_async_context(
                        Rig(state, tls=tmp_path if tls else None, make_sender=make_sender)
                    )
                await cut_off(rig, truth, how, at)
                if not scissors.reached:
                    return at
        raise AssertionError

    async def main() -> None:
        async with open_state(slices, tmp_path) as state:
            for how in ENDINGS:
                assert await every(state, how) > (10 if alone else 20)

    uvloop.run(main())
    # A transfer that has a thread to itself waits in it, and is ready or blocked again only by chance.
    assert scissors.came_from >= {TransferState.COLD}
    assert alone or scissors.came_from >= {TransferState.BUSY, TransferState.BLOCKED}
