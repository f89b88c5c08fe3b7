"""The resident model: every layout loads as transformers loads it, and the baseline comes back bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.reading.layout import check_layout
from bzstream.evaluation.rejection_codes import EvaluationError, Failure, ModelClosed, Refusal
from bzstream.evaluation.scoring.resident_model import ResidentModel, Staged
from bzstream.evaluation.scoring.scorer import Scorer
from bzstream.model import BadCheckpoint, open_snapshot, publish
from tests.evaluation.conftest import SEED, Toy
from tests.model.families import bits, build

FAMILIES = ("qwen3_vl_moe", "qwen3_moe", "deepseek_v2", "mixtral", "gpt_oss")


@contextlib.contextmanager
def resident(store: Path, version: str = "a", **options: Any) -> Iterator[ResidentModel]:
    snapshot = open_snapshot(store / "snapshots" / version)
    published = BaselineModel(snapshot)
    try:
        yield ResidentModel(published, device="cpu", **options)
    finally:
        published.close()
        snapshot.release()


def stage(model: ResidentModel, file: Path, group: int) -> Staged:
    fd = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        locations = check_layout(lambda length, at: os.pread(fd, length, at), size, model.baseline.group(group).specs)
        return model.stage(fd, locations, group)
    finally:
        os.close(fd)


def state(module: Any) -> dict[str, torch.Tensor]:
    return {name: bits(value).clone() for name, value in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def hub_layout(folder: Path) -> None:
    """Rewrite a checkpoint as the hub has Qwen3-VL-MoE: the last two dimensions of fused experts swapped."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        swapped = {n: t.mT.contiguous() if ".mlp.experts." in n else t for n, t in tensors.items()}
        save_file(swapped, path, {"format": "pt"})


