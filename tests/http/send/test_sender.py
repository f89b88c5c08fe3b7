"""The sender's contract: which thread may do what, and when there are threads at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from bzstream.http.send.sender import Sender
from bzstream.http.send.transfer import Transfer, TransferState
from bzstream.payload import Payload
from tests.http.support import AUTH, Running
from tests.http.transport import MemoryTransport

Serve = Callable[..., Running]


class Owner:
    """Notes how its transfer ends, and on which thread."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.thread: int | None = None
        self.error: Exception | None = None

    def transfer_done(self) -> None:
        self.thread = threading.get_ident()
        self.ended.set()

    def transfer_failed(self, error: Exception) -> None:
        self.error = error
        self.transfer_done()


class Noting(MemoryTransport):
    """A transport that notes the threads that send, and raises when it is to."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__([], eof=False)
        self.threads: set[int] = set()
        self.waited: set[bool] = set()
        self.error = error

    def wait_for_room(self, wait: bool) -> None:
        self.waited.add(wait)

    def send(self, data: bytes | memoryview, more: bool) -> int:
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        return super().send(data, more)


def transfer(owner: Owner, transport: MemoryTransport) -> Transfer:
    return Transfer(owner, transport, -1, "caller", b"lead", Payload((b"body",)), 0.0)


@pytest.mark.parametrize("max_dedicated", [0, 8])
def test_bytes_leave_on_a_sending_thread_and_the_owner_hears_on_the_loop(max_dedicated: int) -> None:
    async def main() -> None:
        sender = Sender(asyncio.get_running_loop(), lambda error: None, max_dedicated=max_dedicated)
        owner, transport = Owner(), Noting()
        sender.begin(transfer(owner, transport))
        async with asyncio.timeout(10):
            await owner.ended.wait()
        assert transport.sent == b"leadbody"
        assert owner.thread == threading.get_ident()
        assert transport.threads
        assert threading.get_ident() not in transport.threads
        assert transport.waited == {max_dedicated > 0}, "a thread of its own waits for the reader"
        assert not sender.active
        await sender.close()

    asyncio.run(main())


def test_what_goes_wrong_is_told_to_the_owner() -> None:
    async def main() -> None:
        sender = Sender(asyncio.get_running_loop(), lambda error: None)
        owner, error = Owner(), OSError("gone")
        sender.begin(transfer(owner, Noting(error)))
        async with asyncio.timeout(10):
            await owner.ended.wait()
        assert owner.error is error
        await sender.close()

    asyncio.run(main())


def test_other_threads_may_neither_begin_nor_drop() -> None:
    async def main() -> None:
        sender = Sender(asyncio.get_running_loop(), lambda error: None)
        one = transfer(Owner(), MemoryTransport([], eof=False))
        with pytest.raises(AssertionError):
            await asyncio.to_thread(sender.begin, one)
        with pytest.raises(AssertionError):
            await asyncio.to_thread(sender.drop, one, lambda: None)
        await sender.close()

    asyncio.run(main())


def test_files_are_not_given_up_while_a_thread_sends_from_them() -> None:
    async def main() -> None:
        one = transfer(Owner(), MemoryTransport([], eof=False))
        one.state = TransferState.BUSY
        with pytest.raises(AssertionError, match="sending"):
            one.close()

    asyncio.run(main())


def sending_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("send-")}


def test_threads_start_with_the_first_long_response(serve: Serve) -> None:
    before = sending_threads()
    server = serve()
    assert server.ask("GET /health HTTP/1.1\r\nHost: x\r\n\r\n").status == 200
    assert sending_threads() == before, "/metrics and the like need none"
    assert server.ask(f"GET /file HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n").body == server.application.content
    assert sending_threads() > before
