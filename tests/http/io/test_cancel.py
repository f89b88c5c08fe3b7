"""Clients that go away at the worst moments."""

from __future__ import annotations

import asyncio
import gc
import select
import warnings
from pathlib import Path

import pytest
import uvloop

from bzstream.config import HttpSettings
from bzstream.http import Server
from bzstream.http.io.connection import ConnectionState
from bzstream.payload import UnitFile
from tests.http.support import AUTH, Recorder, TinyApplication
from tests.http.transport import MemoryTransport


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_client_that_goes_before_its_handler_began(unit_path: Path, run: object) -> None:
    """The handler's coroutine exists, its task has not had its first step: nothing is left that was never awaited."""

    async def main(application: TinyApplication, observer: Recorder) -> None:
        server = Server(HttpSettings(), application, observer)
        server.start([])
        transport = MemoryTransport([f"GET /wait HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n".encode()], eof=False)
        connection = server.attach(transport, -1, "127.0.0.1")
        connection.on_events(select.EPOLLIN)
        assert connection.state is ConnectionState.HANDLING
        connection.close()
        await server.close()
        assert not application.started.is_set()

    file, observer = UnitFile(unit_path), Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert callable(run)
        run(main(TinyApplication(file), observer))
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert observer.errors == []
    file.release()