@pytest.mark.parametrize("layout", ["original", "native", "hub"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_swaps_a_slice_in_as_transformers_would(
    family: str, layout: str, tmp_path: Path
) -> None:
    if layout == "hub" and family != "qwen3_vl_moe":
        return
    one, two = build(family, 1), build(family, 2)
    for name, model in (("one", one), ("two", two)):
        model.save_pretrained(tmp_path / name, save_original_format=layout == "original")
        if layout == "hub":
            hub_layout(tmp_path / name)
        publish(tmp_path / name, tmp_path / f"store-{name}", block=1, version="a", groups=2)
    ours, theirs = state(one), state(two)
    with resident(tmp_path / "store-one") as found:
        assert same(state(found.module), ours)
        assert found.differing() == []
        tokens = torch.arange(20).view(2, 10)
        with torch.inference_mode():
            reference = type(one).from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
            reference.set_experts_implementation("eager")  # the sizes are too small for grouped products
            expected = reference(input_ids=tokens, use_cache=False).logits
            assert torch.equal(found.logits(tokens), expected), "computed buffers (rotary tables) are not as built"
        staged = stage(found, tmp_path / "store-two" / "current" / "group-1.safetensors", 1)
        with found.swapped_in(staged):
            swapped = state(found.module)
        for name, mine in ours.items():
            if ".mlp.experts." in name:
                half = len(mine) // 2  # experts 2 and 3 of 4
                assert torch.equal(swapped[name], torch.cat([mine[:half], theirs[name][half:]])), name
            else:
                assert torch.equal(swapped[name], mine), name
        assert same(state(found.module), ours)
        staged.close()


def test_a_square_model_in_the_hubs_layout_is_refused(tmp_path: Path) -> None:
    """hidden = 2 * intermediate: gate_up_proj looks the same both ways, and transformers itself would get it wrong."""
    config = build("qwen3_vl_moe").config
    config.text_config.moe_intermediate_size = 8
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint", save_original_format=False)
    publish(tmp_path / "checkpoint", tmp_path / "store", block=1, version="a", groups=2)
    with resident(tmp_path / "store") as found:
        assert same(state(found.module), state(model)), "down_proj says that it is transformers' own layout"
    hub_layout(tmp_path / "checkpoint")
    with pytest.raises(BadCheckpoint, match="square"):
        publish(tmp_path / "checkpoint", tmp_path / "store2", block=1, version="a", groups=2)


def test_a_model_that_the_config_does_not_describe_is_an_error(toy: Toy, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in toy.checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (checkpoint / "config.json").write_text(json.dumps(config))
    publish(checkpoint, tmp_path / "store", block=1, version="a", groups=4)
    with pytest.raises(EvaluationError, match="does not fill the model's parameter"), resident(tmp_path / "store"):
        pass
    config["text_config"]["num_hidden_layers"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    publish(checkpoint, tmp_path / "store", block=2, version="b", groups=4)
    with pytest.raises(EvaluationError, match="has no place for"), resident(tmp_path / "store", "b"):
        pass
    config["model_type"] = "of_my_own"
    (checkpoint / "config.json").write_text(json.dumps(config))
    publish(checkpoint, tmp_path / "store", block=3, version="c", groups=4)
    with pytest.raises(EvaluationError, match="no model type"), resident(tmp_path / "store", "c"):
        pass


class Own(torch.nn.Module):  # type: ignore[misc]
    """A model of the validator's own: single experts under the checkpoint's own names, and no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(32, 8)})
        layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": torch.nn.ModuleList()})})
        for _ in range(4):
            layer["mlp"]["experts"].append(torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 32, bias=False)}))
        self.model["layers"] = torch.nn.ModuleList([layer])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.model["embed_tokens"](tokens)
        return sum(e["up_proj"](hidden) for e in self.model["layers"][0]["mlp"]["experts"])


def build_own(config: dict[str, Any]) -> torch.nn.Module:
    assert config["vocab_size"] == 32
    return Own()


def test_a_model_of_the_validators_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = Own(), Own()
    for name, model in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"vocab_size": 32}')
        publish(tmp_path / name, tmp_path / f"store-{name}", block=1, version="a", groups=2)
    factory = f"{__name__}:build_own"
    with resident(tmp_path / "store-one", factory=factory) as found:
        assert same(state(found.module), state(one))
        windows = np.arange(24, dtype=np.int64).reshape(2, 12)
        before = found.window_losses(windows, batch=1)
        staged = stage(found, tmp_path / "store-two" / "current" / "group-1.safetensors", 1)
        with found.swapped_in(staged):
            swapped = found.window_losses(windows, batch=1)
            assert state(found.module)["model.layers.0.mlp.experts.3.up_proj.weight"].equal(
                state(two)["model.layers.0.mlp.experts.3.up_proj.weight"]
            )
        assert swapped != before
        assert found.window_losses(windows, batch=1) == before
    for wrong in ("nonsense", f"{__name__}:missing", "no.such.module:f", f"{__name__}:SEED"):
        with (
            pytest.raises(EvaluationError, match=r"evaluation\.model"),
            resident(tmp_path / "store-one", factory=wrong),
        ):
            pass


# ---- The baseline comes back ---------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def test_the_baseline_comes_back_after_a_fault_at_every_step(
    scorer: Scorer, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception from each single copy of an exchange, in and out, and from scoring itself."""
    model = scorer.model
    baseline = state(model.module)
    real = torch.Tensor.copy_
    copies = 3 * len(model.bindings(1))
    steps = [0, 1, 2, 3, copies // 2, copies - 1, copies, copies + 1, 2 * copies - 1]
    for step in steps:
        staged = stage(model, toy.improved, 1)
        done = 0

        def failing(self: torch.Tensor, *arguments: Any, step: int = step, **named: Any) -> torch.Tensor:
            nonlocal done
            done += 1
            if done == step + 1:
                raise Boom
            return real(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(Boom), model.swapped_in(staged):
            pass
        monkeypatch.undo()
        assert model.is_baseline
        assert same(state(model.module), baseline), f"after a fault at copy {step}"
        staged.close()
    for raised in (Boom(), KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        staged = stage(model, toy.improved, 1)
        with pytest.raises((Boom, KeyboardInterrupt, Failure)), model.swapped_in(staged):
            raise raised
        assert same(state(model.module), baseline)
        staged.close()
    staged = stage(model, toy.improved, 1)
    with model.swapped_in(staged):
        assert not same(state(model.module), baseline), "nothing was swapped in"
    staged.close()
    assert model.differing() == []


def test_a_flipped_bit_is_noticed(scorer: Scorer) -> None:
    name, value = next((n, p) for n, p in scorer.model.module.named_parameters() if "experts" in n)
    flat = value.detach().view(-1).view(torch.uint8)
    flat[3] ^= 1
    assert scorer.model.differing() == [name]
    flat[3] ^= 1
    assert scorer.model.differing() == []


def test_a_model_that_cannot_be_restored_says_so(scorer: Scorer, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scorer.model

    def broken(*_: Any) -> None:
        raise EvaluationError("the store is gone")

    staged = stage(model, toy.improved, 1)
    with monkeypatch.context() as patch:
        patch.setattr("bzstream.evaluation.scoring.resident_model.read_into", broken)
        with pytest.raises(EvaluationError, match="the store is gone"), model.swapped_in(staged):
            raise Boom
    with pytest.raises(Failure, match="not the baseline"), model.swapped_in(staged):
        pass
    model.restore(1)
    assert model.is_baseline
    assert model.differing() == []
    staged.close()


def test_scoring_can_be_cancelled_between_batches(scorer: Scorer, toy: Toy) -> None:
    cancelled = threading.Event()
    baseline = state(scorer.model.module)
    scorer.score(stage(scorer.model, toy.improved, 1), SEED, file_hash="")
    cancelled.set()
    with pytest.raises(InterruptedError):
        scorer.score(stage(scorer.model, toy.improved, 1), SEED, file_hash="", cancelled=cancelled.is_set)
    assert same(state(scorer.model.module), baseline)


def test_two_buffers_and_no_more(scorer: Scorer, toy: Toy) -> None:
    model = scorer.model
    held = [stage(model, toy.improved, 1) for _ in range(2)]
    third: list[Staged] = []
    waiting = threading.Thread(target=lambda: third.append(stage(model, toy.improved, 1)), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "a third buffer was made"
    held[0].close()
    waiting.join(60)
    assert len(third) == 1
    third[0].close()
    third[0].close()  # closing twice gives back once
    held[0] = stage(model, toy.improved, 1)
    waiting = threading.Thread(target=lambda: third.append(stage(model, toy.improved, 1)), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "a buffer was given back twice"
    for each in held:
        each.close()
    waiting.join(60)
    third[1].close()


def test_whoever_waits_for_a_model_that_is_closed_is_told(toy: Toy) -> None:
    with resident(toy.store, "step_1000") as model:
        held = [stage(model, toy.improved, 1) for _ in range(2)]
        raised: list[BaseException] = []

        def wait() -> None:
            try:
                stage(model, toy.improved, 1)
            except BaseException as error:
                raised.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        model.close()
        waiting.join(10)
        assert [type(error) for error in raised] == [ModelClosed]
        for each in held:
            each.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_submission_is_swapped_in_as_the_published_dtype(
    dtype: torch.dtype, scorer: Scorer, toy: Toy, tmp_path: Path
) -> None:
    tensors = load_file(toy.improved)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "cast.safetensors")
    model = scorer.model
    cast, plain = stage(model, tmp_path / "cast.safetensors", 1), stage(model, toy.improved, 1)
    if dtype is torch.float32:
        assert cast.weights == plain.weights, "the same weights have another hash in another dtype"
    for view, specs in zip(cast.views, model.baseline.group(1).specs, strict=True):
        assert torch.equal(bits(view), bits(tensors[specs.name].to(dtype).to(torch.bfloat16)))
    cast.close()
    plain.close()


def test_a_loss_that_is_not_finite_ends_at_once(scorer: Scorer) -> None:
    parameter = next(p for n, p in scorer.model.module.named_parameters() if n.endswith("lm_head.weight"))
    kept = parameter.detach().clone()
    parameter.detach()[0, 0] = float("inf")
    losses = scorer.model.window_losses(np.zeros((6, 16), np.int64), batch=2)
    parameter.detach().copy_(kept)
    assert len(losses) == 2
    assert not np.isfinite(losses).any()


def test_a_change_that_is_not_finite_has_no_sketch(scorer: Scorer, toy: Toy, tmp_path: Path) -> None:
    """Two values that are finite in bfloat16, and whose sum is not in float32, past every check of the file."""
    tensors = load_file(toy.improved)
    for tensor in tensors.values():
        tensor.fill_(torch.finfo(torch.bfloat16).max)
    save_file(tensors, tmp_path / "enormous.safetensors")
    staged = stage(scorer.model, tmp_path / "enormous.safetensors", 1)
    with pytest.raises(Refusal) as caught:
        scorer.score(staged, SEED, file_hash="")
    assert caught.value.code == "non_finite"
    assert scorer.model.differing() == []


def test_the_loss_is_transformers_own(scorer: Scorer, toy: Toy) -> None:
    tokens = torch.from_numpy(np.load(toy.data)[:64].astype(np.int64))[None]
    with torch.inference_mode():
        logits = scorer.model.module(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    assert scorer.model.window_losses(tokens.numpy(), batch=1) == pytest.approx([float(expected)], rel=1e-5)


def test_peak_memory_is_the_model_and_less_than_three_slices(tmp_path: Path) -> None:
    """In a process of its own, with a model large enough to see: 192 MB, slices of 40 MB."""
    program = Path(__file__).with_name("peak_memory.py")
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["grown"] < found["model"] + 3 * found["slice"], found
