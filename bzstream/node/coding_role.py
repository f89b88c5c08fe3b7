"""The coding role: writes the coded files of each version that becomes current, in a thread of a niced process."""

from __future__ import annotations

import asyncio

import structlog

from bzstream.chain.keys import load_key
from bzstream.config import Settings
from bzstream.errors import BzstreamError
from bzstream.model.encode_units import encode_current
from bzstream.model.store import Store
from bzstream.util.files import file_stamp
from bzstream.util.warn_once import WarnOnce

__all__ = ["run"]

PAUSE_S = 0.5
"""How often it looks whether another version is current."""
RETRY_S = 30.0
"""After a failure, such as a full disk."""


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Encode until `stop`. Raises BzstreamError when the wallet cannot be read."""
    log = structlog.get_logger("coding")
    store = Store(settings.store_path())
    signer = await asyncio.to_thread(load_key, settings.node.wallet) if settings.node.wallet else None
    bases = settings.coding.bases
    failures = WarnOnce(log.warning)
    done: object = None
    while not stop.is_set():
        pause = PAUSE_S
        current = store.current()

        def given_up(current: str | None = current) -> bool:
            return stop.is_set() or store.current() != current

        version = _stamp(store, current)
        if current is not None and version != done:
            try:
                # The thread ends at its next chunk; the process waits for it.
                complete = await asyncio.to_thread(encode_current, store, bases=bases, signer=signer, stop=given_up)
                failures.succeeded()
                if complete:
                    done = version
                    log.info("coded", version=current)
            except (BzstreamError, OSError) as error:
                failures.failed("cannot code this version, it is served as it is", reason=str(error))
                pause = RETRY_S
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            pass


def _stamp(store: Store, version: str | None) -> object:
    """What changes when another version becomes current, or this one is signed."""
    return version and (version, file_stamp(store.folder(version) / "snapshot.json"))
