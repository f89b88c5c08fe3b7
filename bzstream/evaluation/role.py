"""The evaluator role: one process a GPU, which the supervisor starts, and starts again."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from bzstream.config import Settings
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.fetching import SafeConnector
from bzstream.evaluation.pipeline import Pipeline
from bzstream.evaluation.reading.sandbox import Reader
from bzstream.evaluation.records import Records
from bzstream.evaluation.scoring.data import require_data
from bzstream.evaluation.spool import Spool
from bzstream.evaluation.stages import StageRunner
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import Ledger, LedgerError

if TYPE_CHECKING:
    from bzstream.evaluation.scoring.scorer import Scorer

__all__ = ["run", "spool_folder"]

LIFE_S = 5.0
"""Between two signs of life; a tenth of what /health takes for silence."""


async def run(settings: Settings, store: Path, *, device: str | None, stop: asyncio.Event) -> None:
    """Evaluate submissions until `stop` is set.

    `device`: a torch device; None: the setting's, else the CPU. Raises EvaluationError when there is no data, or the
    model cannot be built, or the device failed; LedgerError when the ledger cannot be opened.
    """
    evaluation = settings.evaluation
    require_data(evaluation.data)
    device = device or evaluation.device or "cpu"
    # A folder for each device: evaluators of one machine do not share a spool, and each finds its own after a restart.
    folder = spool_folder(settings, store) / device.replace(":", "-")
    spool = await asyncio.to_thread(partial(Spool, folder, evaluation.spool_bytes))
    ledger = await asyncio.to_thread(partial(Ledger.open, settings.ledger_location()))
    try:
        snapshots = SnapshotCache(store, warn=partial(structlog.get_logger("evaluator").warning, "snapshot"))
        reader = Reader(memory=evaluation.read_memory, timeout=evaluation.read_timeout_s)
        name = f"{socket.gethostname()}/{os.getpid()}"
        alive = asyncio.create_task(_show_life(ledger, name))
        try:
            await Pipeline(
                settings,
                ledger=ledger,
                records=Records(ledger),
                snapshots=snapshots,
                runner=StageRunner(evaluation, spool, SafeConnector(settings.submit), reader),
                make_scorer=partial(_make_scorer, settings, store, device),
                name=name,
            ).run(stop)
        finally:
            alive.cancel()
            reader.close()
            spool.close()
            snapshots.close()
    finally:
        ledger.close()


def spool_folder(settings: Settings, store: Path) -> Path:
    """Where checkpoints are fetched to."""
    return Path(settings.evaluation.spool) if settings.evaluation.spool else store / "spool"


async def _show_life(ledger: Ledger, name: str) -> None:
    """Tell the ledger every few seconds that this evaluator lives: /health says when none does."""
    while True:
        try:
            await asyncio.to_thread(ledger.heartbeat, name)
        except LedgerError:  # the pipeline reports what is wrong with the ledger
            pass
        await asyncio.sleep(LIFE_S)


def _make_scorer(settings: Settings, store: Path, device: str, baseline: BaselineModel) -> Scorer:
    # torch and transformers take seconds to import: only here, in the model's thread, when there is work.
    from bzstream.evaluation.scoring.scorer import Scorer

    cache = spool_folder(settings, store) / "tokens"
    return Scorer(baseline, settings.evaluation, device=device, cache=cache)
