"""The sender: threads that move the bytes of long responses from the page cache to the sockets.

The bytes never enter this process: sendfile moves them, from explicit offsets, so that any number of downloads share
one open file. It is work for the kernel, and sendfile does it without the interpreter's lock; so a few threads do
nothing else, and the event loop keeps to requests. Another thread is worth another core of sending, and no download,
nor a thousand of them, makes a request wait. Whose turn it is, and for how many bytes, `fair_queue.py` decides.

There are two ways to send (`strategies.py`). Usually `SHARED_THREADS` threads take turns of one quantum. While there
are few transfers, all of one caller or each of another, turns change nothing. Each transfer has a thread to itself
then, which waits in the kernel for the reader: at 8 downloads that is worth a quarter more bytes a second, and a fifth
of the CPU time. Such a thread first gives its place among the shared ones to another thread, so that a new
transfer is served at once.

Which thread may do what:
- `begin`, `drop`, `close`, `active` and the callbacks to owners: the event loop's thread.
- Methods with `_locked`, the queue, and a transfer's `state`, `flow`, `writable_again` and `dropped`: any thread that
  holds the lock. It is held for microseconds, and nothing that gives the interpreter's lock away is called meanwhile
  (except at a transfer's end): another thread would take that one and wait for this one, again and again.
- A transfer that is BUSY belongs to the thread that took its turn (`transfer.py`). `drop` of such a transfer only marks
  it; the transport is closed, and its descriptor free for reuse, when the thread has let go.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from bzstream.http.send.fair_queue import FairQueue
from bzstream.http.send.page_cache import PageCacheProbe, Probe
from bzstream.http.send.poller import Poller
from bzstream.http.send.read_ahead import ReadAhead
from bzstream.http.send.strategies import DedicatedThread, SharedTurn, Turn
from bzstream.http.send.transfer import BLOCKED, BUSY, COLD, OVER, READY, Transfer
from bzstream.payload import UnitFile

__all__ = ["DEDICATED_BYTES", "MAX_DEDICATED", "QUANTUM", "SHARED_THREADS", "Sender"]

QUANTUM = 4 * 1024 * 1024
"""Bytes that a caller may send in its turn: as many as Linux lets a socket's send queue grow to (tcp_wmem). A quarter
as much was measured to cost a fifth of the speed at 64 and 256 connections."""
SHARED_THREADS = 2
"""Threads that send by turns. Each can keep about a core busy with sendfile; a worker has an event loop beside them."""
MAX_DEDICATED = 8
"""Transfers, at most, that have a thread each. (With 64, /health beside as many downloads waited for 140 ms.)"""
DEDICATED_BYTES = 32 * 1024 * 1024
"""After so many bytes, at the latest, a thread that stays with a transfer sees whether there are still few."""
_TURNS_PER_POLL = 8
"""A busy thread looks for sockets that have room again every so many turns, about once a millisecond."""
_NICE = 5
"""Sending stands back behind requests: on full cores it made /health's p99 2.5 ms of 6.9, beside 256 downloads. (On
Linux a thread has a nice value of its own.)"""


class Sender:
    """The queue and its threads, which start with the first transfer."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[Exception], None],
        *,
        shared_threads: int = SHARED_THREADS,
        quantum: int = QUANTUM,
        max_dedicated: int = MAX_DEDICATED,
        dedicated_bytes: int = DEDICATED_BYTES,
        queue: Callable[[int], FairQueue[Transfer]] = FairQueue,
        probe: Callable[[Mapping[UnitFile, float]], Probe] = PageCacheProbe,
        read_ahead: Callable[[asyncio.AbstractEventLoop], ReadAhead] = ReadAhead,
        poller: Callable[[], Poller] = Poller,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """To be made on the thread of `loop`.

        `on_failure` is called on the loop should a thread end by a bug: then nothing is sent any more. With
        `max_dedicated` 0 all transfers take turns. `queue` makes the queue for a quantum, `probe` a thread's probe from
        what is being read ahead.
        """
        self.active: set[Transfer] = set()
        """Transfers begun and not yet over."""
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._on_failure = on_failure
        self._max_dedicated = max_dedicated
        self._make_probe = probe
        self._read_ahead = read_ahead(loop)
        self._poller = poller()
        self._lock = threading.Lock()
        self._queue = queue(quantum)
        self._idle = 0
        """Threads that wait in the poller."""
        self._closed = False
        self._shared = SharedTurn(quantum, self._poller.arm, clock)
        self._dedicated = DedicatedThread(dedicated_bytes, self._poller.arm, clock, self._may_stay)
        self._shared_places = threading.Semaphore(shared_threads)
        self._threads: list[threading.Thread] = []
        self._thread_count = shared_threads + max_dedicated

    # On the loop.

    def begin(self, transfer: Transfer) -> None:
        """Take a transfer in. Its owner hears of its end, or ends it by `drop`."""
        assert threading.get_ident() == self._loop_thread
        if not self._threads:
            self._start_threads()
        self.active.add(transfer)
        self._enqueue(transfer)

    def drop(self, transfer: Transfer, then: Callable[[], None]) -> None:
        """Forget a transfer in whatever state; call `then` when nobody uses its transport any more, perhaps at once."""
        assert threading.get_ident() == self._loop_thread
        with self._lock:
            if transfer.state is BUSY:
                transfer.dropped = then
                return
            self._retire_locked(transfer)
        self.active.discard(transfer)
        transfer.close()
        then()

    async def close(self) -> None:
        """End the threads. Every transfer must have been dropped."""
        self._closed = True
        self._poller.wake()
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join)
        self._poller.close()
        await self._read_ahead.close()

    def _start_threads(self) -> None:
        self._threads = [
            threading.Thread(target=self._run, name=f"send-{n}", daemon=True) for n in range(self._thread_count)
        ]
        for thread in self._threads:
            thread.start()

    def _enqueue(self, transfer: Transfer) -> None:
        with self._lock:
            self._enqueue_locked(transfer)
            idle = self._idle
        if idle:
            self._poller.wake()

    def _finish(self, transfer: Transfer, error: Exception | None) -> None:
        """A transfer is OVER, says its thread."""
        if transfer not in self.active:
            return  # dropped meanwhile
        self.active.remove(transfer)
        transfer.close()
        if transfer.dropped is not None:
            transfer.dropped()
        elif error is not None:
            transfer.owner.transfer_failed(error)
        else:
            transfer.owner.transfer_done()

    def _fetch(self, transfer: Transfer) -> None:
        """A transfer is COLD, says its thread: have its next bytes read."""
        if transfer.state is COLD and transfer.wanted is not None:
            transfer.mark_cached(self._read_ahead.fetch(*transfer.wanted, lambda: self._fetched(transfer)))

    def _fetched(self, transfer: Transfer) -> None:
        if transfer.state is COLD:
            self._enqueue(transfer)

    # In the threads.

    def _run(self) -> None:
        os.nice(_NICE)
        try:
            self._work(self._make_probe(self._read_ahead.settling))
        except Exception as error:
            # With one thread less, and a queue that may be wrong, everything that waits could wait for ever.
            self._closed = True
            self._poller.wake()
            self._loop.call_soon_threadsafe(self._on_failure, error)

    def _work(self, probe: Probe) -> None:
        while not self._closed:
            with self._shared_places:
                transfer = self._take_shared_turns(probe)
            if transfer is not None:
                turn = self._dedicated.send(transfer, probe)
                with self._lock:
                    self._settle_locked(turn)
                    idle = self._idle
                if idle:
                    self._poller.wake()
        self._poller.wake()  # for the next thread

    def _take_shared_turns(self, probe: Probe) -> Transfer | None:
        """Take turns, one after the other, until there is a transfer to stay with; None: the sender is closed."""
        turns = 0
        done: Turn | None = None
        while not self._closed:
            turns += 1
            look = turns % _TURNS_PER_POLL == 0 and len(self._poller)
            writable = self._poller.poll(wait=False) if look else []
            with self._lock:
                if writable:
                    self._note_locked(writable)
                if done is not None:
                    self._settle_locked(done)
                    done = None
                transfer = self._queue.pop()
                if transfer is not None:
                    transfer.state = BUSY
                    more = self._idle and self._queue
                    uncontended = self._queue.is_uncontended(self._max_dedicated)
                else:
                    self._idle += 1
            if transfer is None:
                writable = self._poller.poll(wait=True)
                with self._lock:
                    self._idle -= 1
                    self._note_locked(writable)
                continue
            if more:
                self._poller.wake()  # there may be work for another thread
            if uncontended:
                return transfer
            done = self._shared.send(transfer, probe)
        if done is not None:
            with self._lock:
                self._settle_locked(done)
        return None

    def _may_stay(self, transfer: Transfer) -> bool:
        """Whether a thread may stay with the transfer that it sends for."""
        with self._lock:
            uncontended = self._queue.is_uncontended(self._max_dedicated)
            return uncontended and transfer.dropped is None and not self._closed

    # Under the lock.

    def _note_locked(self, writable: Iterable[Transfer]) -> None:
        """There is room again for these transfers."""
        for transfer in writable:
            if transfer.state is BLOCKED:
                self._enqueue_locked(transfer)
            elif transfer.state is BUSY:
                transfer.writable_again = True

    def _settle_locked(self, turn: Turn) -> None:
        """A transfer's turn has ended."""
        assert self._lock.locked()
        transfer, state = turn.transfer, turn.state
        self._queue.charge(transfer, turn.charged)
        if transfer.dropped is not None:
            state = OVER
        if state is READY or (state is BLOCKED and transfer.writable_again):
            self._enqueue_locked(transfer)
            return
        transfer.state = state
        if state is COLD:
            self._loop.call_soon_threadsafe(self._fetch, transfer)
        elif state is OVER:
            self._retire_locked(transfer)
            self._loop.call_soon_threadsafe(self._finish, transfer, turn.error)

    def _enqueue_locked(self, transfer: Transfer) -> None:
        assert self._lock.locked()
        self._queue.add(transfer)
        transfer.state = READY
        transfer.writable_again = False

    def _retire_locked(self, transfer: Transfer) -> None:
        assert self._lock.locked()
        transfer.state = OVER
        self._queue.remove(transfer)
        self._poller.forget(transfer)
