"""What real files earn: through the evaluator, the ledger and the weights, on the toy model."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bzstream.chain.simulated import block_hash
from bzstream.chain.weights import weights_of
from bzstream.demo.toy_model import improve
from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.reading.layout import check_layout
from bzstream.evaluation.scoring.pay import GAIN_FLOOR, Gains, Pay, settle
from bzstream.evaluation.scoring.scorer import Scorer
from bzstream.evaluation.settlement import settle_group
from bzstream.submissions.types import GroupPay, SubmissionRow
from tests.evaluation.conftest import Toy
from tests.evaluation.field import ROUND, SEED_BLOCK, Field
from tests.evaluation.servers import Server, serving
from tests.seeds import LONG, seeds

RHO = 0.25
WINDOWS = {"windows": 32, "window_tokens": 96, "batch": 8}
Weights = dict[str, torch.Tensor]
Measure = Callable[[str, Weights], Gains | None]

server = pytest.fixture(serving)


def units(
    file: Weights, change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]
) -> Weights:
    """A file with `change` made to the hidden units of each layer's experts: gate and up by rows, down by columns."""
    found = dict(file)
    for name in file:
        if "gate_up_proj" in name:
            other = name.replace("gate_up_proj", "down_proj")
            gate, up, down = change(*(part.float() for part in (*file[name].chunk(2, dim=1), file[other])))
            found |= {name: torch.cat([gate, up], dim=1).bfloat16(), other: down.bfloat16()}
    return found


