"""The arithmetic that every validator must agree on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bzstream.cli import command_line
from bzstream.evaluation.records import Evaluation, Records, pack_sketch, unpack_sketch
from bzstream.evaluation.rejection_codes import FAILED, REJECTED, EvaluationError
from bzstream.evaluation.reproduce import compare
from bzstream.evaluation.scoring.copies import Fingerprint, copies
from bzstream.evaluation.scoring.data import Tokens, load_tokens
from bzstream.evaluation.scoring.losses import choose_windows, mean_loss, score
from bzstream.evaluation.scoring.scorer import Scorer
from bzstream.submissions.ledger import Ledger
from tests.evaluation.conftest import SEED, Toy
from tests.seeds import LONG

# ---- Windows --------------------------------------------------------------------------------------------------------


def test_the_windows_are_what_the_documentation_says() -> None:
    """Written out from the module's text alone: whoever implements it again gets the same ones."""
    import hashlib

    seed, tokens, count, length = "ab" * 32, 10_007, 20, 16
    left = list(range(tokens // length))
    expected = []
    for i in range(count):
        digest = hashlib.sha256(b"bzstream-windows-1" + bytes.fromhex(seed) + i.to_bytes(8, "little")).digest()
        j = i + int.from_bytes(digest, "little") % (len(left) - i)
        left[i], left[j] = left[j], left[i]
        expected.append(left[i] * length)
    assert choose_windows(seed, tokens, count=count, length=length) == expected
    assert choose_windows("0x" + seed, tokens, count=count, length=length) == expected


@given(st.binary(min_size=1, max_size=32), st.integers(1, 500), st.integers(2, 9), st.data())
def test_windows_are_different_and_inside(seed: bytes, available: int, length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, available))
    tokens = available * length + data.draw(st.integers(0, length - 1))
    found = choose_windows(seed.hex(), tokens, count=count, length=length)
    assert len(set(found)) == count
    assert all(0 <= start <= tokens - length and start % length == 0 for start in found)


def test_too_little_data_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="give more data"):
        choose_windows(SEED, 100, count=11, length=10)


# ---- Loss and score -------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.randoms(use_true_random=False))
def test_the_mean_does_not_depend_on_the_order(losses: list[float], random: object) -> None:
    mixed = list(losses)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert mean_loss(losses, 17) == mean_loss(mixed, 17)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_window_that_is_not_finite_ends_the_submission(bad: float) -> None:
    assert mean_loss([1.0, bad, 1.0], 10) is None
    assert mean_loss([], 10) is None


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_score_is_never_negative(baseline: float, loss: float) -> None:
    assert score(baseline, loss) == max(0.0, baseline - loss)


# ---- Copies ---------------------------------------------------------------------------------------------------------


def prints(*rows: tuple[str, str, float, str, tuple[float, ...]]) -> list[Fingerprint]:
    return [Fingerprint(*row) for row in rows]


A, NEAR_A, B = (1.0, 0.0, 0.0), (1.0, 0.05, 0.0), (0.0, 1.0, 0.0)


def test_the_later_of_two_copies_loses() -> None:
    found = prints(("1", "alice", 5.0, "x", A), ("2", "bob", 3.0, "y", NEAR_A), ("3", "carol", 4.0, "z", B))
    assert copies(found, 0.1) == {"1": "2"}
    assert copies(found, 0.01) == {}


def test_equal_weights_are_copies_whatever_the_distance() -> None:
    assert copies(prints(("1", "alice", 1.0, "x", A), ("2", "bob", 2.0, "x", A)), 0.0) == {"2": "1"}


@given(st.lists(st.floats(width=32) | st.sampled_from([math.inf, -math.inf, math.nan]), min_size=3, max_size=3))
def test_a_distance_that_is_not_finite_makes_nobody_a_copy(sketch: list[float]) -> None:
    """One infinite sketch used to make every honest submission of its group a copy of it."""
    sketch[0] = math.inf
    found = prints(("1", "attacker", 1.0, "x", tuple(sketch)), ("2", "bob", 2.0, "y", A), ("3", "carol", 3.0, "z", B))
    assert copies(found, 0.1) == {}


