"""A ledger, a chain state and the whole evaluator, for tests that submit files and look at what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from bzstream.chain.clock import Cycle
from bzstream.chain.simulated import block_hash
from bzstream.chain.state import ChainState
from bzstream.config import LedgerSettings, Settings, StoreSettings, SubmitSettings
from bzstream.evaluation import role
from bzstream.evaluation.records import Records
from bzstream.submissions.ledger import Ledger
from bzstream.submissions.states import FINAL
from bzstream.submissions.types import Admitted, Candidate, Submission, SubmissionRow
from tests.evaluation.conftest import BLOCK, Toy

CYCLE = Cycle()
ROUND = CYCLE.round(BLOCK)
SEED_BLOCK = CYCLE.seed_block(ROUND)


class Field:
    """A ledger with a chain state, and an evaluator that can be started and stopped."""

    def __init__(self, toy: Toy, place: Path, **evaluation: Any) -> None:
        self.where = str(place / "ledger.sqlite")
        spool = {"spool": str(place / "spool")}
        self.settings = Settings(
            store=StoreSettings(path=str(toy.store)),
            ledger=LedgerSettings(url=self.where),
            submit=SubmitSettings(allow_http=True, allow_private_urls=True),
            evaluation=msgspec.structs.replace(toy.settings, **(spool | evaluation)),
        )
        self.toy = toy
        self.ledger = Ledger.open(self.where)
        self.records = Records(self.ledger)
        self._hotkeys = 0

    def close(self) -> None:
        self.ledger.close()

    def at(self, block: int) -> None:
        hashes = {SEED_BLOCK: block_hash(SEED_BLOCK)} if block >= SEED_BLOCK else {}
        self.ledger.write_chain_state(ChainState(block=block, observed_at=time.time(), frozen=True, hashes=hashes))

    def submit(
        self, url: str, *, group: int = 1, hotkey: str | None = None, hash_: str | None = None, block: int = BLOCK
    ) -> str:
        self._hotkeys += 1
        submission = Submission(
            hotkey=hotkey or f"5F{self._hotkeys:046d}",
            expert_group=group,
            checkpoint_url=url,
            block_number=block,
            checkpoint_hash=hash_,
            signature="",
            signed=f"{url}{self._hotkeys}".encode(),
        )
        accepted = self.ledger.accept(Candidate(submission, ROUND, 99))
        assert isinstance(accepted, Admitted)
        return accepted.submission_id

    def find(self, submission_id: str) -> SubmissionRow:
        record = self.ledger.find(submission_id)
        assert record is not None
        return record

    @contextlib.asynccontextmanager
    async def evaluating(self) -> AsyncIterator[asyncio.Task[None]]:
        stop = asyncio.Event()
        task = asyncio.create_task(role.run(self.settings, self.toy.store, device="cpu", stop=stop))
        try:
            yield task
        finally:
            stop.set()
            await task

    async def until(self, done: Callable[[], bool], task: asyncio.Task[None] | None = None) -> None:
        """Wait for it; the limit is pytest's timeout, so that a busy machine makes no difference."""
        while not await asyncio.to_thread(done):
            if task is not None and task.done():
                await task
            await asyncio.sleep(0.02)

    def all_final(self, names: list[str]) -> Callable[[], bool]:
        return lambda: all(self.find(name).status in FINAL for name in names)

    def all_settled(self) -> bool:
        """Whether nothing is left to do in the round."""
        scores = self.ledger.scores(ROUND)
        return scores is not None and scores.unfinished == 0

    def run(self, names: list[str]) -> list[SubmissionRow]:
        """Evaluate until all are final."""

        async def main() -> None:
            async with self.evaluating() as task:
                await self.until(self.all_final(names), task)

        asyncio.run(main())
        return [self.find(name) for name in names]
