"""A toy model, trained once for all tests: published, with one honest improvement of group 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bzstream.config import EvaluationSettings
from bzstream.demo.toy_model import corpus, improve, train_toy
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.reading.sandbox import Reader
from bzstream.evaluation.reading.specs import TensorSpec
from bzstream.evaluation.scoring.scorer import Scorer
from bzstream.model import open_snapshot, publish

GROUPS = 4
BLOCK, VERSION = 12345, "step_1000"
SEED = "5e" * 32
SCORING = EvaluationSettings(windows=8, window_tokens=64, batch=4, poll_s=0.02, lease_s=8.0, score_timeout_s=60.0)
"""512 tokens: enough to tell a trained group from its baseline, in 0.1 s."""


@dataclass(frozen=True)
class Toy:
    """Where everything lies."""

    checkpoint: Path
    store: Path
    data: Path
    improved: Path
    """An honest submission for group 1."""

    @property
    def settings(self) -> EvaluationSettings:
        import msgspec

        return msgspec.structs.replace(SCORING, data=str(self.data))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The toy's products are too small to split, and threads that wait for each other suffer on shared cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    place = tmp_path_factory.mktemp("toy")
    toy = Toy(place / "checkpoint", place / "store", place / "tokens.npy", place / "improved.safetensors")
    train_toy(toy.checkpoint, steps=50)
    publish(toy.checkpoint, toy.store, block=BLOCK, version=VERSION, groups=GROUPS)
    np.save(toy.data, np.frombuffer(corpus(), np.uint8))
    improve(toy.checkpoint, toy.store / "current" / "group-1.safetensors", toy.improved, steps=12)
    return toy


@pytest.fixture(scope="session")
def published(toy: Toy) -> Iterator[BaselineModel]:
    snapshot = open_snapshot(toy.store / "snapshots" / VERSION)
    opened = BaselineModel(snapshot)
    yield opened
    opened.close()
    snapshot.release()


@pytest.fixture(scope="session")
def scorer(toy: Toy, published: BaselineModel) -> Iterator[Scorer]:
    """One resident model for every test that leaves it as it was, which is the point of it."""
    found = Scorer(published, toy.settings, device="cpu", cache=toy.store / "spool")
    yield found
    assert found.model.differing() == []
    found.close()


@pytest.fixture(scope="session")
def reader() -> Iterator[Reader]:
    opened = Reader(memory=192 << 20, timeout=30)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def specs(published: BaselineModel) -> tuple[TensorSpec, ...]:
    return published.group(1).specs


@pytest.fixture(scope="session")
def bound(published: BaselineModel) -> int:
    """Magnitudes of 2**bound or more are refused for group 1."""
    return published.value_bound(1)


@pytest.fixture(scope="session")
def honest_tensors(toy: Toy, published: BaselineModel) -> dict[str, np.ndarray]:
    """The honest submission as float32 arrays, in published order."""
    from safetensors import safe_open

    with safe_open(toy.improved, "pt") as file:
        return {w.name: file.get_tensor(w.name).float().numpy() for w in published.group(1).specs}


@pytest.fixture(scope="session")
def baseline_tensors(toy: Toy, published: BaselineModel) -> dict[str, np.ndarray]:
    """Group 1 as published, as float32 arrays."""
    from safetensors import safe_open

    with safe_open(toy.store / "current" / "group-1.safetensors", "pt") as file:
        return {w.name: file.get_tensor(w.name).float().numpy() for w in published.group(1).specs}