def test_nobody_copies_himself() -> None:
    assert copies(prints(("1", "alice", 1.0, "x", A), ("2", "alice", 2.0, "x", A)), 0.1) == {}


def test_at_the_same_moment_the_hotkey_decides_the_same_on_every_validator() -> None:
    """Each validator has submission ids of its own; commitments of one block have equal precedence."""
    assert copies(prints(("2", "alice", 1.0, "x", A), ("1", "bob", 1.0, "x", A)), 0.1) == {"1": "2"}
    assert copies(prints(("1", "alice", 1.0, "x", A), ("2", "bob", 1.0, "x", A)), 0.1) == {"2": "1"}


@given(st.permutations(range(4)))
def test_the_order_of_arrival_does_not_matter(order: list[int]) -> None:
    rows = prints(
        ("1", "a", 1.0, "x", A), ("2", "b", 2.0, "y", NEAR_A), ("3", "c", 3.0, "z", B), ("4", "d", 4.0, "z", B)
    )
    assert copies([rows[i] for i in order], 0.1) == {"2": "1", "4": "3"}


def staged_from(scorer: Scorer, tensors: dict[str, np.ndarray], tmp_path: Path, group: int = 1) -> object:
    from bzstream.evaluation.reading.layout import check_layout
    from tests.evaluation.hostile import honest

    path = tmp_path / "slice"
    path.write_bytes(honest(tensors, "F32"))
    fd = os.open(path, os.O_RDONLY)
    try:
        part = scorer.model.baseline.group(group)
        locations = check_layout(lambda n, at: os.pread(fd, n, at), path.stat().st_size, part.specs)
        return scorer.stage(fd, locations, group)
    finally:
        os.close(fd)