def permuted(file: Weights, *, experts: int | None = None, hidden: int | None = None) -> Weights:
    """The same function: the first hidden units (None: all) of the first experts (None: all) in reverse order."""

    def change(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Sequence[torch.Tensor]:
        order = torch.arange(gate.shape[1])
        order[:hidden] = order[:hidden].flip(0)
        for expert in range(len(gate))[:experts]:
            gate[expert], up[expert], down[expert] = gate[expert, order], up[expert, order], down[expert][:, order]
        return gate, up, down

    return units({name: tensor.clone() for name, tensor in file.items()}, change)


def scaled(file: Weights, factor: float) -> Weights:
    """The same function: every fourth hidden unit's up times a factor, and its down divided by it."""

    def change(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Sequence[torch.Tensor]:
        up[:, ::4] *= factor
        down[:, :, ::4] /= factor
        return gate, up, down

    return units({name: tensor.clone() for name, tensor in file.items()}, change)


def disguises(base: Weights, a: Weights, b: Weights) -> dict[str, Weights]:
    """Disguised copies of `a`; the first are those of every run."""
    generator = torch.Generator().manual_seed(5)
    change = {name: a[name].float() - base[name].float() for name in a}

    def step(share: float) -> Weights:
        return {name: (base[name].float() + share * change[name]).bfloat16() for name in a}

    def noisy(size: float, file: Weights) -> Weights:
        shakes = {name: torch.randn(file[name].shape, generator=generator) * change[name].std() for name in file}
        return {name: (file[name].float() + size * shakes[name]).bfloat16() for name in file}

    made = {
        "all hidden units permuted": permuted(a),
        "noise of half the change": noisy(0.5, a),
        "0.6 of the change": step(0.6),
        "mixture, 0.6 of one and 0.4 of the other": {
            n: (0.6 * a[n].float() + 0.4 * b[n].float()).bfloat16() for n in a
        },
    }
    if LONG:
        made |= {
            "hidden units of one expert permuted": permuted(a, experts=1),
            "four hidden units permuted": permuted(a, hidden=4),
            "up times 2, down by 2": scaled(a, 2.0),
            "signs of up and down flipped": scaled(a, -1.0),
            "noise of a quarter of the change": noisy(0.25, a),
            "0.5 of the change": step(0.5),
            "1.5 of the change": step(1.5),
            "half mixture": {n: (0.5 * a[n].float() + 0.5 * b[n].float()).bfloat16() for n in a},
            "permuted in one expert, with noise": noisy(0.25, permuted(a, experts=1)),
        }
    return made


@dataclass(frozen=True)
class Settled:
    """A round that the evaluator settled."""

    rows: dict[str, SubmissionRow]
    gains: dict[str, Gains]
    weights: dict[str, float]
    """Name -> share."""


def settled_round(field: Field, server: Server, files: dict[str, Path], order: Sequence[str]) -> Settled:
    """Submit the files in the order, let the evaluator score and settle them."""
    server.files |= {str(i): files[name].read_bytes() for i, name in enumerate(order)}
    field.at(SEED_BLOCK)
    ids = {name: field.submit(server.url(f"files/{i}"), hash_=sha256(files[name])) for i, name in enumerate(order)}

    async def main() -> None:
        async with field.evaluating() as task:
            await field.until(field.all_settled, task)

    asyncio.run(main())
    rows = {name: field.find(submission) for name, submission in ids.items()}
    measured = field.records.gains(ROUND, 1)
    gains = {
        name: Gains(name, row.precedence, tokens)
        for name, row in rows.items()
        if (tokens := measured.get(row.submission_id)) is not None
    }
    scores = field.ledger.scores(ROUND)
    assert scores is not None
    shares = weights_of(scores.results, 64)
    return Settled(rows, gains, {name: shares.get(row.hotkey, 0.0) for name, row in rows.items()})


def sha256(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


@pytest.fixture(scope="module")
def base(toy: Toy) -> Weights:
    tensors: Weights = load_file(toy.store / "current" / "group-1.safetensors")
    return tensors


@pytest.fixture(scope="module")
def files(toy: Toy, base: Weights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original, an independent honest file, and disguised copies of the original."""
    place = tmp_path_factory.mktemp("files")
    slice_file = toy.store / "current" / "group-1.safetensors"
    improve(toy.checkpoint, slice_file, place / "independent.safetensors", steps=12, seed=9)
    made = {"original": toy.improved, "independent": place / "independent.safetensors"}
    for name, weights in disguises(base, load_file(toy.improved), load_file(made["independent"])).items():
        made[name] = place / f"{name}.safetensors"
        save_file({n: tensor.contiguous() for n, tensor in weights.items()}, made[name])
    return made


@pytest.fixture(scope="module")
def settled(toy: Toy, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settled]:
    """The original, the independent one, then all disguises: settled once for the tests of this module."""
    with contextlib.contextmanager(serving)() as server:
        field = Field(toy, tmp_path_factory.mktemp("settled"), **WINDOWS)
        found = settled_round(field, server, files, list(files))
        field.close()
        yield found


def pays(gains: Sequence[Gains]) -> dict[str, Pay]:
    return {pay.submission_id: pay for pay in settle(gains, independent_share=RHO)}


def test_disguised_copies_earn_nothing_together_and_an_honest_miner_is_paid(settled: Settled) -> None:
    rows = settled.rows
    earned = {name: row.pay or 0.0 for name, row in rows.items()}
    alone = pays([settled.gains["original"]])["original"].pay
    other_alone = pays([settled.gains["independent"]])["independent"].pay
    for name, row in rows.items():
        times, share = earned[name] / alone, settled.weights[name]
        print(f"{name}: {row.status} {row.reason}, score {row.score:.4f}, pay {times:.3f}, weight {share:.3f}")
    scored = [row for row in rows.values() if row.reason != "duplicate_weights"]  # what is too near to another
    assert {row.status for row in scored} == {"scored"}
    assert len(scored) >= 6
    assert all(row.score is not None and row.score > 0 for row in scored), "by its score each would be paid"
    assert all(row.pay is not None for row in rows.values())
    assert earned["original"] == pytest.approx(alone)
    assert alone > 3 * GAIN_FLOOR
    assert earned["independent"] >= RHO * other_alone > 0
    clones = sum(pay for name, pay in earned.items() if name not in ("original", "independent"))
    assert clones <= 0.05 * alone
    assert settled.weights["original"] + settled.weights["independent"] > 0.95
    assert sum(settled.weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_copies_earn_nothing_whenever_they_are_sent(settled: Settled, where: str) -> None:
    """1, 5 or 20 copies of one work, with their original: what the original alone would earn, and 5% at most."""
    alone = pays([settled.gains["original"]])["original"].pay
    copies = [gains for name, gains in settled.gains.items() if name not in ("original", "independent")]
    copies = [gains for gains in copies if "mixture" not in gains.submission_id]
    for count in (1, 5, 20):
        times = {"before": -1.0, "between": float(count // 2), "after": float(count)}
        clones = [copies[i % len(copies)]._replace(submission_id=f"{i}", precedence=float(i)) for i in range(count)]
        original = settled.gains["original"]._replace(precedence=times[where] - 0.5 if where != "before" else 99.0)
        found = pays([original, *clones])
        together = sum(pay.pay for pay in found.values())
        print(f"{count} copies {where}: {together / alone:.3f} of the original alone")
        assert together <= 1.05 * alone


@pytest.fixture(scope="module")
def measure(toy: Toy, published: BaselineModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measure]:
    """Gains of weights, measured by the scorer on the windows of `settled`."""
    settings = msgspec.structs.replace(toy.settings, **WINDOWS)
    scorer = Scorer(published, settings, device="cpu", cache=toy.store / "spool")
    path = tmp_path_factory.mktemp("measured") / "file.safetensors"

    def measure(name: str, weights: Weights) -> Gains | None:
        save_file({n: tensor.contiguous() for n, tensor in weights.items()}, path)
        with path.open("rb") as file:
            pread = partial(positional_read, file.fileno())
            found = check_layout(pread, path.stat().st_size, published.group(1).specs)
            staged = scorer.stage(file.fileno(), found, 1)
        gains = scorer.score(staged, block_hash(SEED_BLOCK), file_hash="").gains
        return None if gains is None else Gains(name, 0.0, gains.astype(np.float32))

    yield measure
    assert scorer.model.differing() == [], "measuring the steps left the model changed"
    scorer.close()


def positional_read(fd: int, length: int, offset: int) -> bytes:
    return os.pread(fd, length, offset)


def test_independent_honest_work_is_never_a_copy(settled: Settled, measure: Measure, toy: Toy, tmp_path: Path) -> None:
    honest = [settled.gains["original"], settled.gains["independent"]]
    out = tmp_path / "honest.safetensors"
    for i in range(seeds(1, 19)):
        improve(toy.checkpoint, toy.store / "current" / "group-1.safetensors", out, steps=12, seed=100 + i)
        gains = measure(f"honest{i}", load_file(out))
        assert gains is not None
        honest.append(gains._replace(precedence=1e12 + i))
    found = settle(honest, independent_share=RHO)
    print(f"{len(found)} honest: least unexplained {min(pay.unexplained for pay in found):.3f}")
    print(f"pay against alone: {[round(pay.pay / pay.alone, 2) for pay in found]}")
    for pay in found:
        assert pay.eligible
        assert not pay.copy_of
        assert pay.pay >= RHO * pay.alone > 0


def test_luck_earns_nothing(settled: Settled, measure: Measure, base: Weights, toy: Toy) -> None:
    """Random changes of all sizes, from a tenth to three times an honest one."""
    honest = pays([settled.gains["original"]])["original"].pay
    improved = load_file(toy.improved)
    change = {name: float((improved[name].float() - base[name].float()).std()) for name in base}
    generator = torch.Generator().manual_seed(11)
    tries, total, passed = seeds(6, 1000), 0.0, 0
    for size in np.geomspace(0.1, 3.0, tries):
        shaken = {
            name: (
                tensor.float() + float(size) * change[name] * torch.randn(tensor.shape, generator=generator)
            ).bfloat16()
            for name, tensor in base.items()
        }
        gains = measure("random", shaken)
        passed += gains is not None
        total += 0.0 if gains is None else pays([gains])["random"].pay
    print(
        f"{tries} random changes: {passed} passed the floor, {total / tries / honest:.5f} of an honest pay on average"
    )
    assert total / tries < 0.001 * honest


def test_the_steps_are_what_files_with_that_much_of_the_change_gain(
    settled: Settled, measure: Measure, base: Weights, toy: Toy
) -> None:
    """The half step exactly; the double step of the half is the whole but for bfloat16's rounding of the file."""
    improved = load_file(toy.improved)
    half = {n: (b.float() + 0.5 * (improved[n].float() - b.float())).bfloat16() for n, b in base.items()}
    gains, original = measure("half", half), settled.gains["original"]
    assert gains is not None
    assert np.array_equal(gains.tokens[1], original.tokens[0])
    left = np.linalg.norm(gains.tokens[2] - original.tokens[1]) / np.linalg.norm(original.tokens[1])
    assert left < 0.1


def test_a_restart_settles_with_the_gains_in_the_ledger(
    toy: Toy, files: dict[str, Path], settled: Settled, server: Server, tmp_path: Path
) -> None:
    """Nothing is settled while one submission is worked on elsewhere; the evaluator that comes next settles all."""
    server.files |= {name: files[name].read_bytes() for name in ("original", "independent")}
    with contextlib.closing(Field(toy, tmp_path, **WINDOWS)) as field:
        field.at(SEED_BLOCK)
        late = field.submit("http://127.0.0.1:9/not-yet")
        (elsewhere,) = field.ledger.claim("elsewhere", lease_s=3600)
        ids = [
            field.submit(server.url(f"files/{name}"), hash_=sha256(files[name])) for name in ("original", "independent")
        ]
        rows = field.run(ids)
        assert [(row.status, row.pay) for row in rows] == [("scored", None)] * 2
        assert field.ledger.unsettled(0) == []
        assert settle_group(field.ledger, field.records, ROUND, 1, RHO) == [], "settled while one is worked on"
        scores = field.ledger.scores(ROUND)
        assert scores is not None
        assert scores.unfinished == 3
        field.ledger.advance(elsewhere, "rejected", reason="unreachable")

        async def restart() -> None:
            async with field.evaluating() as task:
                await field.until(field.all_settled, task)

        asyncio.run(restart())
        assert [field.find(name).pay for name in ids] == [
            settled.rows[name].pay for name in ("original", "independent")
        ]
        assert field.find(late).pay == 0.0
        assert field.ledger.reject(ids[0], "duplicate_weights")
        assert field.ledger.unsettled(0) == [(ROUND, 1)], "what turned out to be a copy is settled again"
        settle_group(field.ledger, field.records, ROUND, 1, RHO)
        again = [field.find(name).pay for name in ids]
        alone = pays([settled.gains["independent"]])["independent"].pay
        assert again == [0.0, pytest.approx(alone)]
        field.ledger.write_pay(GroupPay(ROUND + 420, {}))
        assert field.ledger.gains(ROUND, 1) == {}, "gains are deleted once a later round is settled"
