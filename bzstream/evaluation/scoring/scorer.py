"""One submission, from a checked file to a score: the same code for the pipeline, for `evaluate FILE` and `--repeat`.

The scorer owns the resident model and the data, and belongs to one thread; only `stage` may be called from another. It
computes the baseline once for each seed and then, for each submission, puts it on, runs the same windows in the same
batches through the same kernels, and takes it off.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bzstream.config import EvaluationSettings
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.reading.ptfile import TensorLocation
from bzstream.evaluation.records import Evaluation
from bzstream.evaluation.rejection_codes import Failure, Refusal
from bzstream.evaluation.scoring.data import Tokens, load_tokens
from bzstream.evaluation.scoring.losses import choose_windows, mean_loss, score
from bzstream.evaluation.scoring.module import prepare_torch
from bzstream.evaluation.scoring.resident_model import ResidentModel, Staged

__all__ = ["ScoredSubmission", "Scorer", "versions"]


@dataclass(frozen=True, slots=True)
class ScoredSubmission:
    """A scored submission: the record to keep, and the sketch that tells copies."""

    evaluation: Evaluation
    sketch: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _RoundData:
    """What all submissions that are judged by one seed share."""

    seed: str
    windows: tuple[int, ...]
    tokens: NDArray[np.int64]
    tokens_hash: str
    baseline_windows: tuple[float, ...]
    baseline: float


class Scorer:
    """A model version on a device, with the data. Raises EvaluationError when they do not fit each other."""

    def __init__(self, published: BaselineModel, settings: EvaluationSettings, *, device: str, cache: Path) -> None:
        """`published` stays the caller's, who closes it after the judge; `cache`: folder for encoded text."""
        prepare_torch()
        self.settings = settings
        self.model = ResidentModel(published, device=device, factory=settings.model)
        self._round: _RoundData | None = None
        try:
            self.tokens = _tokens(settings, self.model.vocabulary, cache)
        except BaseException:
            self.model.close()
            raise

    @property
    def version(self) -> str:
        return self.model.published.version

    def close(self) -> None:
        self.model.close()

    def stage(self, fd: int, locations: Sequence[TensorLocation], group: int) -> Staged:
        """A checked file's weights, ready to be judged; may run beside `judge` in another thread. Raises Failure."""
        return self.model.stage(fd, locations, group)

    def score(
        self,
        staged: Staged,
        seed: str,
        *,
        file_hash: str,
        submission_id: str | None = None,
        round_: int | None = None,
        began: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> ScoredSubmission:
        """Score what is staged and give its buffer back. `seed`: hex digits; `began`: monotonic, for the record.

        Raises Refusal `non_finite`, `non_finite_loss`, Failure, InterruptedError on cancellation. The model is
        the baseline after.
        """
        start = time.monotonic()
        deadline = start + self.settings.score_timeout_s
        try:
            this = self._for(seed, deadline, cancelled)
            ready = time.monotonic()
            sketch = self.model.sketch(staged, seed)
            sketched = time.monotonic()
            with self.model.swapped_in(staged):
                worn = time.monotonic()
                losses = self._losses(this.tokens, deadline, cancelled)
                scored = time.monotonic()
            restored = time.monotonic()
            weights = staged.weights
        finally:
            staged.close()
        loss = mean_loss(losses, self.settings.window_tokens) if len(losses) == len(this.windows) else None
        if loss is None:
            raise Refusal("non_finite_loss", "the loss is not finite on some windows of the evaluation data")
        published = self.model.published
        evaluation = Evaluation(
            submission_id=submission_id,
            round=round_,
            group=staged.group,
            model_version=self.version,
            model_hash=published.full.content_hash,
            slice_hash=published.group(staged.group).content_hash,
            file_hash=file_hash,
            weights=weights,
            seed=seed,
            data=self.tokens.name,
            tokens_hash=this.tokens_hash,
            windows=this.windows,
            window_tokens=self.settings.window_tokens,
            batch=self.settings.batch,
            baseline_windows=this.baseline_windows,
            loss_windows=tuple(losses),
            baseline_loss=this.baseline,
            loss=loss,
            score=score(this.baseline, loss),
            device=_device_name(self.model.device),
            threads=torch.get_num_threads(),
            versions=versions(),
            seconds={
                "baseline": ready - start,
                "sketch": sketched - ready,
                "swap_in": worn - sketched,
                "loss": scored - worn,
                "swap_out": restored - scored,
                "total": restored - (start if began is None else began),
            },
        )
        return ScoredSubmission(evaluation, sketch)

    def _losses(self, tokens: NDArray[np.int64], deadline: float, cancelled: Callable[[], bool]) -> list[float]:
        batch = self.settings.batch
        return self.model.window_losses(tokens, batch=batch, deadline=deadline, cancelled=cancelled)

    def _for(self, seed: str, deadline: float, cancelled: Callable[[], bool]) -> _RoundData:
        if self._round is None or self._round.seed != seed:
            self._round = None
            settings = self.settings
            starts = choose_windows(seed, len(self.tokens), count=settings.windows, length=settings.window_tokens)
            tokens = self.tokens.windows(starts, settings.window_tokens)
            losses = self._losses(tokens, deadline, cancelled)
            baseline = mean_loss(losses, settings.window_tokens) if len(losses) == len(starts) else None
            if baseline is None:
                raise Failure("baseline_not_finite", f"version {self.version} itself has a loss that is not finite")
            digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
            self._round = _RoundData(seed, tuple(starts), tokens, digest, tuple(losses), baseline)
        return self._round


def _tokens(settings: EvaluationSettings, vocabulary: int, cache: Path) -> Tokens:
    return load_tokens(
        settings.data,
        vocabulary=vocabulary,
        least=settings.windows * settings.window_tokens,
        cache=cache,
        tokenizer=settings.tokenizer,
        most=settings.max_tokens,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """The libraries that a bit-identical repeat needs to be the same."""
    found: dict[str, str] = {"bzstream": metadata.version("bzstream"), "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    found["numpy"] = np.__version__
    try:
        import transformers
    except ImportError:
        return found
    found["transformers"] = str(transformers.__version__)
    return found
