"""One submission, from a checked file to a score: the same code for the pipeline, for `evaluate FILE` and `--repeat`.

The scorer owns the resident model and the data, and belongs to one thread; only `stage` may be called from another. It
computes the baseline once for each seed and then, for each submission, swaps it in, runs the same windows in the same
batches through the same kernels, and swaps it out. What passes the floor of `pay` is run twice more, with half and with
double its change; what does not costs one run.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bzstream.config import EvaluationSettings
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.reading.specs import TensorLocation
from bzstream.evaluation.records import Evaluation
from bzstream.evaluation.rejection_codes import Failure, Refusal
from bzstream.evaluation.scoring.data import Tokens, load_tokens
from bzstream.evaluation.scoring.losses import choose_windows, mean_loss, score
from bzstream.evaluation.scoring.module import prepare_torch
from bzstream.evaluation.scoring.pay import GAIN_FLOOR, STEPS, lower_bound
from bzstream.evaluation.scoring.resident_model import ResidentModel, Staged

__all__ = ["ScoredSubmission", "Scorer", "versions"]

_STAGES = ("baseline", "sketch", "swap_in", "loss", "steps", "swap_out")
"""What takes the time of a score, in order."""
GAIN_TOKENS = 8192
"""Tokens of a round whose gains are kept, evenly spread over each window: 48 KiB a submission in float16. The rule of
pay was measured with 8,128."""


@dataclass(frozen=True, slots=True)
class ScoredSubmission:
    """A scored submission: the record to keep, the sketch that tells copies, and the gains that pay is made of."""

    evaluation: Evaluation
    sketch: tuple[float, ...]
    gains: NDArray[np.float16] | None
    """[STEPS, windows, tokens], nats; None when the gain of the whole change is not above the floor."""


@dataclass(frozen=True, slots=True)
class _RoundData:
    """What all submissions that are scored with one seed share."""

    seed: str
    windows: tuple[int, ...]
    tokens: NDArray[np.int64]
    tokens_hash: str
    baseline_windows: tuple[float, ...]
    baseline: float
    baseline_tokens: NDArray[np.float32]
    """[windows, window_tokens - 1]: loss of each predicted token."""


class Scorer:
    """A model version on a device, with the data. Raises EvaluationError when they do not fit each other."""

    def __init__(self, baseline: BaselineModel, settings: EvaluationSettings, *, device: str, cache: Path) -> None:
        """The caller closes `baseline`, after the scorer; `cache`: folder for encoded text."""
        prepare_torch()
        self.settings = settings
        self.model = ResidentModel(baseline, device=device, factory=settings.model)
        self._round: _RoundData | None = None
        try:
            self.tokens = _tokens(settings, self.model.vocabulary, cache)
        except BaseException:
            self.model.close()
            raise

    @property
    def version(self) -> str:
        return self.model.baseline.version

    def close(self) -> None:
        self.model.close()

    def stage(self, fd: int, locations: Sequence[TensorLocation], group: int) -> Staged:
        """A checked file's weights, ready for `score`; may run beside it in another thread. Raises Failure."""
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
        times = [time.monotonic()]
        deadline = times[0] + self.settings.score_timeout_s

        def lap() -> None:
            times.append(time.monotonic())

        try:
            this = self._round_data(seed, deadline, cancelled)
            lap()
            sketch = self.model.sketch(staged, seed)
            lap()
            with self.model.swapped_in(staged) as move_to:
                lap()
                losses, tokens = self._losses(this.tokens, deadline, cancelled)
                lap()
                gains = _gains(this.baseline_tokens, tokens)
                steps: NDArray[np.float16] | None = None
                if lower_bound(gains.mean(axis=1, dtype=np.float64)) > GAIN_FLOOR:
                    measured = {1.0: gains}
                    for step in STEPS:
                        if step not in measured:
                            move_to(step)
                            _, tokens = self._losses(this.tokens, deadline, cancelled)
                            measured[step] = _gains(this.baseline_tokens, tokens)
                    steps = np.stack([measured[step] for step in STEPS])
                lap()
            lap()
        finally:
            staged.close()
        loss = mean_loss(losses, self.settings.window_tokens) if len(losses) == len(this.windows) else None
        if loss is None:
            raise Refusal("non_finite_loss", "the loss is not finite on some windows of the evaluation data")
        baseline = self.model.baseline
        evaluation = Evaluation(
            submission_id=submission_id,
            round=round_,
            group=staged.group,
            model_version=self.version,
            model_hash=baseline.full.content_hash,
            slice_hash=baseline.group(staged.group).content_hash,
            file_hash=file_hash,
            weights=staged.weights,
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
            seconds=dict(zip(_STAGES, (b - a for a, b in pairwise(times)), strict=True))
            | {"total": times[-1] - (times[0] if began is None else began)},
        )
        return ScoredSubmission(evaluation, sketch, steps)

    def _losses(
        self, tokens: NDArray[np.int64], deadline: float, cancelled: Callable[[], bool]
    ) -> tuple[list[float], NDArray[np.float32]]:
        """(summed loss of each window, loss of each predicted token: NaN in windows that were not reached)"""
        each = np.full((len(tokens), tokens.shape[1] - 1), np.nan, np.float32)
        found = self.model.window_losses(
            tokens, batch=self.settings.batch, tokens_out=each, deadline=deadline, cancelled=cancelled
        )
        return found, each

    def _round_data(self, seed: str, deadline: float, cancelled: Callable[[], bool]) -> _RoundData:
        if self._round is None or self._round.seed != seed:
            self._round = None
            settings = self.settings
            starts = choose_windows(seed, len(self.tokens), count=settings.windows, length=settings.window_tokens)
            tokens = self.tokens.windows(starts, settings.window_tokens)
            losses, each = self._losses(tokens, deadline, cancelled)
            baseline = mean_loss(losses, settings.window_tokens) if len(losses) == len(starts) else None
            if baseline is None:
                raise Failure("baseline_not_finite", f"version {self.version} itself has a loss that is not finite")
            digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
            self._round = _RoundData(seed, tuple(starts), tokens, digest, tuple(losses), baseline, each)
        return self._round


def _gains(baseline: NDArray[np.float32], losses: NDArray[np.float32]) -> NDArray[np.float16]:
    """[windows, tokens] of both -> [windows, at most GAIN_TOKENS / windows]: what is gained at tokens evenly spread."""
    windows, tokens = baseline.shape
    kept = np.linspace(0, tokens - 1, max(1, min(tokens, GAIN_TOKENS // windows))).round().astype(np.intp)
    # What float16 cannot hold becomes infinite, and what is not finite earns nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        return (baseline[:, kept] - losses[:, kept]).astype(np.float16)


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
    found = {"bzstream": metadata.version("bzstream"), "python": platform.python_version()}
    found |= {"torch": str(torch.__version__), "numpy": np.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):  # a model of the validator's own needs none
        found["transformers"] = metadata.version("transformers")
    return found