def test_the_sketch_measures_distances(
    scorer: Scorer, honest_tensors: dict[str, np.ndarray], baseline_tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Against the real distance, and with the noise laid out along the tile's period to defeat a naive sketch."""
    rng = np.random.default_rng(0)

    def change(scale: float) -> tuple[dict[str, np.ndarray], float]:
        made = {n: a + scale * rng.standard_normal(a.shape).astype(np.float32) for n, a in honest_tensors.items()}
        cast = {n: torch.from_numpy(a).bfloat16().float().numpy() for n, a in made.items()}
        squares = [float(((cast[n] - honest_tensors[n]) ** 2).sum()) for n in cast]
        return made, math.sqrt(sum(squares))

    def sketch(tensors: dict[str, np.ndarray], seed: str = SEED) -> np.ndarray:
        staged = staged_from(scorer, tensors, tmp_path)
        try:
            return np.asarray(scorer.model.sketch(staged, seed))  # type: ignore[arg-type]
        finally:
            staged.close()  # type: ignore[attr-defined]

    original = sketch(honest_tensors)
    for scale in (1e-3, 1e-2, 1e-1):
        made, distance = change(scale)
        assert float(np.linalg.norm(sketch(made) - original)) == pytest.approx(distance, rel=0.15)
    assert not np.any(sketch(baseline_tensors)), "the baseline changes nothing"
    periodic = {n: a.copy() for n, a in honest_tensors.items()}
    for array in periodic.values():
        array.reshape(-1)[::1024] += 0.1
    real = math.sqrt(sum(0.01 * len(a.reshape(-1)[::1024]) for a in periodic.values()))
    assert float(np.linalg.norm(sketch(periodic) - original)) == pytest.approx(real, rel=0.4)
    assert not np.allclose(sketch(honest_tensors, "11" * 32), original), "the signs do not depend on the seed"


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_sketches_survive_the_ledger(values: list[float]) -> None:
    assert unpack_sketch(pack_sketch(values)) == tuple(values)


# ---- Repeating ------------------------------------------------------------------------------------------------------


def test_a_repeat_is_bit_identical_and_a_difference_is_explained(
    scorer: Scorer, honest_tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    first, second = (
        scorer.score(staged_from(scorer, honest_tensors, tmp_path), SEED, file_hash="sha256:x").evaluation  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert compare(first, second) == []
    assert first.loss_windows == second.loss_windows
    assert first.score > 0
    other = msgspec.structs.replace(second, loss=math.nextafter(second.loss, 9), versions={"torch": "1.0"})
    (difference,) = compare(first, other)
    assert "loss differ" in difference
    assert "versions was" in difference
    assert compare(first, msgspec.structs.replace(second, tokens_hash="")) == ["the evaluation data is not the same"]


def test_the_record_survives_the_ledger(tmp_path: Path, scorer: Scorer, honest_tensors: dict[str, np.ndarray]) -> None:
    verdict = scorer.score(
        staged_from(scorer, honest_tensors, tmp_path),  # type: ignore[arg-type]
        SEED,
        file_hash="sha256:x",
        submission_id="id",
        round_=7,
    )
    for _ in range(2):  # written again by whoever evaluates it next
        ledger = Ledger.open(tmp_path / "ledger.sqlite")
        records = Records(ledger)
        records.write(verdict.evaluation, verdict.sketch)
        assert records.find("id") == verdict.evaluation
        assert records.find("other") is None
        weights, sketch = records.fingerprints(7, 1)["id"]
        assert weights == verdict.evaluation.weights
        assert sketch == pytest.approx(verdict.sketch)
        ledger.close()


def test_the_command_line_scores_repeats_and_refuses(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bzstream evaluate FILE`, then an evaluation in a ledger and `--repeat`; a long run gives each a process."""
    for name in [name for name in os.environ if name.startswith("BZ_") and name != "BZ_TEST_LONG"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BZ_EVALUATION_WINDOWS", "8")
    monkeypatch.setenv("BZ_EVALUATION_WINDOW_TOKENS", "64")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def bzstream(*arguments: str, alone: bool = LONG) -> tuple[int, str, str]:
        """(exit status, standard output, what was wrong)"""
        words = ["evaluate", *arguments, "--store", str(toy.store)]
        if not alone:
            found = CliRunner().invoke(command_line(["evaluate"]), words)
            return found.exit_code, found.stdout, str(found.exception)
        command = [sys.executable, "-m", "bzstream", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        return done.returncode, done.stdout, done.stderr

    status, out, error = bzstream(str(toy.improved), "--group", "1", "--data", str(toy.data), "--seed", SEED, "--json")
    assert status == 0, error
    evaluation = msgspec.json.decode(out, type=Evaluation)
    assert evaluation.score > 0
    where = tmp_path / "ledger.sqlite"
    name = _scored(where, evaluation)
    arguments = ("--repeat", name, "--ledger", str(where), str(toy.improved), "--data", str(toy.data))
    status, out, error = bzstream(*arguments)
    assert status == 0, error
    assert "bit for bit the same" in out
    _scored(where, msgspec.structs.replace(evaluation, loss=evaluation.loss + 1e-15), name)
    status, _, error = bzstream(*arguments)
    assert status == 1
    assert "the repeat differs from the record: loss differ" in error
    missing = bzstream(str(toy.improved), "--group", "1", "--data", "/no/such.npy", alone=True)
    assert missing == (1, "", "bzstream: the evaluation data /no/such.npy does not exist\n")
    assert bzstream("--data", str(toy.data))[0] == 2


def _scored(where: Path, evaluation: Evaluation, name: str | None = None) -> str:
    """Put an evaluation into a ledger, as that of a submission."""
    from bzstream.submissions.types import Admitted, Candidate, Submission

    ledger = Ledger.open(where)
    if name is None:
        submission = Submission("5F", 1, "https://miner.example.com/x", 1, None, "", b"{}")
        accepted = ledger.accept(Candidate(submission, 0, 3))
        assert isinstance(accepted, Admitted)
        name = accepted.submission_id
    Records(ledger).write(msgspec.structs.replace(evaluation, submission_id=name, round=0), (0.0,))
    ledger.close()
    return name


# ---- Data -------------------------------------------------------------------------------------------------


def load(path: Path | str, cache: Path, **options: object) -> Tokens:
    return load_tokens(str(path), **{"vocabulary": 256, "least": 10, "cache": cache} | options)  # type: ignore[arg-type]


def test_tokens_come_from_every_kind_of_file(tmp_path: Path) -> None:
    from bzstream.tensorfile import arrange, build_head

    tokens = np.arange(100, dtype=np.uint16)
    np.save(tmp_path / "a.npy", tokens)
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    (tmp_path / "wide.bin").write_bytes(tokens.astype("<u4").tobytes())
    placed = arrange([("tokens", "I64", (100,)), ("mask", "F32", (3,))])
    data = {"tokens": tokens.astype("<i8").tobytes(), "mask": bytes(12)}
    (tmp_path / "a.safetensors").write_bytes(build_head(placed) + b"".join(data[t.name] for t in placed))
    text = "".join(map(chr, range(32, 127)))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text[:50]}) + "\n" + json.dumps({"text": text[50:]}) + "\n")
    for name in ("a.npy", "a.bin", "a.safetensors"):
        found = load(tmp_path / name, tmp_path)
        assert len(found) == 100
        assert found.windows([90, 0], 5).tolist() == [[90, 91, 92, 93, 94], [0, 1, 2, 3, 4]]
    assert len(load(tmp_path / "wide.bin", tmp_path, vocabulary=70_000)) == 100
    for name in ("a.txt", "a.jsonl"):
        assert load(tmp_path / name, tmp_path).windows([0], 95).tolist() == [list(text.encode())]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "2.txt").write_text("second")
    (folder / "1.txt").write_text("first")
    assert bytes(load(folder, tmp_path).windows([0], 11)[0].tolist()) == b"firstsecond"


def test_text_goes_through_the_models_own_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    made.pre_tokenizer = Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a b a\n" * 10)
    found = load(tmp_path / "a.txt", tmp_path / "cache", vocabulary=50_000, tokenizer=str(tmp_path))
    assert found.windows([0], 31).tolist() == [[1, 2, 1] * 10 + [0]]
    with pytest.raises(EvaluationError, match="no tokenizer is known"):
        load(tmp_path / "a.txt", tmp_path / "cache", vocabulary=50_000)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npy", b"not numpy", "not a .npy file"),
        ("a.bin", b"odd", "no whole number"),
        ("a.bin", b"", "no whole number"),
        ("a.safetensors", b"junk junk", "not valid safetensors"),
        ("a.txt", b"short", "a score needs 10"),
        ("a.txt", b"", "a score needs 10"),
        ("a.csv", b"1,2,3", "neither tokens"),
        ("a.jsonl", b"[]\n", "line 1"),
        ("a.bin", np.full(50, 999, "<u2").tobytes(), "another tokenizer"),
    ],
)
def test_data_that_does_not_fit_is_an_error_at_the_start(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=words):
        load(tmp_path / name, tmp_path / "cache")


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import types

    class Rows(list[dict[str, str]]):
        column_names = ("text",)

    library = types.ModuleType("datasets")
    asked: list[object] = []

    def load_dataset(*arguments: str, split: str) -> Rows:
        asked.append((arguments, split))
        return Rows([{"text": "one "}, {"text": "two and more"}])

    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert bytes(load("wiki:small:validation", tmp_path).windows([0], 16)[0].tolist()) == b"one two and more"
    assert asked == [(("wiki", "small"), "validation")]


# ---- The table of codes ---------------------------------------------------------------------------------------------


def test_every_code_is_snake_case_and_has_one_meaning() -> None:
    assert not REJECTED.keys() & FAILED.keys()
    for code, meaning in {**REJECTED, **FAILED}.items():
        assert code == code.lower()
        assert code.isidentifier()
        assert meaning.endswith(".")
    promised = {
        "unreachable", "too_large", "not_safetensors_or_pt", "unsafe_pickle", "wrong_keys", "wrong_shape", "non_finite",
        "hash_mismatch", "duplicate_weights", "superseded",
    }  # fmt: skip
    assert promised <= REJECTED.keys()


def test_a_record_says_everything_that_a_repeat_needs() -> None:
    fields = {field.name for field in msgspec.structs.fields(Evaluation)}
    needed = {
        "seed", "windows", "window_tokens", "batch", "baseline_loss", "loss", "score", "model_version", "model_hash",
        "slice_hash", "file_hash", "tokens_hash", "versions", "device", "threads", "seconds",
    }  # fmt: skip
    assert needed <= fields
